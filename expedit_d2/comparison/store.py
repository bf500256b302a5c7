"""Results on disk, saved as soon as they are computed, so that nothing is computed twice."""

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
import torch

from ..engine.outputs import check_folder
from ..files import bytes_of

__all__ = ["Store", "fingerprint"]

logger = logging.getLogger(__name__)

#: Errors of numpy for truncated files and files that are not npz.
_UNREADABLE = (
    *(ValueError, TypeError, KeyError, OSError, EOFError, AttributeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)


def fingerprint(*parts: Any) -> str:
    """Hash of anything that can be represented in JSON."""
    text = json.dumps(parts, sort_keys=True, default=_in_json)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _in_json(value: Any) -> Any:
    """A value that JSON lacks; of an array or tensor, ``str`` would leave out most numbers."""
    if isinstance(value, torch.Tensor):
        content = bytes_of(value)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        content = value.tobytes()
    else:
        return str(value)
    return [str(value.dtype), list(value.shape), hashlib.sha256(content).hexdigest()]


class Store:
    """A folder with ``results.jsonl``, one JSON line per result, and npz files of arrays.

    Neither can contain code. Truncated and foreign files count as missing. Only one process may
    write to a folder at a time.

    Attributes:
        reused: number of results that were not computed again.
    """

    def __init__(self, folder: str | Path | None) -> None:
        """
        Args:
            folder: created if needed; None: in memory only.

        Raises:
            NotADirectoryError, PermissionError: from `check_folder`.
            ValueError: if its ``results.jsonl`` has other content.
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
            f"{str(self._file)!r} has no results of a comparison; remove it, or give another "
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
                continue  # truncated: computed again
        truncated = len(lines) == 1 and lines[0].startswith(b'{"label"')
        if lines and not self.results and not truncated:
            raise foreign

    def get(self, key: str) -> dict[str, Any] | None:
        """The result of a key, or None."""
        return self.results.get(key)

    def put(self, key: str, value: dict[str, Any], label: str = "") -> None:
        """Save a result; ``label`` is for readers of the file."""
        line = json.dumps({"label": label, "key": key, "value": value}, ensure_ascii=False)
        if self.folder is not None:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(("" if self._complete else "\n") + line + "\n")
            self._complete = True
        self.results[key] = json.loads(line)["value"]

    def get_arrays(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays of a key, or None."""
        path = None if self.folder is None else self.folder / f"{key}.npz"
        if key not in self.arrays and path is not None and path.is_file():
            try:
                # Arrays of objects would be pickles, which may run code.
                with np.load(path, allow_pickle=False) as file:
                    self.arrays[key] = {name: file[name] for name in file.files}
            except _UNREADABLE as error:
                logger.warning("%s cannot be read (%s): computed again", path, error)
        return self.arrays.get(key)

    def put_arrays(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Save arrays by name, atomically."""
        self.arrays[key] = dict(arrays)
        if self.folder is None:
            return
        path = self.folder / f"{key}.npz"
        unfinished = path.with_suffix(".unfinished")
        with open(unfinished, "wb") as file:
            np.savez(file, **arrays)
        os.replace(unfinished, path)
