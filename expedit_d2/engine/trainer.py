"""Training and evaluation on Detectron2's `DefaultTrainer`, for YAML configs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from ..api import expedite_from_node
from ..data.classes import check_classes, check_labels
from ..data.mapper import CheckedMapper
from ..evaluation import build_evaluator
from ..evaluation.build import predictions_folder
from .checkpoint import Checkpointer

__all__ = ["Trainer", "missing_data"]

OPTIMIZERS = ("SGD", "ADAMW")

#: MODEL.META_ARCHITECTURE of a detector -> the key that has its number of classes.
DETECTORS = {
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
}


@contextmanager
def missing_data(key: str, names: Iterable[str]) -> Iterator[None]:
    """Say which config key named a data set that is not there, and what to do about it."""
    names = list(names)
    if not names:
        raise ValueError(f"{key} names no data set")
    unknown = [name for name in names if name not in DatasetCatalog.list()]
    if unknown:
        raise ValueError(
            f"{key}: there is no data set {unknown[0]!r}; give a name that Detectron2 knows, such "
            "as coco_2017_val or collage_val, or the path of a COCO-format .json file"
        )
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
        for key in ("TRAIN", "TEST"):  # also what is evaluated only at the end
            for name in cfg.DATASETS[key]:
                self.check_dataset(cfg, name, f"DATASETS.{key}")
        self._autocast = nullcontext
        if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
            # Detectron2's AMPTrainer insists on CUDA.
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SOLVER.AMP.ENABLED = False
            self._autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
        super().__init__(cfg)

    def build_hooks(self) -> list[HookBase | None]:
        # The first that Detectron2 does with its own checkpointer is to give it to the hooks.
        theirs = self.checkpointer
        self.checkpointer = Checkpointer(theirs.model, theirs.save_dir, **theirs.checkpointables)
        return super().build_hooks()

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
    def check_dataset(cls, cfg: CfgNode, name: str, key: str = "DATASETS.TEST") -> None:
        """Refuse a registered data set whose labels or classes are not those of the model.

        Args:
            cfg: of the model.
            name: of the data set.
            key: of the config, which names it.

        Raises:
            ValueError: if it does not fit.
        """
        node = DETECTORS.get(cfg.MODEL.META_ARCHITECTURE)
        if node is not None:
            check_labels(name, key, "thing")
            classes = cfg.MODEL[node].NUM_CLASSES
            check_classes(name, key, "thing", classes, f"MODEL.{node}.NUM_CLASSES")

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        with missing_data("DATASETS.TRAIN", cfg.DATASETS.TRAIN):
            mapper = CheckedMapper(DatasetMapper(cfg, is_train=True))
            return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        with missing_data("DATASETS.TEST", [dataset_name]):
            mapper = cls.build_test_mapper(cfg)
            return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_test_mapper(cls, cfg: CfgNode) -> Callable[[dict], dict]:
        """What makes the model's input of a record of a test data set."""
        return CheckedMapper(DatasetMapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        cls.check_dataset(cfg, dataset_name)
        folder = predictions_folder(cfg.OUTPUT_DIR, dataset_name)
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
