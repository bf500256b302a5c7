"""The origin of a result: digests of code and of data, so that results are never confused."""

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

#: Packages whose versions numbers depend on.
_LIBRARIES = (
    "detectron2",
    "numpy",
    "pycocotools",
    "segment-anything",
    "timm",
    "torch",
    "torchvision",
    "transformers",
)
#: Folders in a data set's metadata with labels that no record names: Cityscapes' evaluators.
_LABEL_FOLDERS = ("gt_dir",)


@cache
def versions() -> dict[str, str]:
    """Of the libraries that numbers depend on."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def code_digest(paths: Iterable[Path]) -> str:
    """Digest of Python files, and of all Python files in folders with their paths there."""
    found = []
    for path in sorted(set(paths)):
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        found += [(file.relative_to(path.parent).as_posix(), file_digest(file)) for file in files]
    return fingerprint(found)


def sources(definitions: Iterable[type | Callable[..., Any]]) -> set[Path]:
    """Where classes and functions are defined: files, or folders of packages.

    A file in a package that is not installed counts as the whole package, because its other files
    are as likely to change. This package's own are left out: they always count.
    """
    found = set()
    for definition in definitions:
        if definition.__module__.partition(".")[0] == __name__.partition(".")[0]:
            continue
        try:
            file = Path(inspect.getsourcefile(definition) or "")
        except (TypeError, OSError):
            continue  # built in, or typed into a console
        if not file.is_file():
            continue
        depth = definition.__module__.count(".") + (file.name == "__init__.py")
        installed = {"site-packages", "dist-packages"} & set(file.parts)
        found.add(file.parents[depth - 1] if depth and not installed else file)
    return found


def data_digest(
    records: Sequence[Mapping[str, Any]], metadatas: Sequence[Mapping[str, Any]]
) -> str:
    """Digest of records with their labels, of metadata of data sets, and of all files they name."""
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
