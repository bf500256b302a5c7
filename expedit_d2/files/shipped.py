"""Data files of the package: configs, projects and their weights.

``configs/`` and ``projects/`` are next to the package in a checkout, and inside the package in a
wheel. They are always next to each other, as relative paths in configs expect.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["CODE", "SHIPPED", "config_file", "find_config", "shipped_file"]

_PACKAGE = Path(__file__).resolve().parent.parent

#: Folder of ``configs/`` and ``projects/``.
SHIPPED = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent

#: Folders of all modules of the package.
CODE = (_PACKAGE, SHIPPED / "projects")


def shipped_file(path: str) -> str:
    """A file on disk, or else the file of this name in the package.

    Args:
        path: absolute, or relative to the current folder or the root of this repository; other
            values, such as URLs, are returned unchanged.
    """
    shipped = SHIPPED / path
    return str(shipped) if not Path(path).exists() and shipped.is_file() else path


def config_file(name: str | Path) -> Path:
    """The path of a config: a file on disk, or one in the package.

    Args:
        name: path of a file, or a path relative to the root of this repository
            (``configs/embedded/dinov2_dpt.yaml``, ``projects/DPT/configs/dpt_large_midas.yaml``),
            or to its ``configs`` (``embedded/dinov2_dpt.yaml``).

    Raises:
        FileNotFoundError: if the file does not exist.
    """
    path = find_config(name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {str(name)!r}")
    return path


def find_config(name: str | Path) -> Path:
    """`config_file` that returns the path of a missing file unchanged."""
    places = (Path(name), SHIPPED / name, SHIPPED / "configs" / name)
    return next((path for path in places if path.is_file()), places[0])
