"""`expedit_d2.engine.Trainer` with the data, optimizer and metrics of Mask2Former."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from torch import nn
from torch.utils.data import DataLoader

from expedit_d2.engine import Trainer
from expedit_d2.engine.trainer import missing_data

from .data import MAPPERS, build_train_loader
from .evaluation import build_evaluators, check_dataset, wanted_outputs
from .solver import build_lr_scheduler, build_optimizer

__all__ = ["MaskFormerTrainer"]


class MaskFormerTrainer(Trainer):
    """For configs whose ``MODEL.META_ARCHITECTURE`` is ``MaskFormer``."""

    @classmethod
    def check_dataset(cls, cfg: CfgNode, name: str, key: str = "DATASETS.TEST") -> None:
        if key == "DATASETS.TRAIN":
            mapper = MAPPERS.get(cfg.INPUT.DATASET_MAPPER_NAME)
            check_dataset(cfg, name, key, mapper[:1] if mapper else ())
        else:
            check_dataset(cfg, name, key, wanted_outputs(cfg, name))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        with missing_data("DATASETS.TRAIN", cfg.DATASETS.TRAIN):
            return build_train_loader(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        cls.check_dataset(cfg, dataset_name)
        return build_evaluators(cfg, dataset_name)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        return build_lr_scheduler(cfg, optimizer)
