"""Hugging Face's ViT, DINOv2 (with registers too) and DINOv3-ViT, as models and as backbones; EoMT.

Tokens (B, prefix + H * W, C), global attention in every layer. Their layers take an additive
``attention_mask``, so none of them is replaced. EoMT's last layers also run on its queries, and on
all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..tokens import Tokens
from ..tracing import is_exporting
from .map_size import MapSizes
from .spec import BlockCosts, TransformerSpec, block_costs, is_class, mean_of_heads
from .timm_eva import positions_of
from .timm_vit import PrefixLayout
from .transformers_parts import (
    RecordedLayout,
    check_masks,
    check_parts,
    pair,
    refuse_attentions,
    refuse_mask,
)
from .versions import unfit

FAMILY = "Hugging Face's ViT, DINOv2, DINOv3, EoMT"


@dataclass(frozen=True)
class Kind:
    """Names of the parts of a family's classes.

    Attributes:
        classes: classes of the whole transformer.
        module: module that defines them.
        encoder: attribute with the module that loops over the layers; "" for the model itself.
        layers: attribute of that with the layers.
        norms: norms of a layer before attention and before the MLP.
        scales: parts of a layer applied after attention and after the MLP, in order.
        output: output projection of the attention.
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
    output: str = "o_proj"


_KINDS = (
    Kind(
        ("ViTModel",),
        "transformers.models.vit.modeling_vit",
        "",
        "layers",
        ("layernorm_before", "layernorm_after"),
        (("dropout",), ("dropout",)),
    ),
    Kind(
        ("Dinov2Model", "Dinov2Backbone"),
        "transformers.models.dinov2.modeling_dinov2",
        "encoder",
        "layer",
    ),
    Kind(
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
        "encoder",
        "layer",
    ),
    Kind(
        ("DINOv3ViTModel", "DINOv3ViTBackbone"),
        "transformers.models.dinov3_vit.modeling_dinov3_vit",
        "model",
        "layer",
    ),
    Kind(
        ("EomtForUniversalSegmentation",),
        "transformers.models.eomt.modeling_eomt",
        "",
        "layers",
        output="out_proj",
    ),
    Kind(
        ("EomtDinov3ForUniversalSegmentation",),
        "transformers.models.eomt_dinov3.modeling_eomt_dinov3",
        "",
        "layers",
    ),
)


def _kind_of(module: nn.Module) -> Kind | None:
    for kind in _KINDS:
        if any(is_class(module, name, kind.module) for name in kind.classes):
            return kind
    return None


def matches(module: nn.Module) -> bool:
    return _kind_of(module) is not None


def adapt(vit: nn.Module) -> TransformerSpec:
    spec = spec_of(vit, _kind_of(vit), LayerLayout)
    if not hasattr(vit.config, "num_queries"):
        return spec
    end = len(spec.blocks) - vit.config.num_blocks
    if end == 0:
        raise ValueError(
            f"all {len(spec.blocks)} blocks of this {type(vit).__name__} also run on its queries, "
            "so tokens cannot be reduced in any"
        )
    return replace(spec, end=end, outputs=(end - 1,))


def spec_of(vit: nn.Module, kind: Kind, layout: Callable[..., LayerLayout]) -> TransformerSpec:
    """`TransformerSpec` of one kind; ``layout`` takes the fields of a `LayerLayout`."""
    owner = getattr(vit, kind.encoder, None) if kind.encoder else vit
    layers = getattr(owner, kind.layers, None)
    if layers is None:
        raise unfit(type(vit).__name__, "transformers")
    check_parts(
        vit,
        layers,
        *(*kind.norms, *kind.scales[0], *kind.scales[1], "mlp"),
        *(f"attention.{name}" for name in ("k_proj", kind.output, "head_dim")),
    )
    config, sizes = vit.config, MapSizes()
    projection = next(m for m in vit.embeddings.modules() if isinstance(m, nn.Conv2d))

    def build(size_aware: bool) -> LayerLayout:
        if size_aware:
            check_masks(config)
        return layout(
            prefix=1 + getattr(config, "num_register_tokens", 0),
            size_aware=size_aware,
            sizes=sizes,
            kind=kind,
            config=config,
            rope=getattr(vit, "rope_embeddings", None),
        )

    def attach(model: nn.Module) -> Callable[[], None]:
        hook = vit.register_forward_pre_hook(refuse_mask, with_kwargs=True)
        detach = sizes.attach_projection(model, vit, projection)

        def undo() -> None:
            detach()
            hook.remove()

        return undo

    return TransformerSpec(
        owner=owner,
        attribute=kind.layers,
        transformer=vit,
        layout=build,
        outputs=(len(layers) - 1,),
        packages=("transformers",),
        attach=attach,
        unstructured=True,
        inside=True,
        size=tuple(
            side // patch
            for side, patch in zip(pair(config.image_size), pair(config.patch_size), strict=True)
        ),
        costs=_costs,
    )


