"""Digests of the code and data that a result depends on, so that results are never confused."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ..data.content import file_digest
from .store import fingerprint

__all__ = ["code_digest", "data_digest", "sources", "versions"]

#: Packages whose versions affect results.
_LIBRARIES = (
    "detectron2",
    "fvcore",
    "numpy",
    "pillow",
    "pycocotools",
    "segment-anything",
    "timm",
    "torch",
    "torchvision",
    "transformers",
)
#: Metadata keys of folders with labels that are not in records, for Cityscapes' evaluators.
_LABEL_FOLDERS = ("gt_dir",)


@cache
def versions() -> dict[str, str]:
    """Versions of the libraries that affect results; "" if not installed."""
    installed = {}
    for name in _LIBRARIES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = ""
    return installed


def code_digest(paths: Iterable[Path]) -> str:
    """Digest of Python files, and of all Python files in folders with their relative paths."""
    digests = []
    for path in sorted(set(paths)):
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        digests += [(file.relative_to(path.parent).as_posix(), file_digest(file)) for file in files]
    return fingerprint(digests)


def sources(definitions: Iterable[type | Callable[..., Any]]) -> set[Path]:
    """Source files of classes and functions, or folders of their packages.

    A file of a package that is not installed stands for the whole package, as its other files may
    change too. Files of this package are omitted, as they always count.
    """
    paths = set()
    for definition in definitions:
        if definition.__module__.partition(".")[0] == __name__.partition(".")[0]:
            continue
        try:
            file = Path(inspect.getsourcefile(definition) or "")
        except (TypeError, OSError):
            continue  # built in, or defined interactively
        if not file.is_file():
            continue
        depth = definition.__module__.count(".") + (file.name == "__init__.py")
        installed = {"site-packages", "dist-packages"} & set(file.parts)
        paths.add(file.parents[depth - 1] if depth and not installed else file)
    return paths


def data_digest(
    records: Sequence[Mapping[str, Any]], metadatas: Sequence[Mapping[str, Any]]
) -> str:
    """Digest of records and metadata of data sets, and of all files that they name."""
    folders = [Path(meta[key]) for meta in metadatas for key in _LABEL_FOLDERS if key in meta]
    labels = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    files = [_file(label) for label in labels]
    return fingerprint(_with_files(records), _with_files(metadatas), files)


def _with_files(items: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [
        [item, [_file(value) for _, value in sorted(item.items()) if _is_file(value)]]
        for item in items
    ]


def _is_file(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and os.path.isfile(value)


def _file(path: str | os.PathLike) -> tuple[str, str]:
    return os.path.realpath(path), file_digest(path)
