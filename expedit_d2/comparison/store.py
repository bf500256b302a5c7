"""Results kept as they come, so that nothing finished is ever computed again."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

__all__ = ["Store", "fingerprint"]


def fingerprint(*parts: Any) -> str:
    """A short name for anything that JSON can hold: equal for what is equal, else different."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Store:
    """A folder with ``results.jsonl``, one JSON line per result, and pickles of larger things.

    Several processes must not write to one folder at a time.

    Attributes:
        reused: how many results were there already when they were needed.
    """

    def __init__(self, folder: str | Path | None) -> None:
        """
        Args:
            folder: made if need be; None keeps everything in memory.
        """
        self.folder = None if folder is None else Path(folder)
        self.results: dict[str, Any] = {}
        self.objects: dict[str, Any] = {}
        self.reused = 0
        self._complete = True
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._file.is_file():
                self._read(self._file.read_text(encoding="utf-8"))

    @property
    def _file(self) -> Path:
        return self.folder / "results.jsonl"

    def _read(self, text: str) -> None:
        self._complete = text.endswith("\n") or not text
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self.results[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                continue  # cut off in the middle: that one is computed again

    def get(self, key: str) -> Any | None:
        """The result under a key, or None."""
        return self.results.get(key)

    def put(self, key: str, value: Any, label: str = "") -> None:
        """Keep a result; ``label`` is for people who read the file."""
        line = json.dumps({"label": label, "key": key, "value": value}, ensure_ascii=False)
        if self.folder is not None:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(("" if self._complete else "\n") + line + "\n")
            self._complete = True
        self.results[key] = json.loads(line)["value"]

    def get_object(self, key: str) -> Any | None:
        """The object under a key, or None."""
        path = None if self.folder is None else self.folder / f"{key}.pickle"
        if key not in self.objects and path is not None and path.is_file():
            with open(path, "rb") as file:
                self.objects[key] = pickle.load(file)
        return self.objects.get(key)

    def put_object(self, key: str, value: Any) -> None:
        """Keep something that JSON cannot hold; the file is whole or not there."""
        self.objects[key] = value
        if self.folder is None:
            return
        path = self.folder / f"{key}.pickle"
        unfinished = path.with_suffix(".unfinished")
        with open(unfinished, "wb") as file:
            pickle.dump(value, file)
        os.replace(unfinished, path)
