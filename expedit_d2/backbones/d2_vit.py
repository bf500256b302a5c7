"""``D2ViT``: Detectron2's plain ViT with its simple feature pyramid, configured by ``MODEL.VIT``.

ViTDet (Li et al., arXiv 2203.16527) ships with Detectron2 for LazyConfig only. This makes the very
same modules available to YAML, with the same state-dict keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ViT
from torch import nn

from .plain_weights import load_plain_weights
from .pyramid import ViTPyramid

__all__ = ["D2ViT"]


@BACKBONE_REGISTRY.register()
class D2ViT(ViTPyramid):
    """Plain ViT, with windows and relative positions, and simple feature pyramid."""

    node = "MODEL.VIT"

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        vit = cfg.MODEL.VIT
        net = ViT(
            img_size=vit.IMG_SIZE,
            patch_size=vit.PATCH_SIZE,
            in_chans=input_shape.channels,
            embed_dim=vit.EMBED_DIM,
            depth=vit.DEPTH,
            num_heads=vit.NUM_HEADS,
            mlp_ratio=vit.MLP_RATIO,
            qkv_bias=vit.QKV_BIAS,
            drop_path_rate=vit.DROP_PATH_RATE,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_abs_pos=vit.USE_ABS_POS,
            use_rel_pos=vit.USE_REL_POS,
            window_size=vit.WINDOW_SIZE,
            window_block_indexes=vit.WINDOW_BLOCK_INDEXES,
            residual_block_indexes=vit.RESIDUAL_BLOCK_INDEXES,
            pretrain_img_size=vit.PRETRAIN_IMG_SIZE,
            pretrain_use_cls_token=vit.PRETRAIN_USE_CLS_TOKEN,
        )
        if vit.CHECKPOINT:
            load_plain_weights(net, vit.CHECKPOINT)
        return {"net": net, **cls.pyramid_args(cfg, vit)}
