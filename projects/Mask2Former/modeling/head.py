"""``MaskFormerHead``: pixel decoder and transformer decoder with their official names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from .pixel_decoder import build_pixel_decoder
from .transformer_decoder import build_transformer_decoder

__all__ = ["MaskFormerHead"]

_IN_FEATURE = "multi_scale_pixel_decoder"


@SEM_SEG_HEADS_REGISTRY.register()
class MaskFormerHead(nn.Module):
    """Features of the backbone to classes and masks."""

    _version = 2

    @configurable
    def __init__(
        self, *, num_classes: int, pixel_decoder: nn.Module, transformer_predictor: nn.Module
    ) -> None:
        """
        Args:
            num_classes: K, without "no object".
            pixel_decoder: see `build_pixel_decoder`.
            transformer_predictor: see `build_transformer_decoder`.
        """
        super().__init__()
        self.num_classes = num_classes
        self.pixel_decoder = pixel_decoder
        self.predictor = transformer_predictor

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict:
        source = cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE
        if source != _IN_FEATURE:
            raise ValueError(
                f"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE must be {_IN_FEATURE!r}, got {source!r}"
            )
        return {
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "pixel_decoder": build_pixel_decoder(cfg, input_shape),
            "transformer_predictor": build_transformer_decoder(
                cfg, cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM, mask_classification=True
            ),
        }

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # Version 1 checkpoints have no prefix for the pixel decoder. They are recognised by their
        # keys, as converted files may have lost their version.
        named = (prefix + "pixel_decoder.", prefix + "predictor.")
        for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(named)]:
            state_dict[named[0] + key.removeprefix(prefix)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Any]:
        """Features (B, C, H, W) by name to the output of the transformer decoder."""
        mask_features, _, levels = self.pixel_decoder.forward_features(features)
        return self.predictor(levels, mask_features)
