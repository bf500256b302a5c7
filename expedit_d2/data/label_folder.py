"""A folder of PNGs whose pixels are class ids, and of images, as a data set."""

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
        given: folder of the images, which may be left out.

    Raises:
        FileNotFoundError: when labels or images are not there.
        ValueError: when they are of another format, broken, or do not fit each other.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} does not exist")
    labels = _files(folder, (".png",))
    if not labels:
        raise FileNotFoundError(f"there is no PNG in the folder {folder}")
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
    """The folder that has the images of the labels, and what is in it."""
    near = [folder, folder.parent / "images", folder.parent.parent / "images" / folder.name]
    tried = candidates(folder, given, near)
    for root in tried:
        images = _files(root, image_suffixes(), without=labels.values())
        missing = [str(label) for key, label in labels.items() if key not in images]
        if not missing:
            return root, images
        if len(missing) < len(labels):
            problem = f"{root} has no image of {len(missing)} labels, {missing[0]} for one"
            raise FileNotFoundError(problem)
    problem = f"no image in {', '.join(map(str, tried))} is named as a label, {missing[0]} for one"
    raise FileNotFoundError(problem)


def _files(root: Path, suffixes: Iterable[str], without: Iterable[Path] = ()) -> dict[str, Path]:
    """Files at any depth, but for some, by their paths from ``root`` without suffix."""
    files = {f for f in root.rglob("*") if f.suffix.lower() in suffixes}
    files = sorted(files.difference(without))
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in files}


def _class_names(folder: Path) -> list[str] | None:
    """Names that ``classes.json`` or ``classes.txt`` lists."""
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
        problem = f"{file} does not list 1 to {_IGNORE} names, the first that of class 0"
        raise ValueError(problem)
    return names


def _count_classes(folder: Path, labels: Iterable[Path]) -> list[str]:
    """Numbers for names, up to the largest id of all files."""
    logger.info("%s has no classes.txt or classes.json: looking for the largest id", folder)
    largest = -1
    for label in labels:
        ids = np.unique(load_labels(label))
        largest = max(largest, *map(int, ids[ids < _IGNORE]), -1)
    if largest < 0:
        raise ValueError(f"no pixel in {folder} has an id below {_IGNORE}")
    return [str(number) for number in range(largest + 1)]
