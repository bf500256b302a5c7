"""Detectron2 projects of this repository: their common configuration, and their trainers.

As in Detectron2, they are in ``projects/`` of a checkout and in this package once installed. They
are imported as ``expedit_d2.projects.Mask2Former`` and so on in both cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import getitem
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.config import get_cfg as _get_detectron2_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from torch import Tensor, nn

from ..backbones import add_timm_config, add_vit_config
from ..config import add_expedit_config
from ..engine import (
    Trainer,
    add_solver_config,
    check_ranges,
    choose_device,
    frozen_weights,
    load_weights,
    merge_file,
    merge_overrides,
)
from ..files import read_weights
from ..files.shipped import SHIPPED, config_file, shipped_file

if not (Path(__file__).parent / "Mask2Former").is_dir():
    __path__.append(str(SHIPPED / "projects"))

from .DPT import DPTTrainer, add_dpt_config
from .Mask2Former import MaskFormerTrainer, add_maskformer2_config
from .Segmenter import SegmenterTrainer, add_segmenter_config

__all__ = ["frozen_part", "get_cfg", "load_cfg", "load_model", "trainer_of"]

#: MODEL.META_ARCHITECTURE -> trainer; `Trainer` for all others.
TRAINERS: dict[str, type[Trainer]] = {
    "DPT": DPTTrainer,
    "MaskFormer": MaskFormerTrainer,
    "Segmenter": SegmenterTrainer,
    # Detectron2's, on the same data.
    "SemanticSegmentor": SegmenterTrainer,
}


def get_cfg() -> CfgNode:
    """Detectron2's default config with the keys of all projects."""
    cfg = _get_detectron2_cfg()
    add_vit_config(cfg)
    add_timm_config(cfg)
    add_expedit_config(cfg)
    add_solver_config(cfg)
    add_maskformer2_config(cfg)
    add_segmenter_config(cfg)
    add_dpt_config(cfg)
    return cfg


def trainer_of(cfg: CfgNode) -> type[Trainer]:
    """The trainer of the configured model's project."""
    return TRAINERS.get(cfg.MODEL.META_ARCHITECTURE, Trainer)


def load_model(cfg: CfgNode) -> nn.Module:
    """The configured model in evaluation mode, with the weights of ``MODEL.WEIGHTS``.

    That file may have only the head if the config freezes the ViT and names its weights; only then
    are these loaded. Cached features are not used.

    Raises:
        ValueError: for an invalid config, or weights that `load_weights` refuses.
        OSError: if a file does not exist or cannot be downloaded.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BACKBONE.FEATURE_CACHE = ""
    build, path = trainer_of(cfg).build_model, cfg.MODEL.WEIGHTS
    model = build(_without_sources(cfg))
    elsewhere = frozen_weights(model) if path and _has_source(cfg) else {}
    if elsewhere and elsewhere.keys().isdisjoint(read_weights(path, "MODEL.WEIGHTS")):
        model = build(cfg)
    load_weights(model, path, elsewhere=elsewhere)
    return model.eval()


def frozen_part(cfg: CfgNode) -> dict[str, Tensor]:
    """The weights that a config freezes, from the file that it names.

    Raises:
        ValueError: if it freezes none, or names no file.
        OSError: if the file does not exist or cannot be downloaded.
    """
    if not _has_source(cfg):
        raise ValueError(
            "the config must freeze its ViT and name its weights, or nothing can be omitted: set "
            "FREEZE and CHECKPOINT of MODEL.TIMM or MODEL.VIT"
        )
    return frozen_weights(trainer_of(cfg).build_model(cfg))


def _without_sources(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.CHECKPOINT = False, ""
    cfg.MODEL.VIT.CHECKPOINT = ""
    return cfg


def _has_source(cfg: CfgNode) -> bool:
    """Whether the model has a frozen ViT whose weights the config names."""
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    part = model if hasattr(model, "node") else BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)
    node = reduce(getitem, getattr(part, "node", "MODEL").split("."), cfg)
    return node.get("FREEZE", False) and any(map(node.get, ("PRETRAINED", "CHECKPOINT")))


def load_cfg(path: str | Path, opts: Sequence[str] = ()) -> CfgNode:
    """The config of a YAML file with overrides, on an available device.

    Args:
        path: of the file, or the name of one in the package, see `config_file`.
        opts: alternating keys and values.

    Raises:
        FileNotFoundError: if the file or a base does not exist.
        ValueError: for an invalid file, tags that would create Python objects, unknown keys, values
            of the wrong type or out of range, or a device that this machine does not have.
    """
    cfg = get_cfg()
    merge_file(cfg, config_file(path))
    merge_overrides(cfg, opts)
    check_ranges(cfg)
    cfg.MODEL.DEVICE = choose_device(cfg.MODEL.DEVICE)
    # Embedded weights are found from any folder.
    cfg.MODEL.WEIGHTS = shipped_file(cfg.MODEL.WEIGHTS)
    return cfg
