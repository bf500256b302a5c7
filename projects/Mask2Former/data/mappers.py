"""Training mappers: from a data set's record to an image and the masks of its segments.

One mapper for all tasks. What differs is where the masks come from (annotations, a panoptic PNG, a
semantic PNG) and how images are augmented; `MAPPERS` has the official names.

Shorthand: H x W pixels, G segments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Instances, polygons_to_bitmask
from panopticapi.utils import rgb2id
from torch import Tensor

from expedit_d2.data.classes import check_ids
from expedit_d2.data.color import ColorAugSSD
from expedit_d2.data.images import load_labels

__all__ = ["MAPPERS", "MaskFormerMapper", "build_mapper", "read_segments"]

Record = Mapping[str, Any]
# Class and bool mask (H, W) of every segment.
Segments = list[tuple[int, np.ndarray]]

_PAD_VALUE = 128
_IGNORE = 255
# Keys that only the mapper needs, and that would be costly to send between processes.
_CONSUMED = ("annotations", "segments_info", "sem_seg_file_name", "pan_seg_file_name")


# ------------------------------------------------------------------------------ records to masks


def _require(record: Record, key: str, task: str) -> Any:
    if key not in record:
        raise ValueError(
            f"INPUT.DATASET_MAPPER_NAME: {task} segmentation needs records with {key!r}, the one "
            f"of {record.get('file_name')!r} has {sorted(record)}"
        )
    return record[key]


def _read_ids(record: Record) -> np.ndarray:
    """Raw panoptic PNG, uint8 (H, W, 3), for `rgb2id`."""
    return utils.read_image(_require(record, "pan_seg_file_name", "panoptic"), "RGB")


def _read_classes(record: Record) -> np.ndarray:
    """Semantic PNG, (H, W)."""
    labels = load_labels(_require(record, "sem_seg_file_name", "semantic"))
    # Detectron2 resizes uint8 with Pillow, like the image, and other dtypes only as floats.
    return labels if labels.dtype == np.uint8 else labels.astype(np.float64)


def _instance_segments(
    record: Record, transforms: T.TransformList, size: tuple[int, int]
) -> Segments:
    segments = []
    for annotation in _require(record, "annotations", "instance"):
        if annotation.get("iscrowd", 0):
            continue
        shape = annotation["segmentation"]
        if isinstance(shape, list):
            # Copied, as transforms work in place. Polygons may leave the image: rasterising clips.
            points = [np.array(polygon, dtype=float).reshape(-1, 2) for polygon in shape]
            polygons = [transforms.apply_coords(p).flatten() for p in points]
            mask = polygons_to_bitmask(polygons, *size)
        else:
            mask = mask_util.decode(shape) if isinstance(shape, dict) else np.asarray(shape)
            # Padding may have the value 255, which is not foreground.
            mask = transforms.apply_segmentation(mask.astype(np.uint8)) == 1
        segments.append((annotation["category_id"], mask))
    return segments


def _panoptic_segments(
    record: Record, transforms: T.TransformList, size: tuple[int, int]
) -> Segments:
    ids = rgb2id(transforms.apply_segmentation(_read_ids(record)))
    return [
        (segment["category_id"], ids == segment["id"])
        for segment in _require(record, "segments_info", "panoptic")
        if not segment.get("iscrowd", 0)
    ]


def _semantic_segments(
    record: Record, transforms: T.TransformList, size: tuple[int, int], ignore: int
) -> Segments:
    labels = transforms.apply_segmentation(_read_classes(record))
    return [(int(c), labels == c) for c in np.unique(labels) if c != ignore]


def read_segments(
    record: Record,
    task: str,
    transforms: T.TransformList,
    size: tuple[int, int],
    ignore_label: int = _IGNORE,
) -> Instances:
    """Ground truth of one record after its image was transformed.

    Args:
        record: a record of a data set, in Detectron2's format.
        task: "instance" (from ``annotations``: polygons, RLE or bitmaps), "panoptic" (from
            ``pan_seg_file_name`` and ``segments_info``) or "semantic" (``sem_seg_file_name``).
        transforms: applied to the image.
        size: (H, W) of the transformed image.
        ignore_label: semantic label that is not a class.

    Returns:
        Instances with ``gt_classes`` (G,) and bool ``gt_masks`` (G, H, W), without crowds and empty
        segments.

    Raises:
        ValueError: if the record lacks what the task needs.
    """
    if task == "semantic":
        segments = _semantic_segments(record, transforms, size, ignore_label)
    else:
        read = {"instance": _instance_segments, "panoptic": _panoptic_segments}[task]
        segments = read(record, transforms, size)
    segments = [(category, mask) for category, mask in segments if mask.any()]
    masks = np.zeros((len(segments), *size), dtype=bool)
    for row, (_, mask) in zip(masks, segments, strict=True):
        row[:] = mask
    classes = torch.tensor([category for category, _ in segments], dtype=torch.int64)
    return Instances(size, gt_classes=classes, gt_masks=torch.from_numpy(masks))


# ------------------------------------------------------------------------------- augmentations


def _resize_and_crop(cfg: CfgNode, task: str) -> list[T.Augmentation]:
    """Shortest edge, crop, colour and flip, as in MaskFormer."""
    node = cfg.INPUT
    augmentations: list[T.Augmentation] = [
        T.ResizeShortestEdge(node.MIN_SIZE_TRAIN, node.MAX_SIZE_TRAIN, node.MIN_SIZE_TRAIN_SAMPLING)
    ]
    if node.CROP.ENABLED and task == "instance":
        augmentations.append(T.RandomCrop(node.CROP.TYPE, node.CROP.SIZE))
    elif node.CROP.ENABLED:
        augmentations.append(
            T.RandomCrop_CategoryAreaConstraint(
                node.CROP.TYPE,
                node.CROP.SIZE,
                node.CROP.SINGLE_CATEGORY_MAX_AREA,
                cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            )
        )
    if node.COLOR_AUG_SSD:
        augmentations.append(ColorAugSSD(node.FORMAT))
    return [*augmentations, T.RandomFlip()]


def _large_scale_jitter(cfg: CfgNode, task: str) -> list[T.Augmentation]:
    """Flip, scale at random, crop or pad to a square (Ghiasi et al., arXiv 2012.07177)."""
    node = cfg.INPUT
    flips = {"none": [], "horizontal": [T.RandomFlip()]}
    flips["vertical"] = [T.RandomFlip(horizontal=False, vertical=True)]
    if node.RANDOM_FLIP not in flips:
        raise ValueError(f"INPUT.RANDOM_FLIP must be one of {sorted(flips)}")
    side = node.IMAGE_SIZE
    return [
        *flips[node.RANDOM_FLIP],
        T.ResizeScale(node.MIN_SCALE, node.MAX_SCALE, side, side),
        T.FixedSizeCrop((side, side), pad_value=_PAD_VALUE),
    ]


Augmenter = Callable[[CfgNode, str], list[T.Augmentation]]
# Task and augmentation of every official name.
MAPPERS: dict[str, tuple[str, Augmenter]] = {
    "mask_former_semantic": ("semantic", _resize_and_crop),
    "mask_former_instance": ("instance", _resize_and_crop),
    "mask_former_panoptic": ("panoptic", _resize_and_crop),
    "coco_instance_lsj": ("instance", _large_scale_jitter),
    "coco_panoptic_lsj": ("panoptic", _large_scale_jitter),
}


# ------------------------------------------------------------------------------------- mapper


def _class_map(record: Record, task: str, ignore: int) -> np.ndarray | None:
    """Classes (H, W) for augmentations that use them; None for instances."""
    if task == "instance":
        return None
    if "sem_seg_file_name" in record:
        return _read_classes(record)
    ids = rgb2id(_read_ids(record))
    classes = np.full(ids.shape, ignore, dtype=np.float64)
    for segment in _require(record, "segments_info", task):
        classes[ids == segment["id"]] = segment["category_id"]
    return classes


class MaskFormerMapper:
    """Reads, augments and pads the image and segments of a record."""

    def __init__(
        self,
        task: str,
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        ignore_label: int = _IGNORE,
        pad_to: int = 0,
        classes: int | None = None,
    ) -> None:
        """
        Args:
            task: see `read_segments`.
            augmentations: applied in this order.
            image_format: "RGB" or "BGR".
            ignore_label: semantic label that is not a class.
            pad_to: pad image and masks to this height and width; not positive: no padding.
            classes: number of the model's classes; other semantic labels are refused. None: no
                check.
        """
        self.task = task
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.ignore_label = ignore_label
        self.pad_to = pad_to
        self.classes = classes
        self._needs_classes = any(
            isinstance(a, T.RandomCrop_CategoryAreaConstraint) for a in augmentations
        )

    def __call__(self, record: Record) -> dict[str, Any]:
        """A training sample: the record with ``image`` uint8 (3, H, W) and ``instances``.

        Raises:
            ValueError: if the record lacks what the task needs, or for labels that are not classes.
        """
        image = utils.read_image(record["file_name"], format=self.image_format)
        sample = {key: value for key, value in record.items() if key not in _CONSUMED}
        utils.check_image_size(sample, image)
        classes = None
        if self._needs_classes:
            classes = _class_map(record, self.task, self.ignore_label)
        augmented = T.AugInput(image, sem_seg=classes)
        transforms = self.augmentations(augmented)
        size = augmented.image.shape[:2]
        instances = read_segments(record, self.task, transforms, size, self.ignore_label)
        if self.classes is not None and self.task == "semantic":
            found, file = instances.gt_classes.numpy(), record["sem_seg_file_name"]
            check_ids(file, found, self.classes, self.ignore_label, "the model")
        pixels = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        masks: Tensor = instances.gt_masks
        if self.pad_to > 0:
            missing = [max(0, self.pad_to - n) for n in size]
            padding = (0, missing[1], 0, missing[0])
            pixels = F.pad(pixels, padding, value=_PAD_VALUE)
            masks = F.pad(masks, padding)
        sample["image"] = pixels
        sample["instances"] = Instances(
            tuple(pixels.shape[-2:]), gt_classes=instances.gt_classes, gt_masks=masks
        )
        return sample


def build_mapper(cfg: CfgNode) -> MaskFormerMapper:
    """The training mapper that ``INPUT.DATASET_MAPPER_NAME`` names.

    Raises:
        ValueError: if there is none with that name.
    """
    name = cfg.INPUT.DATASET_MAPPER_NAME
    if name not in MAPPERS:
        raise ValueError(
            f"INPUT.DATASET_MAPPER_NAME must be one of {sorted(MAPPERS)}, got {name!r}"
        )
    task, augment = MAPPERS[name]
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    return MaskFormerMapper(
        task,
        augment(cfg, task),
        cfg.INPUT.FORMAT,
        metadata.get("ignore_label", cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE),
        # Large scale jitter pads to its own size.
        cfg.INPUT.SIZE_DIVISIBILITY if augment is _resize_and_crop else 0,
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
    )
