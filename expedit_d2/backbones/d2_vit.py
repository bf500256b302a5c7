"""``D2ViT``: Detectron2's plain ViT with its simple feature pyramid, configured by ``MODEL.VIT``.

Detectron2 ships ViTDet (Li et al., arXiv 2203.16527) for LazyConfig only. This makes the same
modules available to YAML configs, with the same state-dict keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ViT
from torch import nn

from ..config import add_keys
from .feature_cache import FEATURE_CACHE
from .plain_weights import load_plain_weights
from .pyramid import PYRAMID, ViTPyramid

__all__ = ["D2ViT", "add_vit_config"]

# Arguments of Detectron2's ViT, in upper case; defaults are ViTDet-B.
_VIT: dict[str, Any] = {
    "IMG_SIZE": 1024,  # pixels; sets the global relative-position tables and the size BUDGET is for
    "PATCH_SIZE": 16,  # pixels
    "EMBED_DIM": 768,
    "DEPTH": 12,
    "NUM_HEADS": 12,
    "MLP_RATIO": 4.0,
    "QKV_BIAS": True,
    "DROP_PATH_RATE": 0.1,
    "USE_ABS_POS": True,
    "USE_REL_POS": True,
    "WINDOW_SIZE": 14,  # tokens along a side of an attention window
    "WINDOW_BLOCK_INDEXES": [0, 1, 3, 4, 6, 7, 9, 10],  # the other blocks are global
    "RESIDUAL_BLOCK_INDEXES": [],
    "PRETRAIN_IMG_SIZE": 224,
    "PRETRAIN_USE_CLS_TOKEN": True,
}


def add_vit_config(cfg: CfgNode) -> None:
    """Add ``MODEL.VIT``, the keys of the ``D2ViT`` backbone. Defaults are ViTDet-B."""
    # CHECKPOINT: weights of a plain ViT to start from (MAE, DINOv2, …), with timm's names;
    # LayerScale is folded into the preceding layers.
    vit = {**_VIT, **PYRAMID, "CHECKPOINT": ""}
    add_keys(cfg, {"MODEL": {"VIT": vit, "BACKBONE": FEATURE_CACHE}})


@BACKBONE_REGISTRY.register()
class D2ViT(ViTPyramid):
    """Detectron2's ViT, with windows and relative positions, and the simple feature pyramid."""

    node = "MODEL.VIT"

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        vit = cfg.MODEL.VIT
        net = ViT(
            in_chans=input_shape.channels,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            **{key.lower(): vit[key] for key in _VIT},
        )
        net.img_size = vit.IMG_SIZE  # Detectron2's ViT does not store it, and BUDGET needs it
        if vit.CHECKPOINT:
            load_plain_weights(net, vit.CHECKPOINT)
        return {"net": net, **cls.pyramid_args(cfg, vit)}
