"""Which evaluator a data set and a model ask for. All metrics are Detectron2's own."""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.evaluation import COCOEvaluator, DatasetEvaluator

__all__ = ["build_evaluator", "main_metrics"]


def build_evaluator(dataset_name: str, output_dir: str, masks: bool = True) -> DatasetEvaluator:
    """COCO box AP, and mask AP where the model predicts masks, by pycocotools.

    Args:
        dataset_name: a registered data set with COCO instance annotations.
        output_dir: where predictions are written.
        masks: whether the model predicts masks.
    """
    tasks = ("bbox", "segm") if masks else ("bbox",)
    return COCOEvaluator(
        dataset_name, tasks=tasks, output_dir=output_dir, use_fast_impl=False, distributed=True
    )


#: Task of an evaluator -> (its headline metric, the name of that in tables).
_MAIN = {
    "bbox": ("AP", "box AP"),
    "segm": ("AP", "mask AP"),
    "panoptic_seg": ("PQ", "PQ"),
    "sem_seg": ("mIoU", "mIoU"),
    "depth": ("d1", "δ1"),
}


def main_metrics(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The headline of each task in an evaluator's results: ``{"box AP": 41.2, …}``."""
    return {
        name: results[task][metric] for task, (metric, name) in _MAIN.items() if task in results
    }
