"""Mask2Former (Cheng et al., arXiv 2112.01527) for Detectron2, in plain PyTorch.

- ``config``: the keys of official configs.
- ``modeling``: the model, registered by importing this package.
- ``data``: training mappers, and registration of the data sets that official configs name.
- ``evaluation``: metrics.
- ``trainer``: all of it in the trainer of `expedit_d2.engine`.
"""

from . import modeling as _  # noqa: F401  only registration
from .config import add_maskformer2_config
from .data import build_mapper, register_panoptic_datasets
from .evaluation import build_evaluators
from .trainer import MaskFormerTrainer

__all__ = [
    "MaskFormerTrainer",
    "add_maskformer2_config",
    "build_evaluators",
    "build_mapper",
    "register_panoptic_datasets",
]

register_panoptic_datasets()
