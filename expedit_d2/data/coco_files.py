"""COCO instance and panoptic files as data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from .coco_checks import instances_problem, panoptic_problem
from .nearby import PANOPTIC_MODES, candidates, check_sizes, find
from .panoptic import class_metadata, load_panoptic, things_path

__all__ = ["register_coco"]


def register_coco(name: str, file: Path, given: str) -> None:
    """Register a COCO file, recognised by its content.

    Args:
        name: of the data set.
        file: the JSON.
        given: ``IMAGES[@PNGS]``, optional folders.

    Raises:
        FileNotFoundError: if the file, images or PNGs are missing.
        ValueError: if they have the wrong format, are broken, or do not match each other.
    """
    content = _read_json(file)
    register = _register_panoptic if _is_panoptic(content) else _register_instances
    register(name, file, content, given)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"the file {file} does not exist")
    try:
        content = json.loads(file.read_text())
        _ = [content["images"][0][key] for key in ("id", "file_name")]
        content["categories"].sort(key=lambda category: (category["id"], category["name"]))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{file} is not a COCO instance or panoptic file with images and categories"
        raise ValueError(problem) from error
    return content


def _is_panoptic(content: Mapping[str, Any]) -> bool:
    annotations = content.get("annotations")
    if not isinstance(annotations, list):
        return False
    return any(isinstance(a, dict) and "segments_info" in a for a in annotations[:1])


def _near(file: Path) -> Iterator[Path]:
    """Candidate folders for the images of a JSON file."""
    here = file.parent
    yield from (here, here / "images", here.parent / "images")
    # COCO: annotations/instances_val2017.json and val2017/.
    yield here.parent / file.stem.rpartition("_")[2]


def _register_instances(name: str, file: Path, content: Mapping[str, Any], given: str) -> None:
    problem = instances_problem(content)
    if problem:
        raise ValueError(f"{file} is not a valid COCO instance file: {problem}")
    files = [image["file_name"] for image in content["images"]]
    images = find("image", files, candidates(file, given, _near(file)))
    records = [
        {"file_name": str(images / i["file_name"]), "height": i["height"], "width": i["width"]}
        for i in content["images"]
    ]
    check_sizes(records, ())
    # Loading the records would set these, but models are built before that.
    categories = content["categories"]
    metadata = {
        "thing_classes": [c["name"] for c in categories],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
    }
    register_coco_instances(name, metadata, str(file), str(images))


def _register_panoptic(name: str, file: Path, content: Mapping[str, Any], given: str) -> None:
    problem = panoptic_problem(content)
    if problem:
        raise ValueError(f"{file} is not a valid COCO panoptic file: {problem}")
    annotations = content["annotations"]
    listed = {image["id"]: image for image in content["images"]}
    files = [listed[a["image_id"]]["file_name"] for a in annotations]
    pngs = [a["file_name"] for a in annotations]
    images, _, png_folder = given.partition("@")
    near_pngs = [file.with_suffix(""), file.parent]
    image_root = find("image", files, candidates(file, images, _near(file)))
    png_root = find("panoptic PNG", pngs, candidates(file, png_folder, near_pngs))
    records = [
        {
            **listed[a["image_id"]],
            "file_name": str(image_root / image),
            "pan_seg_file_name": str(png_root / png),
        }
        for a, image, png in zip(annotations, files, pngs, strict=True)
    ]
    check_sizes(records, PANOPTIC_MODES)
    DatasetCatalog.register(name, partial(load_panoptic, name))
    MetadataCatalog.get(name).set(
        image_root=str(image_root),
        panoptic_json=str(file),
        panoptic_root=str(png_root),
        json_file=things_path(file, png_root),
        evaluator_type="coco_panoptic_seg",
        **class_metadata(content["categories"]),
    )
