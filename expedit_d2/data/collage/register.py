"""Register the embedded data set "collage" with Detectron2.

``register_collage()`` adds ``collage_train`` and ``collage_val``, and ``collage_448_train`` and
``collage_448_val``; each is written when it is first read.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..panoptic import class_metadata, contiguous_segments
from .definition import DEPTH_SCALE, LARGE_COUNTS, LARGE_SIZE, SIZE, SPLITS, categories
from .write import Counts, collage_folder, write_collage


def _collage_metadata(folder: Path, split: str) -> dict:
    """Metadata for Detectron2's COCO, panoptic and semantic evaluators."""
    annotations = folder / "annotations"
    return {
        **class_metadata(categories()),
        "json_file": str(annotations / f"instances_{split}.json"),
        "image_root": str(folder / split),
        "panoptic_json": str(annotations / f"panoptic_{split}.json"),
        "panoptic_root": str(folder / f"panoptic_{split}"),
        "sem_seg_root": str(folder / f"semantic_{split}"),
        "depth_root": str(folder / f"depth_{split}"),
        "depth_scale": DEPTH_SCALE,
        "evaluator_type": "coco_panoptic_seg",
    }


def _load_collage(name: str) -> list[dict]:
    """Dataset dicts from the files in the metadata of ``name``."""
    meta = MetadataCatalog.get(name)
    records = load_coco_json(meta.json_file, meta.image_root, name)
    panoptic = json.loads(Path(meta.panoptic_json).read_text())["annotations"]
    segments = {a["image_id"]: a["segments_info"] for a in panoptic}
    for record in records:
        file = os.path.basename(record["file_name"])
        record["sem_seg_file_name"] = os.path.join(meta.sem_seg_root, file)
        record["pan_seg_file_name"] = os.path.join(meta.panoptic_root, file)
        record["depth_file_name"] = os.path.join(meta.depth_root, file)
        record["segments_info"] = contiguous_segments(segments[record["image_id"]], meta)
    return records


def register_collage(
    root: str | os.PathLike | None = None,
    counts: Counts | None = None,
    size: tuple[int, int] | None = None,
    name: str = "collage",
) -> None:
    """Register ``<name>_train`` and ``<name>_val``; repeated calls have no effect.

    Without arguments, also ``collage_448_train`` and ``collage_448_val``: the same scenes at 448 x
    448 pixels, 1200 and 200 of them.

    The files of a split are written when it is first read (``DatasetCatalog.get``). Records have
    ``annotations`` (run-length masks: set ``INPUT.MASK_FORMAT`` to "bitmask"),
    ``sem_seg_file_name``, ``pan_seg_file_name``, ``segments_info`` and ``depth_file_name`` (16-bit
    PNG, in units of 1 / ``depth_scale`` metres, see the metadata).

    Args:
        root: the folder of all data sets; default ``$DETECTRON2_DATASETS`` or ``datasets``.
        counts: number of scenes of "train" and "val", or the numbers of those that are wanted, in
            the order of the images; default 2000 and 200.
        size: (height, width) in pixels; default 256 x 256.
        name: prefix of the two names; must be unique for each root, counts and size.

    Raises:
        ValueError: if arguments are given and the names are registered for another folder.
    """
    given = not (root is None and counts is None and size is None)
    if not given and name == "collage":
        _register("collage_448", None, LARGE_COUNTS, LARGE_SIZE, check=False)
    _register(name, root, counts, SIZE if size is None else size, check=given)


def _register(
    name: str,
    root: str | os.PathLike | None,
    counts: Counts | None,
    size: tuple[int, int],
    check: bool,
) -> None:
    """Register one size; ``check`` refuses names that are registered for another folder."""
    folder = collage_folder(root, counts, size)
    for split in SPLITS:
        full_name = f"{name}_{split}"
        metadata = _collage_metadata(folder, split)
        if full_name not in DatasetCatalog.list():
            DatasetCatalog.register(
                full_name,
                _CollageLoader(full_name, folder.parent, counts=counts, size=size, splits=[split]),
            )
            MetadataCatalog.get(full_name).set(**metadata)
        elif check and MetadataCatalog.get(full_name).get("json_file") != metadata["json_file"]:
            raise ValueError(
                f"The data set {full_name} is already registered from "
                f"{MetadataCatalog.get(full_name).get('image_root')}, not {folder}; "
                "choose another `name`."
            )


class _CollageLoader:
    """Loads one split for the catalog, after writing it if it is missing."""

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.name, self.write = name, partial(write_collage, *args, **kwargs)

    def __call__(self) -> list[dict]:
        self.write()
        return _load_collage(self.name)
