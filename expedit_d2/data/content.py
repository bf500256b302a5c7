"""What files hold, by a digest that is read once as long as a file stays the same."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

__all__ = ["file_digest"]


def file_digest(path: str | Path) -> str:
    """A short name for the content of a file.

    Names, sizes and times alone would not do: files that are unpacked from an archive often have
    the same time, and two of the same size may have changed places.

    Raises:
        OSError: if there is no such file.
    """
    state = os.stat(path)
    return _digest(os.fspath(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@cache
def _digest(path: str, *state: int) -> str:
    """The other arguments are the state of the file that the result is valid for."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()[:24]
