"""Agreement of a model's output with the plain model's: needs no labels and has little noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import pairwise_iou

__all__ = ["InstanceAgreement", "match_quality"]

_IOU = 0.5


def match_quality(iou: np.ndarray) -> tuple[float, int, int, int]:
    """Greedy one-to-one matching at IoU above 0.5, the terms of a panoptic quality.

    Args:
        iou: (P, Q) overlaps of this model's P and the plain model's Q instances; 0 where the
            classes differ.

    Returns:
        sum of the matched IoUs, and the numbers of matched, additional and lost instances.
    """
    iou = iou.copy()
    total, matched = 0.0, 0
    while iou.size and iou.max() > _IOU:
        row, col = np.unravel_index(iou.argmax(), iou.shape)
        total += float(iou[row, col])
        matched += 1
        iou[row, :] = 0
        iou[:, col] = 0
    return total, matched, iou.shape[0] - matched, iou.shape[1] - matched


class InstanceAgreement(DatasetEvaluator):
    """How far confident instances are those of the plain model, in percent.

    The panoptic quality (Kirillov et al., arXiv 1801.00868, equation 1) between the two models'
    instances of score 0.5 and more, over all classes at once: sum of matched IoUs over (matched +
    half of the additional + half of the lost). 100 is identical output. Masks are compared where
    there are any, else boxes.

    The first run, of the plain model, is the reference; call `compare_with` for it.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold
        self.reference: dict[Any, dict] | None = None
        self.seen: dict[Any, dict] = {}

    def compare_with(self, reference: InstanceAgreement) -> InstanceAgreement:
        """Take another evaluator's instances as the plain model's."""
        self.reference = reference.seen
        return self

    def reset(self) -> None:
        self.seen = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for item, output in zip(inputs, outputs, strict=True):
            if "instances" not in output:
                raise ValueError("a comparison needs a model that predicts instances")
            instances = output["instances"].to("cpu")
            instances = instances[instances.scores >= self.threshold]
            masks = None
            if instances.has("pred_masks"):
                masks = [
                    mask_util.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
                    for mask in instances.pred_masks
                ]
            self.seen[item["image_id"]] = {
                "classes": instances.pred_classes,
                "boxes": instances.pred_boxes,
                "masks": masks,
            }

    def evaluate(self) -> dict[str, dict[str, float]]:
        reference = self.seen if self.reference is None else self.reference
        total, terms = 0.0, np.zeros(3)
        for image_id, mine in self.seen.items():
            quality, *counts = match_quality(_overlaps(mine, reference[image_id]))
            total += quality
            terms += counts
        matched, added, lost = terms
        size = matched + (added + lost) / 2
        return {"agreement": {"PQ": 100.0 * total / size if size else 100.0}}


def _overlaps(mine: dict, theirs: dict) -> np.ndarray:
    """IoU (P, Q) of instances of the same class, 0 for others."""
    same = (mine["classes"][:, None] == theirs["classes"][None, :]).numpy()
    if not same.size:
        return np.zeros(same.shape)
    if mine["masks"] is not None:
        iou = mask_util.iou(mine["masks"], theirs["masks"], [0] * len(theirs["masks"]))
    else:
        iou = pairwise_iou(mine["boxes"], theirs["boxes"]).to(torch.float64).numpy()
    return np.asarray(iou) * same
