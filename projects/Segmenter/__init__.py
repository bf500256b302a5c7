"""Segmenter (Strudel et al., ICCV 2021, arXiv 2105.05633) for Detectron2, on timm's ViTs.

- ``config``: its config keys; the encoder's are ``MODEL.TIMM``.
- ``modeling``: the model, registered by importing this package.
- ``data``: training samples, and registration of Pascal Context and CamVid.
- ``convert``: official checkpoints to Detectron2's format.
- ``flops``: FLOPs of a config, without weights or arithmetic.
- ``trainer``: all of it in the trainer of `expedit_d2.engine`.
"""

from . import modeling as _  # noqa: F401  only registration
from .config import add_segmenter_config
from .data import register_semantic_datasets
from .trainer import SegmenterTrainer

__all__ = [
    "SegmenterTrainer",
    "add_segmenter_config",
    "register_semantic_datasets",
]

register_semantic_datasets()
