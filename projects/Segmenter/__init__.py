"""Segmenter (Strudel et al., ICCV 2021, arXiv 2105.05633) for Detectron2, on timm's ViTs.

- ``config``: its config keys; the encoder's are ``MODEL.TIMM``.
- ``modeling``: the model, registered by importing this package.
- ``data``: training samples, and registration of Pascal Context and CamVid.
- ``convert``: official checkpoints to Detectron2's format.
- ``flops``: FLOPs of a config, without weights or arithmetic.
- ``solver``, ``trainer``: the official schedule; all of it in the trainer of `expedit_d2.engine`,
  imported only when asked for.
"""

from . import modeling as _  # noqa: F401  only registration
from .config import add_segmenter_config
from .data import build_train_loader, register_semantic_datasets
from .solver import build_lr_scheduler

__all__ = [
    "SegmenterTrainer",
    "add_segmenter_config",
    "build_lr_scheduler",
    "build_train_loader",
    "register_semantic_datasets",
]

register_semantic_datasets()


def __getattr__(name: str) -> object:
    # The trainer imports expedit_d2.engine, which a config does not need.
    if name == "SegmenterTrainer":
        from .trainer import SegmenterTrainer

        return SegmenterTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
