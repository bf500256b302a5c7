"""`expedit_d2.engine.Trainer` with the data, optimizer and metrics of DPT."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from expedit_d2.data.mapper import CheckedMapper
from expedit_d2.engine import Trainer
from expedit_d2.engine.trainer import missing_data

from ..Mask2Former.solver import build_optimizer
from .data import DepthMapper, register_depth_lists
from .evaluation import DepthEvaluator

__all__ = ["DPTTrainer"]


class DPTTrainer(Trainer):
    """For configs whose ``MODEL.META_ARCHITECTURE`` is ``DPT``."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        register_depth_lists(cfg.DATASETS.TRAIN, cfg.INPUT.DEPTH.SCALE)
        with missing_data("DATASETS.TRAIN", cfg.DATASETS.TRAIN):
            mapper = CheckedMapper(DepthMapper(cfg, is_train=True))
            return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        register_depth_lists([dataset_name], cfg.INPUT.DEPTH.SCALE)
        with missing_data("DATASETS.TEST", [dataset_name]):
            mapper = CheckedMapper(DepthMapper(cfg, is_train=False))
            return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        node = cfg.TEST.DEPTH
        register_depth_lists([dataset_name], cfg.INPUT.DEPTH.SCALE)
        return DepthEvaluator(
            dataset_name, cfg.MODEL.DPT.OUTPUT, node.MIN, node.MAX, node.CROP, node.ALIGN
        )

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """The encoder learns slower by ``SOLVER.BACKBONE_MULTIPLIER`` (section 4.1)."""
        return build_optimizer(cfg, model)
