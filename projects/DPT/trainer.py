"""`expedit_d2.engine.Trainer` with the data, optimizer and metrics of DPT."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator

from expedit_d2.engine import Trainer
from expedit_d2.engine.solver import slow_backbone_groups

from .data import DepthMapper, register_depth_lists
from .evaluation import DepthEvaluator

__all__ = ["DPTTrainer"]


class DPTTrainer(Trainer):
    """For configs whose ``MODEL.META_ARCHITECTURE`` is ``DPT``."""

    # The encoder has a lower learning rate (section 4.1).
    param_groups = staticmethod(slow_backbone_groups)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        register_depth_lists(cfg.DATASETS.TRAIN, cfg.INPUT.DEPTH.SCALE)
        return super().build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        register_depth_lists([dataset_name], cfg.INPUT.DEPTH.SCALE)
        return super().build_test_loader(cfg, dataset_name)

    @classmethod
    def build_train_mapper(cls, cfg: CfgNode) -> DepthMapper:
        return DepthMapper(cfg, is_train=True)

    @classmethod
    def build_test_mapper(cls, cfg: CfgNode) -> DepthMapper:
        return DepthMapper(cfg, is_train=False)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        node = cfg.TEST.DEPTH
        register_depth_lists([dataset_name], cfg.INPUT.DEPTH.SCALE)
        return DepthEvaluator(
            dataset_name, cfg.MODEL.DPT.OUTPUT, node.MIN, node.MAX, node.CROP, node.ALIGN
        )
