"""Base class of the plain ViT backbones: the simple feature pyramid with named outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor

from ..api import expedite_from_node
from .feature_cache import cache_features

__all__ = ["PYRAMID", "ViTPyramid"]

#: Config keys of the pyramid and their defaults.
PYRAMID: dict[str, Any] = {
    # Names of the levels, finest first, and their scale relative to the token map.
    "OUT_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "SCALE_FACTORS": [4.0, 2.0, 1.0, 0.5],
    "OUT_CHANNELS": 256,
    "SQUARE_PAD": 0,  # pad images to a square of this side; 0: no padding
    "FREEZE": False,  # freeze the ViT and train the pyramid and the heads
}


class ViTPyramid(SimpleFeaturePyramid):
    """A plain ViT and ViTDet's simple feature pyramid; subclasses build the ViT from a config.

    ``out_features`` names the outputs: ``p2, p3, …`` as ViTDet's detectors expect (one name more
    than scales adds the max-pooled level), or ``res2, res3, …`` for Mask2Former.
    """

    #: Config node of the ViT.
    node = "MODEL"

    @configurable
    def __init__(
        self,
        *,
        net: Backbone,
        out_features: list[str],
        out_channels: int,
        scale_factors: list[float],
        norm: str = "LN",
        square_pad: int = 0,
        freeze: bool = False,
        feature_cache: str = "",
        expedit: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            net: the ViT, with a single output feature.
            out_features: names of the pyramid's levels, finest first.
            out_channels: channels of every level.
            scale_factors: scale of each level relative to the token map: 4, 2, 1 or 0.5.
            norm: normalisation in the pyramid.
            square_pad: pad images to a square of this side; 0: no padding.
            freeze: freeze the ViT.
            feature_cache: folder for outputs of the frozen ViT, see `cache_features`; "": none.
            expedit: ``MODEL.EXPEDIT`` node; None leaves the ViT unmodified.

        Raises:
            ValueError: if the numbers of names and levels differ, or from `cache_features` and
                `expedit_d2.expedite`.
        """
        pooled = len(out_features) - len(scale_factors)
        if pooled not in (0, 1):
            raise ValueError(
                f"{self.node}.OUT_FEATURES must name the {len(scale_factors)} levels of "
                f"{self.node}.SCALE_FACTORS, or one more for a pooled level, got {out_features}"
            )
        (in_feature,) = net.output_shape()
        super().__init__(
            net=net,
            in_feature=in_feature,
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
        cache_features(feature_cache, net)
        if expedit is not None:
            expedite_from_node(self, expedit)

    @staticmethod
    def pyramid_args(cfg: CfgNode, node: CfgNode) -> dict[str, Any]:
        """All arguments but ``net``, from the config and the backbone's own node."""
        keys = {key.lower(): node[key] for key in PYRAMID}
        cache = cfg.MODEL.BACKBONE.FEATURE_CACHE
        return {**keys, "feature_cache": cache, "expedit": cfg.MODEL.get("EXPEDIT")}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {self._names[name]: shape for name, shape in super().output_shape().items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to the named levels (B, out_channels, H / stride, W / stride)."""
        return {self._names[name]: feature for name, feature in super().forward(x).items()}
