"""What comes with the package besides its modules: configs, projects and their weights.

``configs/`` and ``projects/`` are next to the package in a checkout, and inside of it where it was
installed from a wheel; either way they lie next to each other, as relative paths in configs expect.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["CODE", "SHIPPED", "config_file", "find_config", "shipped_file"]

_PACKAGE = Path(__file__).resolve().parent.parent

#: The folder that holds ``configs/`` and ``projects/``.
SHIPPED = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent

#: The folders of all modules of ours.
CODE = (_PACKAGE, SHIPPED / "projects")


def shipped_file(path: str) -> str:
    """A file on disk, else the one of this name that comes with the package.

    Args:
        path: absolute, or from the working folder, or from the root of this repository; what is
            none of these, such as a URL, stays as it is.
    """
    shipped = SHIPPED / path
    return str(shipped) if not Path(path).exists() and shipped.is_file() else path


def config_file(name: str | Path) -> Path:
    """The path of a config: a file on disk, or one that comes with the package.

    Args:
        name: path of a file; or a name from the root of this repository
            (``configs/embedded/dinov2_dpt.yaml``, ``projects/DPT/configs/dpt_large_midas.yaml``),
            or from its ``configs`` (``embedded/dinov2_dpt.yaml``).

    Raises:
        FileNotFoundError: if there is none of this name.
    """
    path = find_config(name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {str(name)!r}")
    return path


def find_config(name: str | Path) -> Path:
    """The same, but the path of a file that is nowhere stays as it is."""
    places = (Path(name), SHIPPED / name, SHIPPED / "configs" / name)
    return next((path for path in places if path.is_file()), places[0])
