"""Training and evaluation on Detectron2's `DefaultTrainer`, for YAML configs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
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
from detectron2.utils import comm
from torch import nn

from ..api import expedite_from_node, is_expedited
from ..data.classes import check_classes, check_labels
from ..data.mapper import CheckedMapper
from ..evaluation import build_evaluator
from ..evaluation.build import predictions_folder
from .checkpoint import Checkpointer
from .errors import explain, unknown_data_set
from .solver import build_lr_scheduler, build_optimizer, default_groups

__all__ = ["Trainer", "check_data_sets", "missing_data"]

#: MODEL.META_ARCHITECTURE of a detector -> the node with its NUM_CLASSES.
DETECTORS = {
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
}


def _is_bug(record: logging.LogRecord) -> bool:
    return not (record.exc_info and explain(record.exc_info[1]))


# Detectron2's training loop logs the traceback of every error; keep only those of bugs.
logging.getLogger("detectron2.engine.train_loop").addFilter(_is_bug)


def check_data_sets(key: str, names: Sequence[str]) -> None:
    """Check that there is at least one data set and that all are registered.

    Args:
        key: config key, for error messages.
        names: of the data sets; paths must have been registered.

    Raises:
        ValueError: if there are none, or one is unknown.
    """
    if not names:
        raise ValueError(f"{key} is empty; give data sets, such as \"('collage_val',)\"")
    for name in names:
        if name not in DatasetCatalog.list():
            raise ValueError(f"{key}: {unknown_data_set(name)}")


@contextmanager
def missing_data(key: str, names: Sequence[str]) -> Iterator[None]:
    """Name the config key and the remedy if files of data sets are missing."""
    check_data_sets(key, names)
    try:
        yield
    except FileNotFoundError as error:
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        raise FileNotFoundError(
            f"{key}: files of {', '.join(names)} are missing ({error}); data sets are searched for "
            f"in {root!r}, set DETECTRON2_DATASETS to their folder"
        ) from None


class Trainer(DefaultTrainer):
    """`DefaultTrainer` with AdamW, and with bf16 autocast on the CPU.

    Projects override the mappers, the evaluator and the attributes below.
    """

    #: Returns the parameter groups for `build_optimizer`.
    param_groups = staticmethod(default_groups)
    #: Whether training samples vary in size, so that grouping by aspect ratio saves memory.
    sizes_vary = True

    def __init__(self, cfg: CfgNode) -> None:
        """
        Raises:
            ValueError: for a config without training data, with data sets that do not match the
                model, or with an invalid schedule.
        """
        check_data_sets("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
        if cfg.DATASETS.TEST:  # fail before training, not at its end
            check_data_sets("DATASETS.TEST", cfg.DATASETS.TEST)
        for key in ("TRAIN", "TEST"):
            for name in cfg.DATASETS[key]:
                self.check_dataset(cfg, name, f"DATASETS.{key}")
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
            # Detectron2's AMPTrainer requires CUDA.
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SOLVER.AMP.ENABLED = False
            self._autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
        super().__init__(cfg)

    def build_hooks(self) -> list[HookBase | None]:
        # Replaces Detectron2's checkpointer before its first use, which is in the hooks.
        old = self.checkpointer
        self.checkpointer = Checkpointer(old.model, old.save_dir, **old.checkpointables)
        return super().build_hooks()

    def run_step(self) -> None:
        with self._autocast():
            super().run_step()

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The configured model.

        Models of this package apply ``MODEL.EXPEDIT`` themselves, so that Detectron2's
        ``build_model`` and ``build_backbone`` do; other models are expedited here.
        """
        model = super().build_model(cfg)
        if "EXPEDIT" in cfg.MODEL and not is_expedited(model):
            expedite_from_node(model, cfg.MODEL.EXPEDIT)
        return model

    @classmethod
    def check_dataset(cls, cfg: CfgNode, name: str, key: str = "DATASETS.TEST") -> None:
        """Refuse a registered data set whose labels or classes do not match the model.

        Args:
            cfg: the config.
            name: of the data set.
            key: config key of the name, for error messages.

        Raises:
            ValueError: if they do not match.
        """
        node = DETECTORS.get(cfg.MODEL.META_ARCHITECTURE)
        if node is not None:
            check_labels(name, key, "thing")
            classes = cfg.MODEL[node].NUM_CLASSES
            check_classes(name, key, "thing", classes, f"MODEL.{node}.NUM_CLASSES")

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        with missing_data("DATASETS.TRAIN", cfg.DATASETS.TRAIN):
            grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING and cls.sizes_vary
            mapper = CheckedMapper(cls.build_train_mapper(cfg))
            return build_detection_train_loader(cfg, mapper=mapper, aspect_ratio_grouping=grouped)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        with missing_data("DATASETS.TEST", [dataset_name]):
            mapper = CheckedMapper(cls.build_test_mapper(cfg))
            return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_train_mapper(cls, cfg: CfgNode) -> Callable[[dict], dict]:
        """The mapper from records to training samples."""
        return DatasetMapper(cfg, is_train=True)

    @classmethod
    def build_test_mapper(cls, cfg: CfgNode) -> Callable[[dict], dict]:
        """The mapper from records of test data sets to model inputs."""
        return DatasetMapper(cfg, is_train=False)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        cls.check_dataset(cfg, dataset_name)
        folder = predictions_folder(cfg.OUTPUT_DIR, dataset_name)
        return build_evaluator(dataset_name, folder, masks=cfg.MODEL.MASK_ON)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model, cls.param_groups)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        return build_lr_scheduler(cfg, optimizer)
