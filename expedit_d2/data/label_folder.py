"""Folders of label PNGs, whose pixels are class ids, and of images, as data sets."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from .images import image_suffixes, load_labels
from .nearby import candidates, check_mode, check_sizes

__all__ = ["register_folder"]

logger = logging.getLogger(__name__)

_IGNORE = 255
# Modes of a PNG whose pixels are class ids.
_LABEL_MODES = ("L", "P", "1", "I;16")


def register_folder(name: str, folder: Path, given: str) -> None:
    """Register a folder of labels.

    Args:
        name: of the data set.
        folder: of the PNGs.
        given: optional folder of the images.

    Raises:
        FileNotFoundError: if labels or images are missing.
        ValueError: if they have the wrong format, are broken, or do not match each other.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} does not exist")
    labels = _files(folder, (".png",))
    if not labels:
        raise FileNotFoundError(f"the folder {folder} has no PNGs")
    check_mode(next(iter(labels.values())), _LABEL_MODES)
    root, images = _find_images(folder, given, labels)
    records = [
        {"file_name": str(images[key]), "image_id": key, "sem_seg_file_name": str(label)}
        for key, label in labels.items()
    ]
    check_sizes(records, _LABEL_MODES)
    listed = _class_names(folder)
    classes = listed or _count_classes(folder, labels.values())
    DatasetCatalog.register(name, lambda: [dict(record) for record in records])
    MetadataCatalog.get(name).set(
        image_root=str(root),
        sem_seg_root=str(folder),
        evaluator_type="sem_seg",
        ignore_label=_IGNORE,
        stuff_classes=classes,
        counted_classes=listed is None,
    )


def _find_images(
    folder: Path, given: str, labels: Mapping[str, Path]
) -> tuple[Path, dict[str, Path]]:
    """The folder with the images of the labels, and its images by name."""
    near = [folder, folder.parent / "images", folder.parent.parent / "images" / folder.name]
    tried = candidates(folder, given, near)
    for root in tried:
        images = _files(root, image_suffixes(), without=labels.values())
        missing = [str(label) for key, label in labels.items() if key not in images]
        if not missing:
            return root, images
        if len(missing) < len(labels):
            raise FileNotFoundError(
                f"{root} lacks the images of {len(missing)} labels, such as {missing[0]}"
            )
    folders = ", ".join(map(str, tried))
    raise FileNotFoundError(f"no image in {folders} has the name of a label, such as {missing[0]}")


def _files(root: Path, suffixes: Iterable[str], without: Iterable[Path] = ()) -> dict[str, Path]:
    """Files at any depth, except ``without``, by their paths relative to ``root``, no suffix."""
    files = {f for f in root.rglob("*") if f.suffix.lower() in suffixes}
    files = sorted(files.difference(without))
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in files}


def _class_names(folder: Path) -> list[str] | None:
    """Class names listed in ``classes.json`` or ``classes.txt``; None without these."""
    file = folder / "classes.json"
    try:
        if file.is_file():
            names = json.loads(file.read_text())
        else:
            file = folder / "classes.txt"
            if not file.is_file():
                return None
            names = [line.strip() for line in file.read_text().rstrip().splitlines()]
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error})") from error
    listed = isinstance(names, list) and all(isinstance(n, str) for n in names)
    if not listed or not 0 < len(names) <= _IGNORE:
        raise ValueError(f"{file} must list 1 to {_IGNORE} names, starting with class 0")
    return names


def _count_classes(folder: Path, labels: Iterable[Path]) -> list[str]:
    """Numbers as class names, up to the largest id in all files."""
    logger.info("%s has no classes.txt or classes.json: searching for the largest id", folder)
    largest = -1
    for label in labels:
        ids = np.unique(load_labels(label))
        largest = max(largest, *map(int, ids[ids < _IGNORE]), -1)
    if largest < 0:
        raise ValueError(f"no pixel in {folder} has an id below {_IGNORE}")
    return [str(number) for number in range(largest + 1)]
