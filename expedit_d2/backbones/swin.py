"""``D2SwinTransformer``: Swin (Liu et al., arXiv 2103.14030), configured by ``MODEL.SWIN``.

Config keys, outputs and state-dict keys match the official Mask2Former, so its checkpoints load;
attention is fused, and inputs may have any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..api import expedite_from_node
from ..config import add_keys
from ..tracing import shape_of
from .swin_layers import PatchEmbed, Stage

__all__ = ["D2SwinTransformer", "add_swin_config"]

# Arguments of the backbone, in upper case; defaults are Swin-T.
_SWIN: dict[str, Any] = {
    "PRETRAIN_IMG_SIZE": 224,
    "PATCH_SIZE": 4,
    "EMBED_DIM": 96,
    "DEPTHS": [2, 2, 6, 2],
    "NUM_HEADS": [3, 6, 12, 24],
    "WINDOW_SIZE": 7,
    "MLP_RATIO": 4.0,
    "QKV_BIAS": True,
    "QK_SCALE": None,
    "DROP_RATE": 0.0,
    "ATTN_DROP_RATE": 0.0,
    "DROP_PATH_RATE": 0.3,
    "APE": False,
    "PATCH_NORM": True,
    "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "USE_CHECKPOINT": False,
}


def add_swin_config(cfg: CfgNode) -> None:
    """Add ``MODEL.SWIN``, the keys of the ``D2SwinTransformer`` backbone."""
    add_keys(cfg, {"MODEL": {"SWIN": _SWIN}})


@BACKBONE_REGISTRY.register()
class D2SwinTransformer(Backbone):
    """Swin Transformer with outputs ``res2`` to ``res5``."""

    @configurable
    def __init__(
        self,
        *,
        in_channels: int = 3,
        pretrain_img_size: int = 224,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.3,
        ape: bool = False,
        patch_norm: bool = True,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        use_checkpoint: bool = False,
        expedit: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            in_channels: channels of the images.
            pretrain_img_size: image side in pixels for the absolute position embedding.
            patch_size: side of a patch in pixels.
            embed_dim: channels of the first stage; doubled at each stage.
            depths, num_heads: numbers of blocks and of attention heads of each stage.
            window_size: side of an attention window in tokens.
            mlp_ratio, qkv_bias, qk_scale: of the blocks; scale None is head_dim**-0.5.
            drop_rate, attn_drop_rate: dropout rates.
            drop_path_rate: stochastic depth rate of the last block, increasing linearly from 0.
            ape: add an absolute position embedding.
            patch_norm: normalise after the patch embedding.
            out_features: stages to return, among ``res2``, ``res3``, …
            use_checkpoint: gradient checkpointing.
            expedit: ``MODEL.EXPEDIT`` node; None leaves Swin unmodified.

        Raises:
            ValueError: for an unknown output, or from `expedit_d2.expedite`.
        """
        super().__init__()
        names = [f"res{index + 2}" for index in range(len(depths))]
        unknown = sorted(set(out_features) - set(names))
        if unknown:
            raise ValueError(
                f"MODEL.SWIN.OUT_FEATURES must be among {names} for {len(depths)} stages, got "
                f"{unknown[0]!r}"
            )
        dims = [embed_dim * 2**index for index in range(len(depths))]
        self._out_features = list(out_features)
        self._out_feature_channels = dict(zip(names, dims, strict=True))
        self._out_feature_strides = {n: patch_size * 2**i for i, n in enumerate(names)}

        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim, patch_norm)
        self.absolute_pos_embed = None
        if ape:
            side = pretrain_img_size // patch_size
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, embed_dim, side, side))
            trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stage = partial(
            Stage,
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop=drop_rate,
            attn_drop=attn_drop_rate,
            use_checkpoint=use_checkpoint,
        )
        self.layers = nn.ModuleList(
            stage(dim, [next(rates) for _ in range(depth)], num_heads=heads, last=dim == dims[-1])
            for dim, depth, heads in zip(dims, depths, num_heads, strict=True)
        )
        for index, dim in enumerate(dims):
            self.add_module(f"norm{index}", nn.LayerNorm(dim))
        if expedit is not None:
            expedite_from_node(self, expedit)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        keys = {key.lower(): cfg.MODEL.SWIN[key] for key in _SWIN}
        expedit = cfg.MODEL.get("EXPEDIT")
        return {"in_channels": input_shape.channels, **keys, "expedit": expedit}

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to the named stages (B, C, H / stride, W / stride), rounded up."""
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            positions = F.interpolate(self.absolute_pos_embed, shape_of(x)[1:3], mode="bicubic")
            x = x + positions.permute(0, 2, 3, 1)
        x = self.pos_drop(x)
        outputs = {}
        for index, layer in enumerate(self.layers):
            out, x = layer(x)
            if f"res{index + 2}" in self._out_features:
                out = getattr(self, f"norm{index}")(out)
                outputs[f"res{index + 2}"] = out.permute(0, 3, 1, 2).contiguous()
        return outputs
