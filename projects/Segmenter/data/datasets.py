"""Registers Pascal Context and CamVid; ADE20K and Cityscapes come with Detectron2.

In the folder of all data sets, ``$DETECTRON2_DATASETS``; nothing is read before it is used:

- ``pascal_context_60_{train,val}``: ``pascal_context/VOCdevkit/VOC2010`` with ``JPEGImages``,
  ``SegmentationClassContext`` and ``ImageSets/SegmentationContext/{train,val}.txt``, as Segmenter's
  official preparation lays it out. 59 classes, and background as class 0.
- ``camvid_{train,val}``: ``camvid/{images,labels}/{train,val}``. 11 classes; label 11 is void.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg

__all__ = ["register_semantic_datasets"]

# In the order of the ids in the label files.
_PASCAL_CONTEXT = (
    "background aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus "
    "cabinet car cat ceiling chair cloth computer cow cup curtain dog door fence floor flower "
    "food grass ground horse keyboard light motorbike mountain mouse person plate platform "
    "pottedplant road rock sheep shelves sidewalk sign sky snow sofa table track train tree truck "
    "tvmonitor wall water window wood"
).split()
_CAMVID = "Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist".split()


def _load_pascal_context(root: str, split: str) -> list[dict[str, Any]]:
    names = Path(root, "ImageSets", "SegmentationContext", f"{split}.txt").read_text().split()
    return [
        {
            "file_name": os.path.join(root, "JPEGImages", f"{name}.jpg"),
            "sem_seg_file_name": os.path.join(root, "SegmentationClassContext", f"{name}.png"),
            "image_id": name,
        }
        for name in names
    ]


def _register(name: str, load: Any, classes: list[str], ignore_label: int) -> None:
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(
            stuff_classes=classes, ignore_label=ignore_label, evaluator_type="sem_seg"
        )


def register_semantic_datasets(root: str | os.PathLike | None = None) -> None:
    """Register the data sets above; repeated calls have no effect.

    Args:
        root: the folder of all data sets; default ``$DETECTRON2_DATASETS`` or ``datasets``.
    """
    root = os.path.expanduser(root or os.getenv("DETECTRON2_DATASETS", "datasets"))
    context = os.path.join(root, "pascal_context", "VOCdevkit", "VOC2010")
    for split in ("train", "val"):
        _register(
            f"pascal_context_60_{split}",
            partial(_load_pascal_context, context, split),
            _PASCAL_CONTEXT,
            ignore_label=255,
        )
        labels, images = (os.path.join(root, "camvid", d, split) for d in ("labels", "images"))
        _register(
            f"camvid_{split}",
            partial(load_sem_seg, labels, images),
            _CAMVID,
            ignore_label=len(_CAMVID),
        )
