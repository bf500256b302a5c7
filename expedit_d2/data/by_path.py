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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from .coco_checks import instances_problem, panoptic_problem
from .images import DataError, load_labels, read_header
from .mapper import size_problem
from .panoptic import class_metadata, load_panoptic, things_path

__all__ = ["register_by_path"]

logger = logging.getLogger(__name__)

_VALID = (
    "valid are a registered name, `instances.json[@images]`, `panoptic.json[@images[@pngs]]` or "
    "`label_folder[@images]`, each a path"
)
_IGNORE = 255
_IMAGES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"))
# Files whose headers are read at once, spread over the data set; mappers check all of them again.
_CHECKED = 5000
# Modes of a PNG whose pixels are class ids, and of one whose colours are segment ids.
_LABEL_MODES = ("L", "P", "1", "I;16")
_PANOPTIC_MODES = ("RGB", "RGBA")


def register_by_path(names: Sequence[str], key: str = "DATASETS.TEST or DATASETS.TRAIN") -> None:
    """Registers every name that is a path in one of the spellings above.

    Panoptic records have ``pan_seg_file_name``, ``segments_info`` and ``sem_seg_file_name``, the
    last one drawn on the fly; their metadata give PQ, mask AP (of the things) and mIoU. Metadata of
    a folder have ``counted_classes``, true where nothing lists its classes. Names that are
    registered already, or that are no path, are left alone: a path is a name that ends in
    ``.json``, contains ``@`` or is a folder.

    Files are checked as far as that takes no time: all of a JSON file's content, that every image
    and label is there, and the sizes in their headers.

    Args:
        names: the values of ``DATASETS.TRAIN`` or ``DATASETS.TEST``.
        key: of the config, for messages.

    Raises:
        FileNotFoundError: when labels, images or PNGs are not there.
        ValueError: when they are of another format, broken, or do not fit each other.
    """
    for name in names:
        if name in DatasetCatalog.list():
            continue
        labels, given = _split(name)
        if labels is None:
            continue
        try:
            if labels.suffix == ".json":
                content = _read_json(labels)
                register = _register_panoptic if _is_panoptic(content) else _register_instances
                register(name, labels, content, given)
            else:
                _register_folder(name, labels, given)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{key} names {name!r}, but {error}; {_VALID}") from error
        except ValueError as error:
            raise ValueError(f"{key} names {name!r}, but {error}") from error


def _split(name: str) -> tuple[Path | None, str]:
    """Labels, None when the name is no path, and what follows the first ``@`` after them."""
    if ".json@" in name:
        file, given = name.split(".json@", 1)
        return Path(file + ".json").expanduser(), given
    whole = Path(name).expanduser()
    if name.endswith(".json") or whole.is_dir():
        return whole, ""
    folder, at, given = name.partition("@")
    return (Path(folder).expanduser() if at else None), given


def _candidates(labels: Path, given: str, near: Iterable[Path]) -> list[Path]:
    """The given folder, from here or from that of the labels, else those near the labels."""
    if not given:
        return list(near)
    return list(dict.fromkeys([Path(given).expanduser(), labels.parent / given]))


def _find(what: str, files: Sequence[str], folders: Sequence[Path]) -> Path:
    """The first folder that holds the first file; the others must be there as well."""
    for folder in folders:
        if (folder / files[0]).is_file():
            missing = [file for file in files if not (folder / file).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{len(missing)} of its {len(files)} {what}s are not in {folder}, {missing[0]} "
                    "for one"
                )
            return folder
    raise FileNotFoundError(f"its first {what} {files[0]} is not in {', '.join(map(str, folders))}")


