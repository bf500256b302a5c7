"""`expedit_d2.engine.Trainer` with the data, schedule and metric of semantic segmentation."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.evaluation import DatasetEvaluator

from expedit_d2.data.classes import check_classes, check_labels
from expedit_d2.engine import Trainer
from expedit_d2.evaluation.build import predictions_folder
from expedit_d2.evaluation.semantic import SemanticEvaluator

from .data import SemanticMapper, build_test_mapper, build_train_mapper

__all__ = ["SegmenterTrainer"]


class SegmenterTrainer(Trainer):
    """For configs whose ``MODEL.META_ARCHITECTURE`` is ``Segmenter``."""

    sizes_vary = False  # crops have one size, and records may lack theirs

    @classmethod
    def check_dataset(cls, cfg: CfgNode, name: str, key: str = "DATASETS.TEST") -> None:
        check_labels(name, key, "stuff")
        classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        check_classes(name, key, "stuff", classes, "MODEL.SEM_SEG_HEAD.NUM_CLASSES")

    @classmethod
    def build_train_mapper(cls, cfg: CfgNode) -> SemanticMapper:
        return build_train_mapper(cfg)

    @classmethod
    def build_test_mapper(cls, cfg: CfgNode) -> DatasetMapper:
        return build_test_mapper(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """mIoU, even if the data set has other labels."""
        cls.check_dataset(cfg, dataset_name)
        return SemanticEvaluator(
            dataset_name,
            predictions_folder(cfg.OUTPUT_DIR, dataset_name),
            cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        )
