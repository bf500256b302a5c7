"""From a record to an image and its depth, in training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from expedit_d2.data.images import read_header

from .datasets import depth_scale_of, read_depth

__all__ = ["DepthMapper", "bottom_crop"]

# Keys of a record; other annotations would be costly to send between processes.
_COPIED_KEYS = ("file_name", "depth_file_name", "image_id")


def bottom_crop(size: tuple[int, int], crop: Sequence[int]) -> tuple[int, int]:
    """Top and left of a crop at the bottom centre, as in KITTI's benchmark.

    Args:
        size: (H, W) of the image.
        crop: (H, W) of the crop.

    Raises:
        ValueError: if the image is smaller than the crop.
    """
    top, left = size[0] - crop[0], (size[1] - crop[1]) // 2
    if top < 0 or left < 0:
        raise ValueError(f"INPUT.DEPTH.CROP must fit the image of {size}, got {tuple(crop)}")
    return top, left


class DepthMapper:
    """Reads the image of a record and, in training, its depth, with the same augmentations."""

    @configurable
    def __init__(
        self,
        *,
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        crop: Sequence[int] | None = None,
        depth_scale: float | None = None,
    ) -> None:
        """
        Args:
            augmentations: applied one after the other, after the crop.
            image_format: "RGB" or "BGR".
            crop: (height, width) of the part to keep, see `bottom_crop`; None: all.
            depth_scale: PNG values per metre; None: depth is not read.
        """
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.crop = crop
        self.depth_scale = depth_scale

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Shortest edge, crop and flip in training; in evaluation the model itself resizes."""
        node = cfg.INPUT
        augmentations: list[T.Augmentation] = []
        if is_train:
            augmentations.append(
                T.ResizeShortestEdge(
                    node.MIN_SIZE_TRAIN, node.MAX_SIZE_TRAIN, node.MIN_SIZE_TRAIN_SAMPLING
                )
            )
            if node.CROP.ENABLED:
                augmentations.append(T.RandomCrop(node.CROP.TYPE, node.CROP.SIZE))
            if node.RANDOM_FLIP not in ("none", "horizontal"):
                raise ValueError(
                    f'INPUT.RANDOM_FLIP must be "none" or "horizontal", got {node.RANDOM_FLIP!r}'
                )
            if node.RANDOM_FLIP == "horizontal":
                augmentations.append(T.RandomFlip())
        return {
            "augmentations": augmentations,
            "image_format": node.FORMAT,
            "crop": node.DEPTH.CROP,
            "depth_scale": depth_scale_of(cfg.DATASETS.TRAIN) if is_train else None,
        }

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """
        Args:
            record: with ``file_name`` and, in training, ``depth_file_name``.

        Returns:
            The record without other annotations, with ``image`` uint8 (3, H, W), its ``height`` and
            ``width``, ``crop`` (top, left) in the file, and in training ``depth`` (H, W) in metres.

        Raises:
            ValueError: if the record has no depth, or one of another size.
        """
        for key in ("file_name", *(["depth_file_name"] if self.depth_scale is not None else [])):
            if key not in record:
                raise ValueError(f"depth needs records with {key!r}, got {sorted(record)}")
        image = utils.read_image(record["file_name"], format=self.image_format)
        size = image.shape[:2]
        depth = None
        if "depth_file_name" in record:  # which the evaluator reads
            depth_size = read_header(record["depth_file_name"]).size
            if depth_size != size:
                raise ValueError(
                    f"{record['depth_file_name']} has {depth_size} pixels, and the image {size}"
                )
        if self.depth_scale is not None:
            depth = read_depth(record["depth_file_name"], self.depth_scale)
        top, left = 0, 0
        if self.crop is not None:
            top, left = bottom_crop(size, self.crop)
            window = np.s_[top : top + self.crop[0], left : left + self.crop[1]]
            image, depth = image[window], None if depth is None else depth[window]
        # Depth is resized by nearest neighbours, and flipped, as labels are.
        augmented = T.AugInput(image, sem_seg=depth)
        self.augmentations(augmented)
        image, depth = augmented.image, augmented.sem_seg
        sample = {key: record[key] for key in _COPIED_KEYS if key in record}
        sample["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        sample["height"], sample["width"] = image.shape[:2]
        sample["crop"] = (top, left)
        if depth is not None:
            sample["depth"] = torch.from_numpy(np.ascontiguousarray(depth))
        return sample
