"""Mask2Former (Cheng et al., arXiv 2112.01527) for Detectron2, in plain PyTorch.

- ``config``: every key of official configs.
- ``modeling``: the model, registered by importing this package.
- ``data``: training mappers, and registration of the data sets that official configs name.
- ``evaluation``, ``solver``: metrics, optimizer and schedule.
- ``trainer``: all of it in the trainer of `expedit_d2.engine`; imported only when asked for.
"""

from . import modeling as _  # noqa: F401  only registration
from .config import add_maskformer2_config
from .data import build_mapper, build_train_loader, register_panoptic_datasets
from .evaluation import build_evaluators
from .solver import build_lr_scheduler, build_optimizer

__all__ = [
    "MaskFormerTrainer",
    "add_maskformer2_config",
    "build_evaluators",
    "build_lr_scheduler",
    "build_mapper",
    "build_optimizer",
    "build_train_loader",
    "register_panoptic_datasets",
]

register_panoptic_datasets()


def __getattr__(name: str) -> object:
    # The trainer imports expedit_d2.engine, which a config does not need.
    if name == "MaskFormerTrainer":
        from .trainer import MaskFormerTrainer

        return MaskFormerTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
