"""Which metrics a data set and a model's outputs ask for: PQ, mask AP, mIoU, by Detectron2."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.structures import Instances

__all__ = ["ThingEvaluator", "build_evaluators"]

# Outputs that each kind of data set has labels for.
_LABELS = {
    "sem_seg": ("semantic",),
    "coco": ("instance",),
    "coco_panoptic_seg": ("panoptic", "instance", "semantic"),
    "ade20k_panoptic_seg": ("panoptic", "instance", "semantic"),
    "cityscapes_sem_seg": ("semantic",),
    "cityscapes_instance": ("instance",),
    "cityscapes_panoptic_seg": ("panoptic", "instance", "semantic"),
}


class ThingEvaluator(COCOEvaluator):
    """Mask AP by pycocotools, also where the things' contiguous ids have gaps (ADE20K)."""

    def __init__(self, dataset_name: str, output_dir: str) -> None:
        super().__init__(dataset_name, tasks=("segm",), output_dir=output_dir, use_fast_impl=False)
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id")
        self._rank: dict[int, int] = {}
        if ids is not None:
            # Detectron2 insists on ids 0, 1, 2, …: number the things among themselves.
            self._rank = {contiguous: rank for rank, contiguous in enumerate(sorted(ids.values()))}
            ranks = {dataset_id: self._rank[i] for dataset_id, i in ids.items()}
            self._metadata = Metadata(
                thing_dataset_id_to_contiguous_id=ranks,
                thing_classes=self._metadata.get("thing_classes"),
            )

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict[str, Any]]) -> None:
        """Collect the instances of a batch; those that are no things are left out."""
        if self._rank:
            outputs = [{"instances": self._renumber(o["instances"])} for o in outputs]
        super().process(inputs, outputs)

    def _renumber(self, instances: Instances) -> Instances:
        ranks = [self._rank.get(c, -1) for c in instances.pred_classes.tolist()]
        kept = [i for i, rank in enumerate(ranks) if rank >= 0]
        instances = instances[kept]
        classes = instances.pred_classes
        instances.pred_classes = classes.new_tensor([ranks[i] for i in kept])
        return instances


def build_evaluators(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """Evaluators of every output that is switched on and that the data set has labels for.

    Args:
        cfg: ``MODEL.MASK_FORMER.TEST`` says what is switched on, ``OUTPUT_DIR`` where
            predictions go.
        dataset_name: a registered data set; its ``evaluator_type`` says what it has labels for.

    Raises:
        ValueError: if the type is unknown, or nothing is left to evaluate.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in _LABELS:
        raise ValueError(
            f"DATASETS.TEST: {dataset_name!r} has evaluator_type {kind!r}; supported are "
            f"{sorted(_LABELS)}"
        )
    test = cfg.MODEL.MASK_FORMER.TEST
    switched_on = {
        "panoptic": test.PANOPTIC_ON,
        "instance": test.INSTANCE_ON,
        "semantic": test.SEMANTIC_ON,
    }
    folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name.replace("/", "_"))
    evaluators: list[DatasetEvaluator] = []
    for output in _LABELS[kind]:
        if not switched_on[output]:
            continue
        if output == "panoptic":
            evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
        elif kind.startswith("cityscapes"):
            cityscapes = {
                "instance": CityscapesInstanceEvaluator,
                "semantic": CityscapesSemSegEvaluator,
            }
            evaluators.append(cityscapes[output](dataset_name))
        elif output == "instance":
            evaluators.append(ThingEvaluator(dataset_name, folder))
        else:
            evaluators.append(SemSegEvaluator(dataset_name, output_dir=folder))
    if not evaluators:
        wanted = " or ".join(f"{output.upper()}_ON" for output in _LABELS[kind])
        raise ValueError(
            f"nothing to evaluate on {dataset_name!r}: set MODEL.MASK_FORMER.TEST.{wanted}"
        )
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
