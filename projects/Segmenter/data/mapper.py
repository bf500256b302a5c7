"""Training samples for semantic segmentation: resize, crop, colour, flip, pad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from expedit_d2.data.classes import check_ids
from expedit_d2.data.color import ColorAugSSD
from expedit_d2.data.images import load_labels

__all__ = [
    "ResizeToFit",
    "SemanticMapper",
    "build_test_mapper",
    "build_train_mapper",
    "fitted_size",
]

_PAD_VALUE = 128


def fitted_size(size: tuple[int, int], shorter: int, longer: int) -> tuple[int, int]:
    """(H, W) of an image scaled as far as its sides' limits, ``shorter`` and ``longer``, allow.

    The official rule scales, and so rounds, once; Detectron2's `ResizeShortestEdge` scales a second
    time if the longer side is the limit, and may then be a pixel off.
    """
    scale = min(longer / max(size), shorter / min(size))
    height, width = (int(side * scale + 0.5) for side in size)
    return height, width


class ResizeToFit(T.Augmentation):
    """Resize an image to its `fitted_size`; ``shorter`` 0 leaves it as it is."""

    def __init__(self, shorter: int, longer: int) -> None:
        super().__init__()
        self.shorter, self.longer = shorter, longer

    def get_transform(self, image: np.ndarray) -> T.Transform:
        size = image.shape[:2]
        if not self.shorter:
            return T.NoOpTransform()
        return T.ResizeTransform(*size, *fitted_size(size, self.shorter, self.longer))


def build_test_mapper(cfg: CfgNode) -> DatasetMapper:
    """Detectron2's mapper with the official resizing."""
    resize = ResizeToFit(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return DatasetMapper(cfg, is_train=False, augmentations=[resize])


def _augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Augmentations of ``INPUT``, in the official order; smaller crops are padded to one size."""
    node, ignore = cfg.INPUT, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    augmentations: list[T.Augmentation] = [
        T.ResizeShortestEdge(node.MIN_SIZE_TRAIN, node.MAX_SIZE_TRAIN, node.MIN_SIZE_TRAIN_SAMPLING)
    ]
    if node.CROP.ENABLED:
        augmentations.append(
            T.RandomCrop_CategoryAreaConstraint(
                node.CROP.TYPE, node.CROP.SIZE, node.CROP.SINGLE_CATEGORY_MAX_AREA, ignore
            )
        )
    if node.COLOR_AUG_SSD:
        augmentations.append(ColorAugSSD(node.FORMAT))
    if node.RANDOM_FLIP != "none":
        vertical = node.RANDOM_FLIP == "vertical"
        augmentations.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
    if node.CROP.ENABLED and node.CROP.TYPE == "absolute":
        augmentations.append(
            T.FixedSizeCrop(node.CROP.SIZE, pad_value=_PAD_VALUE, seg_pad_value=ignore)
        )
    return augmentations


class SemanticMapper:
    """Reads and augments the image and labels of a record.

    Unlike Detectron2's `DatasetMapper`, it resizes before it crops, and reads palette PNGs as ids.
    """

    def __init__(
        self,
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        classes: int | None = None,
        ignore_label: int = 255,
    ) -> None:
        """
        Args:
            augmentations: applied in this order.
            image_format: "RGB" or "BGR".
            classes: number of the model's classes; other labels are refused. None: no check.
            ignore_label: of pixels without a class.
        """
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.classes = classes
        self.ignore_label = ignore_label

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A training sample: ``image`` uint8 (3, H, W) and ``sem_seg`` long (H, W).

        Raises:
            ValueError: if the record has no ``sem_seg_file_name``, or labels that are not classes.
        """
        if "sem_seg_file_name" not in record:
            raise ValueError(
                f"DATASETS.TRAIN: semantic segmentation needs records with 'sem_seg_file_name', "
                f"the one of {record['file_name']!r} has {sorted(record)}"
            )
        image = utils.read_image(record["file_name"], format=self.image_format)
        labels = load_labels(record["sem_seg_file_name"])
        if self.classes is not None:
            file = record["sem_seg_file_name"]
            check_ids(file, labels, self.classes, self.ignore_label, "the model")
        if labels.dtype != np.uint8:  # which Detectron2 resizes as floats only
            labels = labels.astype(np.float64)
        augmented = T.AugInput(image, sem_seg=labels)
        self.augmentations(augmented)
        pixels = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        return {
            "file_name": record["file_name"],
            "image": torch.from_numpy(pixels),
            "sem_seg": torch.from_numpy(augmented.sem_seg.astype(np.int64)),
        }


def build_train_mapper(cfg: CfgNode) -> SemanticMapper:
    """The training mapper with the augmentations of the config.

    Raises:
        ValueError: if a data set and the model ignore different labels.
    """
    head = cfg.MODEL.SEM_SEG_HEAD
    for name in cfg.DATASETS.TRAIN:
        ignored = MetadataCatalog.get(name).get("ignore_label", head.IGNORE_VALUE)
        if ignored != head.IGNORE_VALUE:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE must be {ignored}, that of {name!r}, got "
                f"{head.IGNORE_VALUE}"
            )
    return SemanticMapper(
        _augmentations(cfg), cfg.INPUT.FORMAT, head.NUM_CLASSES, head.IGNORE_VALUE
    )
