"""Instances of detection and instance segmentation, with scores of at least 0.5."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from .drawing import canvas_of, class_color, class_name, enlarge, to_image, write_names
from .matching import quality_terms
from .prediction import Metric, Prediction, Record

__all__ = ["InstancePrediction", "draw_instances"]

_SCORE = 0.5


def draw_instances(image: np.ndarray, instances: Instances, metadata: Metadata) -> np.ndarray:
    """Draw detections with scores of at least 0.5, with masks if they have any.

    Args:
        image: (height, width, 3) uint8 RGB.
        instances: Detectron2's predictions.
        metadata: of the data set, for the names and colours of classes.
    """
    instances = instances.to("cpu")
    instances = instances[instances.scores >= _SCORE]
    canvas = canvas_of(image)
    if len(instances) == 0:
        return to_image(canvas)
    names, palette = metadata.get("thing_classes"), metadata.get("thing_colors")
    classes = instances.pred_classes.tolist()
    colors = [class_color(palette, index) for index in classes]
    labels = [
        f"{class_name(names, index)} {score:.0%}"
        for index, score in zip(classes, instances.scores.tolist(), strict=True)
    ]
    if instances.has("pred_masks"):
        masks = enlarge(instances.pred_masks.bool())
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.5, colors=colors)
    boxes = instances.pred_boxes.tensor * (canvas.shape[-1] / image.shape[1])
    canvas = draw_bounding_boxes(canvas, boxes, colors=colors, width=2)
    corners = [(int(x) + 4, int(y) + 4) for x, y, *_ in boxes.tolist()]
    # Names come by decreasing score, so those of high scores are not moved.
    return write_names(canvas, [*zip(labels, corners, strict=True)], anchor="la")


def _box_overlaps(mine: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """IoU (P, Q) of boxes (P, 4) and (Q, 4) with nonzero areas."""
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (mine, plain)]
    low = np.maximum(mine[:, None, :2], plain[None, :, :2])
    high = np.minimum(mine[:, None, 2:], plain[None, :, 2:])
    together = np.prod(np.maximum(high - low, 0), axis=2)
    return together / (areas[0][:, None] + areas[1][None] - together)


def _topmost(instances: Instances) -> Tensor:
    """(height, width) class of the instance with the highest score at each pixel, -1 for none."""
    top = torch.full(instances.image_size, -1)
    instances = instances[instances.scores >= _SCORE]
    for index in instances.scores.argsort().tolist():
        if instances.has("pred_masks"):
            inside = instances.pred_masks[index].bool()
        else:
            x0, y0, x1, y1 = instances.pred_boxes.tensor[index].round().int().tolist()
            inside = torch.zeros(instances.image_size, dtype=torch.bool)
            inside[y0:y1, x0:x1] = True
        top[inside] = instances.pred_classes[index]
    return top


class InstancePrediction(Prediction):
    """Instances with scores of at least 0.5, compared by masks if they have any, else by boxes."""

    key = "instances"
    name = "instances"
    metrics = (Metric("bbox", "AP", "box AP"), Metric("segm", "AP", "mask AP"))

    draw = staticmethod(draw_instances)

    def keep(self, output: Instances) -> Record:
        """``classes`` (N,), and ``boxes`` (N, 4) or concatenated run-length masks."""
        instances = output.to("cpu")
        instances = instances[instances.scores >= _SCORE]
        if not instances.has("pred_masks"):
            boxes = instances.pred_boxes.tensor.double().numpy()
            there = (boxes[:, 2:] > boxes[:, :2]).all(1)
            return {"classes": instances.pred_classes.numpy()[there], "boxes": boxes[there]}
        there = instances.pred_masks.flatten(1).any(1)
        codes = [
            mask_util.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))["counts"]
            for mask in instances.pred_masks[there]
        ]
        return {
            "classes": instances.pred_classes[there].numpy(),
            "size": np.array(instances.pred_masks.shape[1:]),
            "lengths": np.array([len(code) for code in codes], np.int64),
            "codes": np.frombuffer(b"".join(codes), np.uint8),
        }

    @staticmethod
    def _masks(record: Record) -> list[dict[str, Any]]:
        ends = np.cumsum(record["lengths"])
        codes = np.split(record["codes"], ends[:-1])
        return [{"size": record["size"].tolist(), "counts": code.tobytes()} for code in codes]

    def terms(self, mine: Record, plain: Record) -> np.ndarray:
        same = mine["classes"][:, None] == plain["classes"][None, :]
        if not same.size:
            return quality_terms(np.zeros(same.shape))
        if "boxes" in mine:
            return quality_terms(_box_overlaps(mine["boxes"], plain["boxes"]) * same)
        masks = self._masks(plain)
        iou = mask_util.iou(self._masks(mine), masks, [0] * len(masks))
        return quality_terms(np.asarray(iou) * same)

    def differ(self, plain: Instances, other: Instances) -> np.ndarray:
        """Pixels with a different class on top."""
        return (_topmost(plain.to("cpu")) != _topmost(other.to("cpu"))).numpy()
