"""Check output paths before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["check_file", "check_folder", "check_new_file"]


def check_folder(path: str | Path, key: str) -> None:
    """Check that a folder exists or can be created, and is writable.

    Args:
        path: of the folder, which is not created yet.
        key: option or config key, for error messages.

    Raises:
        ValueError: if the path is empty.
        NotADirectoryError: if the folder or one of its parents is a file.
        PermissionError: if it is not writable.
    """
    if not str(path):
        raise ValueError(f"{key} is empty; give a folder")
    folder = Path(path).expanduser().absolute()
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        raise NotADirectoryError(f"{key} {str(path)!r}: {str(existing)!r} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{key} {str(path)!r}: {str(existing)!r} is not writable; give another folder"
        )


def check_file(path: str | Path, key: str) -> None:
    """Check that a file can be written or replaced.

    Raises:
        IsADirectoryError: if it is a folder.
        NotADirectoryError, PermissionError: from `check_folder` for its folder.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise IsADirectoryError(f"{key}: {str(path)!r} is a folder; give a file")
    check_folder(file.parent, key)
    if file.exists() and not os.access(file, os.W_OK):
        raise PermissionError(f"{key}: {str(path)!r} is not writable; give another file")


def check_new_file(path: str | Path, key: str) -> None:
    """Check that a file does not exist yet and can be written to an existing folder.

    Raises:
        FileExistsError: if the path exists.
        FileNotFoundError: if its folder does not exist.
        NotADirectoryError, PermissionError: from `check_folder` for its folder.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"{str(path)!r} already exists; remove it or choose another name")
    folder = Path(path).parent
    check_folder(folder, key)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r} to write to")
