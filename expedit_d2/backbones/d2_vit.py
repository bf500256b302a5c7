"""``D2ViT``: Detectron2's plain ViT with its simple feature pyramid, configured by ``MODEL.VIT``.

ViTDet (Li et al., arXiv 2203.16527) ships with Detectron2 for LazyConfig only. This makes the very
same modules available to YAML, with the same state-dict keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from ..api import expedite_from_node

__all__ = ["D2ViT"]


@BACKBONE_REGISTRY.register()
class D2ViT(SimpleFeaturePyramid):
    """Plain ViT and simple feature pyramid.

    Outputs are named by ``out_features``: ``p2, p3, …`` as ViTDet's detectors want them (one more
    name than there are scales adds the max-pooled level), or ``res2, res3, …`` for Mask2Former.
    """

    @configurable
    def __init__(
        self,
        *,
        net: ViT,
        out_features: list[str],
        out_channels: int,
        scale_factors: list[float],
        norm: str = "LN",
        square_pad: int = 0,
        freeze: bool = False,
        expedit: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            net: the ViT, with a single output feature.
            out_features: names of the pyramid's levels, finest first.
            out_channels: channels of every level.
            scale_factors: size of each level relative to the token map: 4, 2, 1 or 0.5.
            norm: normalisation in the pyramid.
            square_pad: pad images to a square of this side; 0 keeps their shape.
            freeze: train the pyramid alone.
            expedit: a ``MODEL.EXPEDIT`` node; None is the plain ViT.

        Raises:
            ValueError: if the number of names and the number of levels disagree, or for what
                `expedit_d2.expedite` refuses.
        """
        pooled = len(out_features) - len(scale_factors)
        if pooled not in (0, 1):
            raise ValueError(
                f"MODEL.VIT.OUT_FEATURES must name the {len(scale_factors)} levels of "
                f"MODEL.VIT.SCALE_FACTORS, or one more for a pooled level, got {out_features}"
            )
        super().__init__(
            net=net,
            in_feature="last_feat",
            out_channels=out_channels,
            scale_factors=scale_factors,
            top_block=LastLevelMaxPool() if pooled else None,
            norm=norm,
            square_pad=square_pad,
        )
        if pooled:
            # Pool the coarsest level, whatever its stride (Detectron2 assumes it is p5).
            self.top_block.in_feature = self._out_features[-2]
        self._names = dict(zip(self._out_features, out_features, strict=True))
        net.requires_grad_(not freeze)
        if expedit is not None:
            expedite_from_node(self, expedit)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
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
        return {
            "net": net,
            "out_features": list(vit.OUT_FEATURES),
            "out_channels": vit.OUT_CHANNELS,
            "scale_factors": list(vit.SCALE_FACTORS),
            "square_pad": vit.SQUARE_PAD,
            "freeze": vit.FREEZE,
            "expedit": cfg.MODEL.get("EXPEDIT"),
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {self._names[name]: shape for name, shape in super().output_shape().items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to the named levels (B, out_channels, H / stride, W / stride)."""
        return {self._names[name]: feature for name, feature in super().forward(x).items()}