def _check_sizes(records: Sequence[Mapping[str, Any]], modes: Collection[str]) -> None:
    """By the headers of images and labels; ``modes`` are those that labels may have."""
    step = -(-len(records) // _CHECKED) or 1
    for record in records[::step]:
        for key in ("sem_seg_file_name", "pan_seg_file_name"):
            if key in record:
                _check_mode(record[key], modes)
        problem = size_problem(record)
        if problem:
            raise DataError(problem)


def _check_mode(file: str | Path, modes: Collection[str]) -> None:
    mode = read_header(file).mode
    if mode not in modes:
        if modes is _PANOPTIC_MODES:
            raise DataError(f"{file} has no colours (mode {mode}), which must be segment ids")
        raise DataError(f"{file} has colours ({mode}), where pixels must be class ids")


# ---------------------------------------------------------------------------------- COCO files


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"the file {file} does not exist")
    try:
        content = json.loads(file.read_text())
        _ = [content["images"][0][key] for key in ("id", "file_name")]
        content["categories"].sort(key=lambda category: (category["id"], category["name"]))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{file} is no COCO instance file or panoptic file with images and categories"
        raise ValueError(problem) from error
    return content


def _is_panoptic(content: Mapping[str, Any]) -> bool:
    annotations = content.get("annotations")
    if not isinstance(annotations, list):
        return False
    return any(isinstance(a, dict) and "segments_info" in a for a in annotations[:1])


def _near(file: Path) -> Iterator[Path]:
    """Where the images of a JSON file may be."""
    here = file.parent
    yield from (here, here / "images", here.parent / "images")
    # COCO: annotations/instances_val2017.json and val2017/.
    yield here.parent / file.stem.rpartition("_")[2]


def _register_instances(name: str, file: Path, content: Mapping[str, Any], given: str) -> None:
    problem = instances_problem(content)
    if problem:
        raise ValueError(f"{file} is no COCO instance file: {problem}")
    files = [image["file_name"] for image in content["images"]]
    images = _find("image", files, _candidates(file, given, _near(file)))
    records = [
        {"file_name": str(images / i["file_name"]), "height": i["height"], "width": i["width"]}
        for i in content["images"]
    ]
    _check_sizes(records, ())
    # Loading the records tells the same, but models are built before that.
    categories = content["categories"]
    metadata = {
        "thing_classes": [c["name"] for c in categories],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
    }
    register_coco_instances(name, metadata, str(file), str(images))


def _register_panoptic(name: str, file: Path, content: Mapping[str, Any], given: str) -> None:
    problem = panoptic_problem(content)
    if problem:
        raise ValueError(f"{file} is no COCO panoptic file: {problem}")
    annotations = content["annotations"]
    listed = {image["id"]: image for image in content["images"]}
    files = [listed[a["image_id"]]["file_name"] for a in annotations]
    pngs = [a["file_name"] for a in annotations]
    images, _, png_folder = given.partition("@")
    beside = [file.with_suffix(""), file.parent]
    image_root = _find("image", files, _candidates(file, images, _near(file)))
    png_root = _find("panoptic PNG", pngs, _candidates(file, png_folder, beside))
    records = [
        {
            **listed[a["image_id"]],
            "file_name": str(image_root / image),
            "pan_seg_file_name": str(png_root / png),
        }
        for a, image, png in zip(annotations, files, pngs, strict=True)
    ]
    _check_sizes(records, _PANOPTIC_MODES)
    DatasetCatalog.register(name, partial(load_panoptic, name))
    MetadataCatalog.get(name).set(
        image_root=str(image_root),
        panoptic_json=str(file),
        panoptic_root=str(png_root),
        json_file=things_path(file, png_root),
        evaluator_type="coco_panoptic_seg",
        **class_metadata(content["categories"]),
    )


# ----------------------------------------------------------------------------- folders of labels


def _register_folder(name: str, folder: Path, given: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} does not exist")
    labels = _files(folder, (".png",))
    if not labels:
        raise FileNotFoundError(f"there is no PNG in the folder {folder}")
    _check_mode(next(iter(labels.values())), _LABEL_MODES)
    root, images = _find_images(folder, given, labels)
    records = [
        {"file_name": str(images[key]), "image_id": key, "sem_seg_file_name": str(label)}
        for key, label in labels.items()
    ]
    _check_sizes(records, _LABEL_MODES)
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
    tried = _candidates(folder, given, near)
    for root in tried:
        images = _files(root, _IMAGES, without=labels.values())
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