def _costs(layer: nn.Module) -> BlockCosts:
    return block_costs(layer, layer.attention, layer.attention.k_proj.out_features)


@dataclass(frozen=True)
class _Context:
    """Inputs of all later layers that depend on the reduced tokens.

    Attributes:
        mask: of cluster sizes; see `PrefixLayout.prepare`.
        rotation: cosines and sines (B or 1, 1, N, D) of the tokens' positions; None without rotary
            position embedding.
    """

    mask: Tensor | None
    rotation: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class LayerLayout(RecordedLayout, PrefixLayout):
    """Attributes: ``kind`` and ``config`` of the model; ``rope``: its rotary embedding, if any."""

    kind: Kind | None = None
    config: Any = None
    rope: nn.Module | None = None

    @property
    def reads_positions(self) -> bool:
        return self.rope is not None

    def prepare(self, x: Tensor, tokens: Tokens) -> _Context:
        rotation = None if self.rope is None else self._rotation(tokens)
        return _Context(super().prepare(x, tokens), rotation)

    def _rotation(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """DINOv3's rotation at any position; its angles are linear in coordinates from -1 to 1."""
        positions = positions_of(tokens).flatten(1, -2)
        coordinates = 2 * (positions + 0.5) / positions.new_tensor(tokens.size) - 1
        angles = 2 * math.pi * coordinates[..., None] * self.rope.inv_freq.float()
        angles = angles.flatten(-2)[:, None].repeat(1, 1, 1, 2)
        return angles.cos(), angles.sin()

    def keys(self, block: nn.Module, features: Tensor) -> Tensor:
        attention, norm = block.attention, getattr(block, self.kind.norms[0])
        keys, heads = attention.k_proj, attention.k_proj.out_features // attention.head_dim
        return mean_of_heads(keys.weight, keys.bias, heads, norm(features))

    def run(
        self,
        block: nn.Module,
        x: Tensor,
        tokens: Tokens,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        mask, kwargs = self.weighed(block, tokens, attention_mask, kwargs)
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
        mask, kwargs = self.weighed(block, tokens, attention_mask, kwargs)
        first, second = self.kind.norms
        with self._masks(x):
            attended, _ = block.attention(getattr(block, first)(x), attention_mask=mask, **kwargs)
        attended, before = self.added(block, x, attended, 0), tokens.features.flatten(1, -2)
        # Tokens are compared by the keys of this attention, not by its output.
        tokens, record = reduce(self.split(attended, tokens), lambda _: self.keys(block, before))
        x = self.join(attended, tokens.features)
        tokens = replace(tokens, context=self.prepare(x, tokens))
        return self.added(block, x, block.mlp(getattr(block, second)(x)), 1), tokens, record

    def added(self, block: nn.Module, x: Tensor, change: Tensor, index: int) -> Tensor:
        """``x`` plus the scaled output of the attention (0) or the MLP (1) of a layer."""
        for name in self.kind.scales[index]:
            change = getattr(block, name)(change)
        return change + x

    def weighed(
        self, block: nn.Module, tokens: Tokens, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """The mask and the other arguments of a layer, for the reduced tokens."""
        if not is_exporting():  # the model then makes a mask by itself, which hides nothing
            refuse_mask(block, (), {"attention_mask": mask})
        default = getattr(self.config, "output_attentions", False)
        refuse_attentions(kwargs.get("output_attentions", default))
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
