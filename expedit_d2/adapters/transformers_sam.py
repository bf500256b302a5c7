"""Hugging Face's ``SamVisionEncoder`` and ``SamHQVisionEncoder``, alone or in their models.

Their attention, windows and relative positions are those of Detectron2's ViT. SAM-HQ also reads
the outputs of its global layers. Hidden states are recorded by forward hooks on the layers, which
are therefore called with whole maps; see ``watched`` of `Layout`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..tokens import Tokens
from .detectron2_vit import attend_layer, spec_of
from .segment_anything import SamLayout
from .spec import TransformerSpec, is_class
from .transformers_parts import check_parts, checkpointed, records_hidden_states

FAMILY = "Hugging Face's SAM, SAM-HQ"

_HQ = ("SamHQVisionEncoder", "transformers.models.sam_hq.modeling_sam_hq")
_CLASSES = (("SamVisionEncoder", "transformers.models.sam.modeling_sam"), _HQ)


def matches(module: nn.Module) -> bool:
    return any(is_class(module, *names) for names in _CLASSES)


def adapt(encoder: nn.Module) -> TransformerSpec:
    layers = encoder.layers
    check_parts(
        encoder,
        layers,
        *("layer_norm1", "layer_norm2", "mlp", "window_size", "gradient_checkpointing"),
        *(f"attn.{name}" for name in ("qkv", "proj", "scale", "use_rel_pos")),
        "attn.num_attention_heads",
    )
    spec = spec_of(encoder, _Layout, unstructured=True, attribute="layers")
    side = encoder.config.image_size // encoder.config.patch_size
    outputs = set(spec.outputs)
    if is_class(encoder, *_HQ):
        outputs.update(index for index, layer in enumerate(layers) if layer.window_size == 0)
    return replace(spec, size=(side, side), outputs=tuple(sorted(outputs)), fused=_fused)


class _Layout(SamLayout):
    norms = ("layer_norm1", "layer_norm2")
    watched = True

    def reads_outputs(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether hidden states are recorded."""
        return records_hidden_states()

    def run(self, block: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        return checkpointed(block, super().run, block, x, tokens)


def _fused(
    attn: nn.Module, hidden_states: Tensor, output_attentions: bool = False
) -> tuple[Tensor, None]:
    """The layer as it is, which returns its weights too where it has them."""
    return attend_layer(attn, hidden_states), None
