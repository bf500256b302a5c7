"""Evaluators for the outputs of a model and the labels of a data set: PQ, mask AP and mIoU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
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
)
from detectron2.structures import Instances

from expedit_d2.data.classes import check_classes, check_labels, class_names
from expedit_d2.evaluation.build import check_scored, predictions_folder
from expedit_d2.evaluation.semantic import SemanticEvaluator

from .data.datasets import check_packages

__all__ = [
    "ThingEvaluator",
    "build_evaluators",
    "check_dataset",
    "wanted_outputs",
]

# Outputs for which each kind of data set has labels.
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
    """Mask AP by pycocotools, even if the contiguous ids of things have gaps (ADE20K)."""

    def __init__(self, dataset_name: str, output_dir: str) -> None:
        super().__init__(dataset_name, tasks=("segm",), output_dir=output_dir, use_fast_impl=False)
        check_scored(dataset_name, self._coco_api, ("segm",))
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id")
        self._rank: dict[int, int] = {}
        if ids is not None:
            # Detectron2 requires ids 0, 1, 2, …: renumber the things.
            self._rank = {contiguous: rank for rank, contiguous in enumerate(sorted(ids.values()))}
            ranks = {dataset_id: self._rank[i] for dataset_id, i in ids.items()}
            self._metadata = Metadata(
                thing_dataset_id_to_contiguous_id=ranks,
                thing_classes=self._metadata.get("thing_classes"),
            )

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict[str, Any]]) -> None:
        """Collect the instances of a batch, without those that are not things."""
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


class _CityscapesSemanticEvaluator(CityscapesSemSegEvaluator):
    """Detectron2's evaluator, with the usual name for the mean over classes."""

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        results = super().evaluate()
        if results is not None:
            results["sem_seg"] = {"mIoU": results["sem_seg"]["IoU"], **results["sem_seg"]}
        return results


def _panoptic_evaluator(dataset_name: str, folder: str) -> COCOPanopticEvaluator:
    """PQ; refused without things or without stuff, where panopticapi divides by zero."""
    meta = MetadataCatalog.get(dataset_name)
    things = set(meta.thing_dataset_id_to_contiguous_id)
    if not things or not set(meta.stuff_dataset_id_to_contiguous_id) - things:
        raise ValueError(
            f"DATASETS.TEST: {dataset_name!r} has no {'stuff' if things else 'things'}, which "
            "panopticapi needs: set MODEL.MASK_FORMER.TEST.PANOPTIC_ON False"
        )
    return COCOPanopticEvaluator(dataset_name, folder)


#: Output -> its evaluator, for a config, a data set and a folder of predictions.
_EVALUATORS: dict[str, Callable[[CfgNode, str, str], DatasetEvaluator]] = {
    "panoptic": lambda cfg, name, folder: _panoptic_evaluator(name, folder),
    "instance": lambda cfg, name, folder: ThingEvaluator(name, folder),
    "semantic": lambda cfg, name, folder: SemanticEvaluator(
        name, folder, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    ),
}
_CITYSCAPES = {
    "instance": CityscapesInstanceEvaluator,
    "semantic": _CityscapesSemanticEvaluator,
}


def wanted_outputs(cfg: CfgNode, dataset_name: str) -> tuple[str, ...]:
    """Outputs that are enabled and for which a data set has labels.

    Raises:
        ValueError: for an unsupported ``evaluator_type``.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in _LABELS:
        raise ValueError(
            f"DATASETS.TEST: {dataset_name!r} has evaluator_type {kind!r}; supported are "
            f"{sorted(_LABELS)}"
        )
    test = cfg.MODEL.MASK_FORMER.TEST
    return tuple(output for output in _LABELS[kind] if test[f"{output.upper()}_ON"])


def check_dataset(cfg: CfgNode, dataset_name: str, key: str, outputs: Collection[str]) -> None:
    """Refuse a data set whose labels or classes do not match the model.

    For instances, a model may have more classes if its first ones are the things of the data set,
    as panoptic models of COCO have for COCO's instances.

    Args:
        cfg: of the model.
        dataset_name: a registered data set.
        key: config key that names it, for error messages.
        outputs: what its labels are read for: "panoptic", "instance" or "semantic".

    Raises:
        ValueError: if they do not match.
    """
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if not outputs:
        return
    of = "thing" if set(outputs) == {"instance"} else "stuff"
    check_labels(dataset_name, key, of)
    if of == "thing":
        things = class_names(dataset_name, "thing")
        for name in (dataset_name, *cfg.DATASETS.TRAIN):
            known = class_names(name, "stuff") or ()
            if len(known) == classes and things is not None:
                if name == dataset_name or list(known[: len(things)]) == list(things):
                    return
    check_classes(dataset_name, key, of, classes, "MODEL.SEM_SEG_HEAD.NUM_CLASSES")


def build_evaluators(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """Evaluators of all outputs that are enabled and for which the data set has labels.

    Args:
        cfg: ``MODEL.MASK_FORMER.TEST`` enables outputs; predictions are written to
            ``OUTPUT_DIR``.
        dataset_name: a registered data set; its ``evaluator_type`` determines its labels.

    Raises:
        ValueError: for an unsupported ``evaluator_type``, or if nothing is left to evaluate.
        ModuleNotFoundError: for AP and mIoU of Cityscapes without cityscapesScripts.
    """
    outputs = wanted_outputs(cfg, dataset_name)
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    folder = predictions_folder(cfg.OUTPUT_DIR, dataset_name)
    evaluators: list[DatasetEvaluator] = []
    for output in outputs:
        if kind.startswith("cityscapes") and output in _CITYSCAPES:
            check_packages(dataset_name, "cityscapesscripts")
            evaluators.append(_CITYSCAPES[output](dataset_name))
        else:
            evaluators.append(_EVALUATORS[output](cfg, dataset_name, folder))
    if not evaluators:
        wanted = " or ".join(f"{output.upper()}_ON" for output in _LABELS[kind])
        raise ValueError(
            f"nothing to evaluate on {dataset_name!r}: set MODEL.MASK_FORMER.TEST.{wanted}"
        )
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
