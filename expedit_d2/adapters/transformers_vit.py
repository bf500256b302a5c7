"""Hugging Face's ViT, DINOv2 (with registers too) and DINOv3-ViT, as models and as backbones.

Tokens (B, prefix + H * W, C), global attention in every layer. Their layers take an additive
``attention_mask``, so nothing of theirs is replaced. Hidden states are recorded by forward hooks on
the layers, which are therefore called with whole maps; see ``watched`` of `Layout`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..compat import attention_of
from ..tokens import Tokens
from .host import BlockCosts, Host, block_costs, is_class
from .map_size import MapSizes
from .timm_eva import positions_of
from .timm_vit import PrefixLayout

FAMILY = "Hugging Face's ViT, DINOv2, DINOv3"


@dataclass(frozen=True)
class _Kind:
    """Where the classes of a family have their parts.

    Attributes:
        classes: those that own all of the transformer.
        module: they are defined in.
        encoder: attribute with the module that loops over the layers; "" for the model itself.
        layers: name of the container in it.
        norms: of a layer, before attention and before the MLP.
        scales: of a layer, after each of them, in order; each is run if the layer has it.
    """

    classes: tuple[str, ...]
    module: str
    encoder: str
    layers: str
    norms: tuple[str, str] = ("norm1", "norm2")
    scales: tuple[tuple[str, ...], tuple[str, ...]] = (
        ("layer_scale1", "drop_path"),
        ("layer_scale2", "drop_path"),
    )


_KINDS = (
    _Kind(
        ("ViTModel",),
        "transformers.models.vit.modeling_vit",
        "",
        "layers",
        ("layernorm_before", "layernorm_after"),
        (("dropout",), ("dropout",)),
    ),
    _Kind(
        ("Dinov2Model", "Dinov2Backbone"),
        "transformers.models.dinov2.modeling_dinov2",
        "encoder",
        "layer",
    ),
    _Kind(
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
        "encoder",
        "layer",
    ),
    _Kind(
        ("DINOv3ViTModel", "DINOv3ViTBackbone"),
        "transformers.models.dinov3_vit.modeling_dinov3_vit",
        "model",
        "layer",
    ),
)

#: Implementations of attention that take an additive mask.
_MASKED = ("sdpa", "eager")


def _kind_of(module: nn.Module) -> _Kind | None:
    for kind in _KINDS:
        if any(is_class(module, name, kind.module) for name in kind.classes):
            return kind
    return None


def matches(module: nn.Module) -> bool:
    return _kind_of(module) is not None


def adapt(vit: nn.Module) -> Host:
    kind = _kind_of(vit)
    owner = getattr(vit, kind.encoder, None) if kind.encoder else vit
    layers = getattr(owner, kind.layers, None)
    if layers is None or not all(_fits(layer, kind) for layer in layers):
        raise ValueError(
            f"{type(vit).__name__} of this version of transformers has other parts than Expedit "
            "knows; 5.23 and later 5.x fit"
        )
    config, sizes = vit.config, MapSizes()
    projection = next(m for m in vit.embeddings.modules() if isinstance(m, nn.Conv2d))

    def build(size_aware: bool) -> _Layout:
        implementation = attention_of(config)
        if size_aware and implementation not in _MASKED:
            raise ValueError(
                f"SIZE_AWARE needs attention that takes a mask, attn_implementation one of "
                f"{_MASKED}, got {implementation!r}; load the model so, or set SIZE_AWARE False"
            )
        return _Layout(
            prefix=1 + getattr(config, "num_register_tokens", 0),
            size_aware=size_aware,
            sizes=sizes,
            kind=kind,
            config=config,
            rope=getattr(vit, "rope_embeddings", None),
        )

    return Host(
        owner=owner,
        attribute=kind.layers,
        transformer=vit,
        layout=build,
        outputs=(len(layers) - 1,),
        attach=lambda model: sizes.attach_projection(model, vit, projection),
        off_grid=True,
        inside=True,
        size=tuple(
            side // patch
            for side, patch in zip(_pair(config.image_size), _pair(config.patch_size), strict=True)
        ),
        costs=_costs,
    )


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _fits(layer: nn.Module, kind: _Kind) -> bool:
    parts = (*kind.norms, *kind.scales[0], *kind.scales[1], "attention", "mlp")
    attention = ("k_proj", "o_proj", "head_dim")
    return all(hasattr(layer, name) for name in parts) and all(
        hasattr(layer.attention, name) for name in attention
    )


def _costs(layer: nn.Module) -> BlockCosts:
    return block_costs(layer, layer.attention, layer.attention.o_proj.in_features)


@dataclass(frozen=True)
class _Context:
    """What every later layer needs to know of reduced tokens.

    Attributes:
        mask: of cluster sizes; see `PrefixLayout.prepare`.
        rotation: cosines and sines (B or 1, 1, N, D) of the tokens' places; None without rotary
            positions.
    """

    mask: Tensor | None
    rotation: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class _Layout(PrefixLayout):
    """Attributes: ``kind`` and ``config`` of the model; ``rope``: its rotary positions, if any."""

    kind: _Kind | None = None
    config: Any = None
    rope: nn.Module | None = None

    watched = True

    def reads_outputs(self, kwargs: dict[str, Any]) -> bool:
        """Whether hidden states are recorded."""
        default = getattr(self.config, "output_hidden_states", False)
        return bool(kwargs.get("output_hidden_states", default))

    @property
    def reads_positions(self) -> bool:
        return self.rope is not None

    def prepare(self, x: Tensor, tokens: Tokens) -> _Context:
        rotation = None if self.rope is None else self._rotation(tokens)
        return _Context(super().prepare(x, tokens), rotation)

    def _rotation(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """DINOv3's, which is linear in the coordinates, -1 to 1 over the map, at any place."""
        positions = positions_of(tokens).flatten(1, -2)
        coordinates = 2 * (positions + 0.5) / positions.new_tensor(tokens.size) - 1
        angles = 2 * math.pi * coordinates[..., None] * self.rope.inv_freq.float()
        angles = angles.flatten(-2)[:, None].repeat(1, 1, 1, 2)
        return angles.cos(), angles.sin()

    def keys(self, block: nn.Module, features: Tensor) -> Tensor:
        attention, norm = block.attention, getattr(block, self.kind.norms[0])
        split = (-1, attention.head_dim)
        weight, bias = attention.k_proj.weight.unflatten(0, split).mean(0), attention.k_proj.bias
        bias = None if bias is None else bias.unflatten(0, split).mean(0)
        return F.linear(norm(features), weight, bias)

    def run(
        self,
        block: nn.Module,
        x: Tensor,
        tokens: Tokens,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        mask, kwargs = self._weighed(tokens, attention_mask, kwargs)
        with self._masks(x):
            return block.forward(x, mask, **kwargs)

    def run_reducing(
        self,
        block: nn.Module,
        x: Tensor,
        tokens: Tokens,
        reduce: nn.Module,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tokens, Any]:
        mask, kwargs = self._weighed(tokens, attention_mask, kwargs)
        first, second = self.kind.norms
        with self._masks(x):
            attended, _ = block.attention(getattr(block, first)(x), attention_mask=mask, **kwargs)
        attended, before = self._added(block, x, attended, 0), tokens.features.flatten(1, -2)
        # The keys are those of this attention, whatever came out of it.
        tokens, record = reduce(self.split(attended, tokens), lambda _: self.keys(block, before))
        x = self.join(attended, tokens.features)
        tokens = replace(tokens, context=self.prepare(x, tokens))
        return self._added(block, x, block.mlp(getattr(block, second)(x)), 1), tokens, record

    def _added(self, block: nn.Module, x: Tensor, change: Tensor, index: int) -> Tensor:
        """``x`` with what the attention (0) or the MLP (1) of a layer adds to it."""
        for name in self.kind.scales[index]:
            change = getattr(block, name)(change)
        return change + x

    def _weighed(
        self, tokens: Tokens, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """The mask and the other arguments of a layer, for the tokens that are left."""
        if mask is not None:
            raise ValueError(
                "a model with Expedit takes no attention_mask: it is for all tokens; leave it out"
            )
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise ValueError(
                "output_attentions is not supported with Expedit, whose attention is that of "
                "clusters: set it False"
            )
        context = tokens.context
        if context is None:
            return None, kwargs
        if context.rotation is not None:
            given = kwargs["position_embeddings"]
            rotation = tuple(
                own.to(whole.dtype) for own, whole in zip(context.rotation, given, strict=True)
            )
            kwargs = {**kwargs, "position_embeddings": rotation}
        return context.mask, kwargs
