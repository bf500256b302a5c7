"""Transformer decoder with masked attention (Cheng et al., arXiv 2112.01527, section 3.2).

In every layer the queries attend to one level of the pixel decoder, each only inside the mask that
it has predicted before, and then to each other.

Shorthand: B images, Q queries, C = ``MODEL.MASK_FORMER.HIDDEN_DIM`` channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d
from detectron2.utils.registry import Registry
from fvcore.nn import weight_init
from torch import Tensor, nn

from .position import sine_embedding

__all__ = [
    "TRANSFORMER_DECODER_REGISTRY",
    "MultiScaleMaskedTransformerDecoder",
    "build_transformer_decoder",
]

TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_MODULE")
TRANSFORMER_DECODER_REGISTRY.__doc__ = (
    "Transformer decoders that MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME can name."
)

_LEVELS = 3


def _init(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


class _Attention(nn.Module):
    """Residual attention; ``name`` is what the official code calls the attention itself."""

    def __init__(self, name: str, dim: int, heads: int, pre_norm: bool) -> None:
        super().__init__()
        self.name = name
        self.pre_norm = pre_norm
        self.add_module(name, nn.MultiheadAttention(dim, heads, batch_first=True))
        self.norm = nn.LayerNorm(dim)
        _init(self)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        memory: Tensor | None = None,
        memory_position: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Queries (B, Q, C) to queries; without ``memory`` (B, N, C) they attend to each other.

        Positions, (Q, C) and (N, C), are added to queries and keys, not to values. ``mask``
        (B * heads, Q, N) is True where a query must not look.
        """
        y = self.norm(x) if self.pre_norm else x
        query = y + position
        if memory is None:
            key, value = query, y
        else:
            key, value = memory + memory_position, memory
        attention = getattr(self, self.name)
        x = x + attention(query, key, value, attn_mask=mask, need_weights=False)[0]
        return x if self.pre_norm else self.norm(x)


class _MLPLayer(nn.Module):
    """Residual MLP."""

    def __init__(self, dim: int, hidden: int, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)
        _init(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x) if self.pre_norm else x
        x = x + self.linear2(self.linear1(y).relu())
        return x if self.pre_norm else self.norm(x)


