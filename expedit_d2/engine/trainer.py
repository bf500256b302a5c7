"""Training and evaluation on Detectron2's `DefaultTrainer`, for YAML configs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn

from ..api import expedite_from_node
from ..evaluation import build_evaluator
from .errors import explain, unknown_data_set

__all__ = ["Trainer", "check_data_sets"]

OPTIMIZERS = ("SGD", "ADAMW")


def _is_defect(record: logging.LogRecord) -> bool:
    return not (record.exc_info and explain(record.exc_info[1]))


# Detectron2's loop logs the traceback of every error; what the user can mend is one sentence.
logging.getLogger("detectron2.engine.train_loop").addFilter(_is_defect)


def check_data_sets(key: str, names: Sequence[str]) -> None:
    """Whether there is a data set, and each of them is registered or a path.

    Args:
        key: that gave the names, for the message.
        names: of data sets.

    Raises:
        ValueError: if not.
    """
    if not names:
        raise ValueError(f"{key} is empty; give data sets, such as \"('collage_val',)\"")
    for name in names:
        if name not in DatasetCatalog.list() and not Path(name).exists():
            raise ValueError(f"{key}: {unknown_data_set(name)}")


@contextmanager
def _missing_data(key: str, names: Sequence[str]) -> Iterator[None]:
    """Say which config key named a data set that is not there, and what to do about it."""
    check_data_sets(key, names)
    try:
        yield
    except FileNotFoundError as error:
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        raise FileNotFoundError(
            f"{key}: the files of {', '.join(names)} are not there ({error}); data sets are "
            f"looked for in {root!r}, set DETECTRON2_DATASETS to the folder that holds them"
        ) from None


class Trainer(DefaultTrainer):
    """`DefaultTrainer` with AdamW and with bf16 autocast where there is no GPU."""

    def __init__(self, cfg: CfgNode) -> None:
        """
        Raises:
            ValueError: for a config without data to train on, or of a schedule that is none.
        """
        check_data_sets("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
        batch, processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
        if batch < 1 or batch % processes:
            raise ValueError(
                "SOLVER.IMS_PER_BATCH must be positive and a multiple of the number of processes "
                f"({processes}), got {batch}"
            )
        if cfg.SOLVER.MAX_ITER < 1:
            raise ValueError(f"SOLVER.MAX_ITER must be 1 or more, got {cfg.SOLVER.MAX_ITER}")
        self._autocast = nullcontext
        if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
            # Detectron2's AMPTrainer insists on CUDA.
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SOLVER.AMP.ENABLED = False
            self._autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
        super().__init__(cfg)

    def run_step(self) -> None:
        with self._autocast():
            super().run_step()

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The configured model; one whose backbone ignores ``MODEL.EXPEDIT`` is expedited here."""
        model = super().build_model(cfg)
        if "EXPEDIT" in cfg.MODEL:
            expedite_from_node(model, cfg.MODEL.EXPEDIT)
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        with _missing_data("DATASETS.TRAIN", cfg.DATASETS.TRAIN):
            return super().build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        with _missing_data("DATASETS.TEST", [dataset_name]):
            return super().build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name.replace("/", "_"))
        return build_evaluator(dataset_name, folder, masks=cfg.MODEL.MASK_ON)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """SGD as Detectron2 builds it, or AdamW without weight decay on norms and positions."""
        name = cfg.SOLVER.OPTIMIZER.upper()
        if name not in OPTIMIZERS:
            raise ValueError(f"SOLVER.OPTIMIZER must be one of {OPTIMIZERS}, got {name!r}")
        if name == "SGD":
            return super().build_optimizer(cfg, model)
        no_decay: dict[str, Any] = {"weight_decay": 0.0}
        params = get_default_optimizer_params(
            model,
            weight_decay_norm=0.0,
            overrides={"pos_embed": no_decay, "rel_pos_h": no_decay, "rel_pos_w": no_decay},
        )
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return optimizer(params, cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
