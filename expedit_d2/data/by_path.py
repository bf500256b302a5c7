"""Data sets by path: what ``DATASETS.TRAIN`` and ``DATASETS.TEST`` may say besides names.

One spelling for all of them, the labels first::

    LABELS[@IMAGES[@PNGS]]

- ``instances.json`` or ``instances.json@images``: a COCO instance file;
- ``panoptic.json``, ``panoptic.json@images`` or ``panoptic.json@images@pngs``: a COCO panoptic
  file, told by its content; ``panoptic.json@@pngs`` leaves the images to be found;
- ``labels`` or ``labels@images``: a folder of PNGs, at any depth, whose pixels are class ids, 255
  ignored, and of images under the same names. The classes are those of ``classes.txt`` (a name a
  line) or ``classes.json`` (a list of names) in it, or as many as the largest id says.

Folders that are not given are looked for near the labels, in COCO's layout and others; those that
are may start from the folder of the labels.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from .panoptic import class_metadata, load_panoptic, things_path

__all__ = ["register_by_path"]

logger = logging.getLogger(__name__)

_VALID = (
    "valid are a registered name, `instances.json[@images]`, `panoptic.json[@images[@pngs]]` or "
    "`label_folder[@images]`, each a path"
)
_IGNORE = 255
_IMAGES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"))


def register_by_path(names: Sequence[str]) -> None:
    """Registers every name that is a path in one of the spellings above.

    Panoptic records have ``pan_seg_file_name``, ``segments_info`` and ``sem_seg_file_name``, the
    last one drawn on the fly; their metadata give PQ, mask AP (of the things) and mIoU. Names
    that are registered already, or that are no path, are left alone: a path is a name that ends
    in ``.json``, contains ``@`` or is a folder.

    Args:
        names: the values of ``DATASETS.TRAIN`` or ``DATASETS.TEST``.

    Raises:
        FileNotFoundError: when the labels, or the first image or PNG, are not there.
        ValueError: when they are of another format.
    """
    for name in names:
        if name in DatasetCatalog.list():
            continue
        labels, given = _split(name)
        if labels is None:
            continue
        if labels.suffix == ".json":
            content = _read_json(name, labels)
            register = _register_panoptic if _is_panoptic(content) else _register_instances
            register(name, labels, content, given)
        else:
            _register_folder(name, labels, given)


def _split(name: str) -> tuple[Path | None, str]:
    """Labels, None when the name is no path, and what follows the first ``@`` behind them."""
    if ".json@" in name:
        file, given = name.split(".json@", 1)
        return Path(file + ".json").expanduser(), given
    whole = Path(name).expanduser()
    if name.endswith(".json") or whole.is_dir():
        return whole, ""
    folder, at, given = name.partition("@")
    return (Path(folder).expanduser() if at else None), given


def _message(name: str, problem: str) -> str:
    return f"DATASETS.TEST or DATASETS.TRAIN names {name!r}, but {problem}; {_VALID}"


def _candidates(labels: Path, given: str, near: Iterable[Path]) -> list[Path]:
    """The given folder, from here or from that of the labels, else those near the labels."""
    if not given:
        return list(near)
    return list(dict.fromkeys([Path(given).expanduser(), labels.parent / given]))


def _find(name: str, what: str, first: str, folders: Sequence[Path]) -> Path:
    """The first folder that holds the file ``first``."""
    for folder in folders:
        if (folder / first).is_file():
            return folder
    raise FileNotFoundError(
        _message(name, f"its first {what} {first} is not in {', '.join(map(str, folders))}")
    )


# ---------------------------------------------------------------------------------- COCO files


def _read_json(name: str, file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(_message(name, f"the file {file} does not exist"))
    try:
        content = json.loads(file.read_text())
        _ = [content["images"][0][key] for key in ("id", "file_name")]
        content["categories"].sort(key=lambda category: (category["id"], category["name"]))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        problem = f"{file} is no COCO instance file or panoptic file with images and categories"
        raise ValueError(_message(name, problem)) from error
    return content


def _is_panoptic(content: Mapping[str, Any]) -> bool:
    return any("segments_info" in a for a in content.get("annotations", ())[:1])


def _near(file: Path) -> Iterator[Path]:
    """Where the images of a JSON file may be."""
    here = file.parent
    yield from (here, here / "images", here.parent / "images")
    # COCO: annotations/instances_val2017.json and val2017/.
    yield here.parent / file.stem.rpartition("_")[2]


def _register_instances(name: str, file: Path, content: Mapping[str, Any], given: str) -> None:
    images = _find(
        name, "image", content["images"][0]["file_name"], _candidates(file, given, _near(file))
    )
    # Loading the records tells the same, but models are built before that.
    categories = content["categories"]
    metadata = {
        "thing_classes": [c["name"] for c in categories],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
    }
    register_coco_instances(name, metadata, str(file), str(images))


def _register_panoptic(name: str, file: Path, content: Mapping[str, Any], given: str) -> None:
    problem = _problem(content)
    if problem:
        raise ValueError(_message(name, f"{file} is no COCO panoptic file: {problem}"))
    first = content["annotations"][0]
    image = next(i["file_name"] for i in content["images"] if i["id"] == first["image_id"])
    images, _, pngs = given.partition("@")
    beside = [file.with_suffix(""), file.parent]
    image_root = _find(name, "image", image, _candidates(file, images, _near(file)))
    png_root = _find(name, "panoptic PNG", first["file_name"], _candidates(file, pngs, beside))
    DatasetCatalog.register(name, partial(load_panoptic, name))
    MetadataCatalog.get(name).set(
        image_root=str(image_root),
        panoptic_json=str(file),
        panoptic_root=str(png_root),
        json_file=things_path(file, png_root),
        evaluator_type="coco_panoptic_seg",
        **class_metadata(content["categories"]),
    )


def _problem(content: Mapping[str, Any]) -> str | None:
    """What evaluation would stumble over only at its end."""
    for category in content["categories"]:
        if "isthing" not in category:
            return f"the category {category['name']!r} has no 'isthing'"
    classes = {c["id"] for c in content["categories"]}
    images = {image["id"]: image["file_name"] for image in content["images"]}
    seen: set[str] = set()
    for annotation in content["annotations"]:
        image_id = annotation.get("image_id")
        if image_id not in images:
            return f"an annotation has image_id {image_id!r}, which is not among the images"
        for segment in annotation["segments_info"]:
            for key in ("id", "category_id", "area", "iscrowd"):
                if key not in segment:
                    return f"a segment of image {image_id!r} has no {key!r}"
            if segment["category_id"] not in classes:
                return (
                    f"a segment of image {image_id!r} has category_id {segment['category_id']!r}, "
                    "which is not among the categories"
                )
        # Detectron2 writes predictions under these names, into one folder.
        stem = Path(images[image_id]).stem
        if stem in seen:
            return f"two annotations are of images that are named {stem!r}"
        seen.add(stem)
    return None


# ----------------------------------------------------------------------------- folders of labels


def _register_folder(name: str, folder: Path, given: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(_message(name, f"the folder {folder} does not exist"))
    labels = _files(folder, (".png",))
    if not labels:
        raise FileNotFoundError(_message(name, f"there is no PNG in the folder {folder}"))
    first = next(iter(labels.values()))
    with Image.open(first) as image:
        if len(image.getbands()) > 1:
            problem = f"{first} has colours ({image.mode}), where pixels must be class ids"
            raise ValueError(_message(name, problem))
    root, images = _find_images(name, folder, given, labels)
    records = [
        {"file_name": str(images[key]), "image_id": key, "sem_seg_file_name": str(label)}
        for key, label in labels.items()
    ]
    classes = _class_names(name, folder) or _count_classes(name, folder, labels.values())
    DatasetCatalog.register(name, lambda: [dict(record) for record in records])
    MetadataCatalog.get(name).set(
        image_root=str(root),
        sem_seg_root=str(folder),
        evaluator_type="sem_seg",
        ignore_label=_IGNORE,
        stuff_classes=classes,
    )


def _find_images(
    name: str, folder: Path, given: str, labels: Mapping[str, Path]
) -> tuple[Path, dict[str, Path]]:
    """The folder that has the images of the labels, and what is in it."""
    near = [folder, folder.parent / "images", folder.parent.parent / "images" / folder.name]
    tried = _candidates(folder, given, near)
    for root in tried:
        images = _files(root, _IMAGES, without=labels.values())
        missing = [str(label) for key, label in labels.items() if key not in images]
        if not missing:
            return root, images
        if len(missing) < len(labels):
            problem = f"{root} has no image of {len(missing)} labels, {missing[0]} for one"
            raise FileNotFoundError(_message(name, problem))
    problem = f"no image in {', '.join(map(str, tried))} is named as a label, {missing[0]} for one"
    raise FileNotFoundError(_message(name, problem))


def _files(root: Path, suffixes: Iterable[str], without: Iterable[Path] = ()) -> dict[str, Path]:
    """Files at any depth, but for some, by their paths from ``root`` without suffix."""
    files = {f for f in root.rglob("*") if f.suffix.lower() in suffixes}
    files = sorted(files.difference(without))
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in files}


def _class_names(name: str, folder: Path) -> list[str] | None:
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
        raise ValueError(_message(name, f"{file} cannot be read ({error})")) from error
    listed = isinstance(names, list) and all(isinstance(n, str) for n in names)
    if not listed or not 0 < len(names) <= _IGNORE:
        problem = f"{file} does not list 1 to {_IGNORE} names, the first that of class 0"
        raise ValueError(_message(name, problem))
    return names


def _count_classes(name: str, folder: Path, labels: Iterable[Path]) -> list[str]:
    """Numbers for names, up to the largest id of all files."""
    logger.info("%s has no classes.txt or classes.json: looking for the largest id", folder)
    largest = -1
    for label in labels:
        with Image.open(label) as image:
            ids = np.unique(np.asarray(image))
        largest = max(largest, *map(int, ids[ids < _IGNORE]), -1)
    if largest < 0:
        raise ValueError(_message(name, f"no pixel in {folder} has an id below {_IGNORE}"))
    return [str(number) for number in range(largest + 1)]