class _MLP(nn.Module):
    """Linear layers with ReLU in between."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


@TRANSFORMER_DECODER_REGISTRY.register()
class MultiScaleMaskedTransformerDecoder(nn.Module):
    """Learnt queries to classes and masks, with predictions before the layers and after each."""

    _version = 2

    @configurable
    def __init__(
        self,
        in_channels: int,
        mask_classification: bool = True,
        *,
        num_classes: int,
        hidden_dim: int,
        num_queries: int,
        nheads: int,
        dim_feedforward: int,
        dec_layers: int,
        pre_norm: bool,
        mask_dim: int,
        enforce_input_project: bool,
    ) -> None:
        """
        Args:
            in_channels: channels of the levels.
            mask_classification: must be True.
            num_classes: K, without "no object".
            hidden_dim: C.
            num_queries: Q.
            nheads, dim_feedforward, pre_norm: of the layers.
            dec_layers: number of layers; layer i attends to level i modulo 3, coarsest first.
            mask_dim: channels of the per-pixel embeddings.
            enforce_input_project: project the levels even if they have C channels.

        Raises:
            ValueError: if mask_classification is False.
        """
        super().__init__()
        if not mask_classification:
            raise ValueError("this decoder classifies masks, mask_classification must be True")
        self.num_queries = num_queries
        self.num_heads = nheads
        layers = range(dec_layers)
        self.transformer_self_attention_layers = nn.ModuleList(
            _Attention("self_attn", hidden_dim, nheads, pre_norm) for _ in layers
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            _Attention("multihead_attn", hidden_dim, nheads, pre_norm) for _ in layers
        )
        self.transformer_ffn_layers = nn.ModuleList(
            _MLPLayer(hidden_dim, dim_feedforward, pre_norm) for _ in layers
        )
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(_LEVELS, hidden_dim)
        self.input_proj = nn.ModuleList()
        for _ in range(_LEVELS):
            if in_channels != hidden_dim or enforce_input_project:
                self.input_proj.append(Conv2d(in_channels, hidden_dim, kernel_size=1))
                weight_init.c2_xavier_fill(self.input_proj[-1])
            else:
                self.input_proj.append(nn.Identity())
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = _MLP((hidden_dim, hidden_dim, hidden_dim, mask_dim))

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, mask_classification: bool) -> dict:
        node = cfg.MODEL.MASK_FORMER
        if node.DEC_LAYERS < 1:
            raise ValueError(
                "MODEL.MASK_FORMER.DEC_LAYERS counts predictions and must be at least 1, got "
                f"{node.DEC_LAYERS}"
            )
        return {
            "in_channels": in_channels,
            "mask_classification": mask_classification,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "hidden_dim": node.HIDDEN_DIM,
            "num_queries": node.NUM_OBJECT_QUERIES,
            "nheads": node.NHEADS,
            "dim_feedforward": node.DIM_FEEDFORWARD,
            "dec_layers": node.DEC_LAYERS - 1,
            "pre_norm": node.PRE_NORM,
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "enforce_input_project": node.ENFORCE_INPUT_PROJ,
        }

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # Version 1 checkpoints have another name for the query features.
        old = prefix + "static_query.weight"
        if old in state_dict:
            state_dict[prefix + "query_feat.weight"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self, levels: Sequence[Tensor], mask_features: Tensor, mask: None = None
    ) -> dict[str, Any]:
        """
        Args:
            levels: three maps (B, in_channels, H, W), coarsest first.
            mask_features: (B, mask_dim, H', W'), the per-pixel embeddings.
            mask: not used; part of the interface of transformer decoders.

        Returns:
            ``pred_logits`` (B, Q, K + 1) and ``pred_masks`` (B, Q, H', W'), both before softmax
            and sigmoid; ``aux_outputs``, the same of the earlier predictions.
        """
        sizes = [tuple(x.shape[-2:]) for x in levels]
        memories, positions = [], []
        for x, size, project, embed in zip(
            levels, sizes, self.input_proj, self.level_embed.weight, strict=True
        ):
            x = project(x)
            memories.append(x.flatten(2).transpose(1, 2) + embed)
            positions.append(sine_embedding(size, x.shape[1], x.device))

        batch = mask_features.shape[0]
        query_position = self.query_embed.weight
        x = self.query_feat.weight.expand(batch, -1, -1)
        predictions = [self._predict(x, mask_features)]
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for index, (cross, within, mlp) in enumerate(layers):
            level = index % _LEVELS
            blocked = self._blocked(predictions[-1]["pred_masks"], sizes[level])
            x = cross(x, query_position, memories[level], positions[level], blocked)
            x = mlp(within(x, query_position))
            predictions.append(self._predict(x, mask_features))
        return {**predictions[-1], "aux_outputs": predictions[:-1]}

    def _predict(self, x: Tensor, mask_features: Tensor) -> dict[str, Tensor]:
        x = self.decoder_norm(x)
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(x), mask_features)
        return {"pred_logits": self.class_embed(x), "pred_masks": masks}

    @torch.no_grad()
    def _blocked(self, masks: Tensor, size: tuple[int, int]) -> Tensor:
        """Cells outside each query's mask, (B * heads, Q, H * W); none for empty masks."""
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
        blocked = masks.sigmoid().flatten(2) < 0.5
        blocked = blocked & ~blocked.all(-1, keepdim=True)
        return blocked.repeat_interleave(self.num_heads, dim=0)


def build_transformer_decoder(
    cfg: CfgNode, in_channels: int, mask_classification: bool = True
) -> nn.Module:
    """The decoder that ``MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME`` names.

    Raises:
        ValueError: if there is none with that name.
    """
    name = cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME
    if name not in TRANSFORMER_DECODER_REGISTRY:
        raise ValueError(
            f"MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME: {name!r} is not registered; this project "
            "has 'MultiScaleMaskedTransformerDecoder'"
        )
    return TRANSFORMER_DECODER_REGISTRY.get(name)(cfg, in_channels, mask_classification)
