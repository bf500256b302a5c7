"""Digests of file contents, cached while a file is unchanged."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

__all__ = ["file_digest"]


def file_digest(path: str | Path) -> str:
    """Digest of a file's content.

    Names, sizes and times alone are not enough: files unpacked from an archive often have the same
    time, and two of the same size may have been swapped.

    Raises:
        OSError: if the file does not exist.
    """
    state = os.stat(path)
    return _digest(os.fspath(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@cache
def _digest(path: str, *state: int) -> str:
    """Digest of the file in this state (size and times, the key of the cache)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:24]
