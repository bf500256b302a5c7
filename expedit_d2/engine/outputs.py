"""Where results go, checked before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["check_file", "check_folder", "check_new_file"]


def check_folder(path: str | Path, key: str) -> None:
    """Whether results can be written into a folder that is there or can be made.

    Args:
        path: of the folder; nothing is made yet.
        key: the option or config key that gave it, for the message.

    Raises:
        ValueError: if the path is empty.
        NotADirectoryError: if the folder, or one above it, is a file.
        PermissionError: if it must not be written to.
    """
    if not str(path):
        raise ValueError(f"{key} is empty; give a folder")
    folder = Path(path).expanduser().absolute()
    there = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not there.is_dir():
        raise NotADirectoryError(f"{key} {str(path)!r}: {str(there)!r} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{key} {str(path)!r}: {str(there)!r} must not be written to; give another folder"
        )


def check_file(path: str | Path, key: str) -> None:
    """The same for a file; one that is there will be replaced.

    Raises:
        IsADirectoryError: if it is a folder.
        NotADirectoryError, PermissionError: as `check_folder`, of its folder.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise IsADirectoryError(f"{key}: {str(path)!r} is a folder; give a file")
    check_folder(file.parent, key)
    if file.exists() and not os.access(file, os.W_OK):
        raise PermissionError(f"{key}: {str(path)!r} must not be written to; give another file")


def check_new_file(path: str | Path, key: str) -> None:
    """Whether a file can be written that is not there yet, into a folder that is.

    Raises:
        FileExistsError: if there is something of that name.
        FileNotFoundError: if there is no such folder.
        NotADirectoryError, PermissionError: as `check_folder`, of its folder.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"{str(path)!r} is there already; remove it or choose another name")
    folder = Path(path).parent
    check_folder(folder, key)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r} to write to")
