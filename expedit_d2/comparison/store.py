"""Results stored as soon as they are computed, so that nothing is ever computed again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.outputs import check_folder

__all__ = ["Store", "fingerprint"]

logger = logging.getLogger(__name__)

#: What numpy raises for files that are truncated, or are not npz files.
_UNREADABLE = (
    *(ValueError, TypeError, KeyError, OSError, EOFError, AttributeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)


def fingerprint(*parts: Any) -> str:
    """A short name for anything that JSON can hold; equal values have equal names."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Store:
    """A folder with ``results.jsonl``, one JSON line per result, and npz files of arrays.

    Neither can hold code, so nothing found in the folder is ever run. Truncated files and files
    of another kind count as missing. Several processes must not write to one folder at a time.

    Attributes:
        reused: how many results were there already when they were needed.
    """

    def __init__(self, folder: str | Path | None) -> None:
        """
        Args:
            folder: created if needed; None keeps everything in memory.

        Raises:
            NotADirectoryError, PermissionError: as `check_folder`.
            ValueError: if its ``results.jsonl`` is something else.
        """
        self.folder = None if folder is None else Path(folder)
        self.results: dict[str, dict[str, Any]] = {}
        self.arrays: dict[str, dict[str, np.ndarray]] = {}
        self.reused = 0
        self._complete = True
        if self.folder is not None:
            check_folder(self.folder, "the folder of the results")
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._file.exists():
                self._read()

    @property
    def _file(self) -> Path:
        return self.folder / "results.jsonl"

    def _read(self) -> None:
        foreign = ValueError(
            f"{str(self._file)!r} holds no results of a comparison; remove it, or name another "
            "folder for the results"
        )
        if not self._file.is_file():
            raise foreign
        content = self._file.read_bytes()
        self._complete = content.rstrip(b"\0").endswith(b"\n") or not content
        lines = [line for line in content.replace(b"\0", b"").splitlines() if line.strip()]
        for line in lines:
            try:
                entry = json.loads(line)
                if isinstance(entry["value"], dict):
                    self.results[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                continue  # cut off in the middle: that one is computed again
        torn = len(lines) == 1 and lines[0].startswith(b'{"label"')
        if lines and not self.results and not torn:
            raise foreign

    def get(self, key: str) -> dict[str, Any] | None:
        """The result under a key, or None."""
        return self.results.get(key)

    def put(self, key: str, value: dict[str, Any], label: str = "") -> None:
        """Keep a result; ``label`` is for people who read the file."""
        line = json.dumps({"label": label, "key": key, "value": value}, ensure_ascii=False)
        if self.folder is not None:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(("" if self._complete else "\n") + line + "\n")
            self._complete = True
        self.results[key] = json.loads(line)["value"]

    def get_arrays(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays under a key, or None."""
        path = None if self.folder is None else self.folder / f"{key}.npz"
        if key not in self.arrays and path is not None and path.is_file():
            try:
                # Arrays of objects would be pickles, which may hold code.
                with np.load(path, allow_pickle=False) as file:
                    self.arrays[key] = {name: file[name] for name in file.files}
            except _UNREADABLE as error:
                logger.warning("%s cannot be read (%s): computed again", path, error)
        return self.arrays.get(key)

    def put_arrays(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays of numbers by name; the file is whole or not there."""
        self.arrays[key] = dict(arrays)
        if self.folder is None:
            return
        path = self.folder / f"{key}.npz"
        unfinished = path.with_suffix(".unfinished")
        with open(unfinished, "wb") as file:
            np.savez(file, **arrays)
        os.replace(unfinished, path)
