"""Detectron2 projects of this repository: their common configuration, and the trainer of each."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.config import get_cfg as _get_detectron2_cfg

from expedit_d2 import backbones as _  # noqa: F401  only registration
from expedit_d2.config import add_expedit_config, add_vit_config
from expedit_d2.engine import Trainer, add_solver_config

from .Mask2Former import MaskFormerTrainer, add_maskformer2_config

__all__ = ["get_cfg", "trainer_of"]

#: MODEL.META_ARCHITECTURE -> its trainer; `Trainer` for all others.
TRAINERS: dict[str, type[Trainer]] = {
    "MaskFormer": MaskFormerTrainer,
}


def get_cfg() -> CfgNode:
    """Detectron2's default config with the keys of every project here, everything registered."""
    cfg = _get_detectron2_cfg()
    add_vit_config(cfg)
    add_expedit_config(cfg)
    add_solver_config(cfg)
    add_maskformer2_config(cfg)
    return cfg


def trainer_of(cfg: CfgNode) -> type[Trainer]:
    """The trainer of the project that the configured model belongs to."""
    return TRAINERS.get(cfg.MODEL.META_ARCHITECTURE, Trainer)
