"""Detectron2 projects of this repository: their common configuration, and the trainer of each.

As with Detectron2's own, the projects' folders lie in ``projects/`` of a checkout, and an installed
package holds them here. They are ``expedit_d2.projects.Mask2Former`` and so on in both cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.config import get_cfg as _get_detectron2_cfg
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

#: MODEL.META_ARCHITECTURE -> its trainer; `Trainer` for all others.
TRAINERS: dict[str, type[Trainer]] = {
    "DPT": DPTTrainer,
    "MaskFormer": MaskFormerTrainer,
    "Segmenter": SegmenterTrainer,
    # Detectron2's own, on the same data.
    "SemanticSegmentor": SegmenterTrainer,
}


def get_cfg() -> CfgNode:
    """Detectron2's default config with the keys of every project here, everything registered."""
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
    """The trainer of the project that the configured model belongs to."""
    return TRAINERS.get(cfg.MODEL.META_ARCHITECTURE, Trainer)


def load_model(cfg: CfgNode) -> nn.Module:
    """The configured model in evaluation mode, with every weight from ``MODEL.WEIGHTS``.

    That file may have the head alone, where the config freezes the backbone and says where its
    weights are. Else those to start training from are not looked for, and cached features never.

    Raises:
        ValueError: for a wrong config, or weights that `load_weights` refuses.
        OSError: if there is no such file, or it cannot be downloaded.
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
    """The weights that a config freezes, from where it says they are.

    Raises:
        ValueError: if it freezes none, or does not say.
        OSError: if there is no such file, or it cannot be downloaded.
    """
    if not _has_source(cfg):
        raise ValueError(
            "the config must freeze its ViT and say where its weights are, or there is nothing to "
            "leave out: MODEL.TIMM.FREEZE and CHECKPOINT, or those of MODEL.VIT"
        )
    return frozen_weights(trainer_of(cfg).build_model(cfg))


def _without_sources(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.CHECKPOINT = False, ""
    cfg.MODEL.VIT.CHECKPOINT = ""
    return cfg


def _has_source(cfg: CfgNode) -> bool:
    """Whether the model has a frozen ViT, with weights of its own."""
    name = cfg.MODEL.BACKBONE.NAME
    if cfg.MODEL.META_ARCHITECTURE in ("DPT", "Segmenter") or name == "build_timm_vit_backbone":
        node = cfg.MODEL.TIMM
        return node.FREEZE and bool(node.PRETRAINED or node.CHECKPOINT)
    return name == "D2ViT" and cfg.MODEL.VIT.FREEZE and bool(cfg.MODEL.VIT.CHECKPOINT)


def load_cfg(path: str | Path, opts: Sequence[str] = ()) -> CfgNode:
    """The config of a YAML file with overrides, on a device that is there.

    Args:
        path: of the file, or the name of one that comes with the package (`config_file`).
        opts: keys and values in turn.

    Raises:
        FileNotFoundError: if there is no such file, or none that it is based on.
        ValueError: for what is not a config, tags that would make a Python object, unknown keys,
            values of another type or out of their range, or a device that this machine has not.
    """
    cfg = get_cfg()
    merge_file(cfg, config_file(path))
    merge_overrides(cfg, opts)
    check_ranges(cfg)
    cfg.MODEL.DEVICE = choose_device(cfg.MODEL.DEVICE)
    # Embedded weights are found wherever this is started from.
    cfg.MODEL.WEIGHTS = shipped_file(cfg.MODEL.WEIGHTS)
    return cfg
