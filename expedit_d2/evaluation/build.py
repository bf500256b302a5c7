"""Build evaluators; all metrics are Detectron2's."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from pycocotools.coco import COCO

from ..compat import coco_ground_truth

__all__ = ["build_evaluator", "check_scored", "predictions_folder"]

logger = logging.getLogger(__name__)


def predictions_folder(output_dir: str, dataset_name: str) -> str:
    """Folder for predictions; names of data sets by path are shortened."""
    return os.path.join(output_dir, "inference", dataset_name.replace("/", "_")[-200:])


def check_scored(dataset_name: str, truth: COCO, tasks: Sequence[str]) -> None:
    """Refuse annotations with which pycocotools would fail after the whole inference.

    Args:
        dataset_name: for error messages.
        truth: the annotations.
        tasks: "bbox", "segm".

    Raises:
        ValueError: for the first incomplete annotation.
    """
    required = ("area", "iscrowd", "bbox")
    if 0 in truth.anns:
        logger.warning(
            "%r has an annotation with the id 0, which means no match to pycocotools, so AP is too "
            "low: number annotations from 1",
            dataset_name,
        )
    for annotation in truth.anns.values():
        missing = [key for key in required if key not in annotation]
        if missing:
            raise ValueError(
                f"{dataset_name!r}: annotation {annotation['id']!r} of image "
                f"{annotation['image_id']!r} has no {missing[0]!r}, which AP needs: add it to the "
                "file"
            )
        if "segm" in tasks and not annotation.get("segmentation"):
            raise ValueError(
                f"{dataset_name!r}: annotation {annotation['id']!r} of image "
                f"{annotation['image_id']!r} has no mask ('segmentation'), which mask AP needs: "
                "add it to the file, or set MODEL.MASK_ON False for the box AP of a detector only"
            )


def build_evaluator(dataset_name: str, output_dir: str, masks: bool = True) -> DatasetEvaluator:
    """COCO box AP, and mask AP if the model predicts masks, by pycocotools.

    Args:
        dataset_name: a registered data set with COCO instance annotations.
        output_dir: folder for predictions.
        masks: whether the model predicts masks.

    Raises:
        ValueError: if annotations lack what AP needs.
    """
    tasks = ("bbox", "segm") if masks else ("bbox",)
    evaluator = COCOEvaluator(
        dataset_name, tasks=tasks, output_dir=output_dir, use_fast_impl=False, distributed=True
    )
    truth, _, _ = coco_ground_truth(evaluator)
    check_scored(dataset_name, truth, tasks)
    return evaluator
