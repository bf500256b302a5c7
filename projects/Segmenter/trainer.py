"""`expedit_d2.engine.Trainer` with the data, schedule and metric of semantic segmentation."""

from __future__ import annotations

import os

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.evaluation import DatasetEvaluator
from torch.utils.data import DataLoader

from expedit_d2.engine import Trainer
from projects.Mask2Former.evaluation import SemanticEvaluator

from .data import build_test_mapper, build_train_loader
from .solver import build_lr_scheduler

__all__ = ["SegmenterTrainer"]


class SegmenterTrainer(Trainer):
    """For configs whose ``MODEL.META_ARCHITECTURE`` is ``Segmenter``."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        return build_train_loader(cfg)

    @classmethod
    def build_test_mapper(cls, cfg: CfgNode) -> DatasetMapper:
        return build_test_mapper(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """mIoU, whatever else the data set has labels for."""
        folder = dataset_name.replace("/", "_")[-200:]  # names by path are long
        return SemanticEvaluator(dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference", folder))

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        return build_lr_scheduler(cfg, optimizer)
