"""`expedit_d2.engine.Trainer` with the data, optimizer and metrics of Mask2Former."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator

from expedit_d2.engine import Trainer
from expedit_d2.engine.solver import slow_backbone_groups

from .data import MAPPERS, MaskFormerMapper, build_mapper
from .evaluation import build_evaluators, check_dataset, wanted_outputs

__all__ = ["MaskFormerTrainer"]


class MaskFormerTrainer(Trainer):
    """For configs whose ``MODEL.META_ARCHITECTURE`` is ``MaskFormer``."""

    param_groups = staticmethod(slow_backbone_groups)

    @classmethod
    def check_dataset(cls, cfg: CfgNode, name: str, key: str = "DATASETS.TEST") -> None:
        if key == "DATASETS.TRAIN":
            mapper = MAPPERS.get(cfg.INPUT.DATASET_MAPPER_NAME)
            check_dataset(cfg, name, key, mapper[:1] if mapper else ())
        else:
            check_dataset(cfg, name, key, wanted_outputs(cfg, name))

    @classmethod
    def build_train_mapper(cls, cfg: CfgNode) -> MaskFormerMapper:
        return build_mapper(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        cls.check_dataset(cfg, dataset_name)
        return build_evaluators(cfg, dataset_name)
