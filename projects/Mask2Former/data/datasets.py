"""Registers the data sets of official configs that Detectron2 itself does not have.

``coco_2017_{train,val}_panoptic_with_sem_seg``: COCO panoptic, with semantic PNGs, so that one
evaluation gives PQ, AP and mIoU. ``ade20k_panoptic_{train,val}``: ADE20K with its 150 classes.
The files are those that the official preparation scripts make, in the folder of all data sets,
``$DETECTRON2_DATASETS``. Nothing is read before a data set is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES, COCO_CATEGORIES
from detectron2.utils.file_io import PathManager

__all__ = ["load_panoptic", "register_panoptic_datasets"]

# ADE20K classes without instances, by contiguous id.
_ADE20K_STUFF = frozenset(
    (0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59)
    + (60, 61, 63, 68, 77, 79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122)
    + (128, 131, 140, 141, 145)
)


def _class_metadata(categories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metadata of classes that share one range of contiguous ids.

    Names under ``thing_`` are those of the things only, names under ``stuff_`` those of all
    classes, as Detectron2's instance and semantic evaluators want them.
    """
    things = [c for c in categories if c["isthing"]]
    metadata: dict[str, Any] = {
        "thing_classes": [c["name"] for c in things],
        "stuff_classes": [c["name"] for c in categories],
        "thing_dataset_id_to_contiguous_id": {
            c["id"]: i for i, c in enumerate(categories) if c["isthing"]
        },
        "stuff_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
        "ignore_label": 255,
        "label_divisor": 1000,
    }
    if "color" in categories[0]:
        metadata["thing_colors"] = [c["color"] for c in things]
        metadata["stuff_colors"] = [c["color"] for c in categories]
    return metadata


def load_panoptic(name: str) -> list[dict[str, Any]]:
    """Records of a registered panoptic data set, classes made contiguous."""
    meta = MetadataCatalog.get(name)
    classes = meta.stuff_dataset_id_to_contiguous_id
    things = meta.thing_dataset_id_to_contiguous_id
    with PathManager.open(meta.panoptic_json) as file:
        annotations = json.load(file)["annotations"]
    records = []
    for annotation in annotations:
        png = annotation["file_name"]
        segments = [
            {**s, "category_id": classes[s["category_id"]], "isthing": s["category_id"] in things}
            for s in annotation["segments_info"]
        ]
        records.append(
            {
                "file_name": os.path.join(meta.image_root, os.path.splitext(png)[0] + ".jpg"),
                "image_id": annotation["image_id"],
                "pan_seg_file_name": os.path.join(meta.panoptic_root, png),
                "sem_seg_file_name": os.path.join(meta.sem_seg_root, png),
                "segments_info": segments,
            }
        )
    return records


def _register(name: str, root: str, files: Mapping[str, str], **metadata: Any) -> None:
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, partial(load_panoptic, name))
        paths = {key: os.path.join(root, path) for key, path in files.items()}
        MetadataCatalog.get(name).set(**paths, **metadata)


def register_panoptic_datasets(root: str | os.PathLike | None = None) -> None:
    """Register COCO and ADE20K as above; again is harmless.

    Args:
        root: the folder of all data sets; default ``$DETECTRON2_DATASETS`` or ``datasets``.
    """
    root = os.path.expanduser(root or os.getenv("DETECTRON2_DATASETS", "datasets"))
    ade20k = [
        {"id": i, "name": name, "isthing": i not in _ADE20K_STUFF}
        for i, name in enumerate(ADE20K_SEM_SEG_CATEGORIES)
    ]
    for split, folder in (("train", "training"), ("val", "validation")):
        _register(
            f"coco_2017_{split}_panoptic_with_sem_seg",
            root,
            {
                "image_root": f"coco/{split}2017",
                "panoptic_root": f"coco/panoptic_{split}2017",
                "panoptic_json": f"coco/annotations/panoptic_{split}2017.json",
                "sem_seg_root": f"coco/panoptic_semseg_{split}2017",
                "json_file": f"coco/annotations/instances_{split}2017.json",
            },
            evaluator_type="coco_panoptic_seg",
            **_class_metadata(COCO_CATEGORIES),
        )
        _register(
            f"ade20k_panoptic_{split}",
            root,
            {
                "image_root": f"ADEChallengeData2016/images/{folder}",
                "panoptic_root": f"ADEChallengeData2016/ade20k_panoptic_{split}",
                "panoptic_json": f"ADEChallengeData2016/ade20k_panoptic_{split}.json",
                "sem_seg_root": f"ADEChallengeData2016/annotations_detectron2/{folder}",
                "json_file": f"ADEChallengeData2016/ade20k_instance_{split}.json",
            },
            evaluator_type="ade20k_panoptic_seg",
            **_class_metadata(ade20k),
        )
