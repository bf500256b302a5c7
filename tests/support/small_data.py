"""Parts of a small COCO file, and what a test changes in it."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from expedit_d2.projects import get_cfg
from support.repository import MASK2FORMER, SEGMENTER, VITDET

CONFIGS = {"mask2former": MASK2FORMER, "segmenter": SEGMENTER, "vitdet": VITDET}


def box_mask(height: int = 20, width: int = 30) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[3:9, 2:12] = 1
    return mask


def compressed(mask: np.ndarray) -> dict[str, Any]:
    code = mask_util.encode(np.asfortranarray(mask))
    return {"size": code["size"], "counts": code["counts"].decode()}


def annotation(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": number,
        "category_id": 5,
        "bbox": [2, 3, 10, 6],
        "area": 60,
        "iscrowd": 0,
        "segmentation": [[2, 3, 12, 3, 12, 9]],
    } | changes


def put(key: str, value: Any, where: str = "annotations", index: int = 1):
    """Changes one value of the second annotation, or of another item."""

    def change(content: dict) -> None:
        content[where][index][key] = value

    return change


def tiny_config(name: str, dataset: str, **values: Any):
    """A small model's config, tested and trained on a data set."""
    cfg = get_cfg()
    cfg.merge_from_file(CONFIGS[name])
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN = (dataset,)
    for key, value in values.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg
