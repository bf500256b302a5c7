"""Hugging Face's ``SamVisionEncoder`` and ``SamHQVisionEncoder``, alone or in their models.

Attention, windows and relative positions are as in Detectron2's ViT. SAM-HQ also reads the outputs
of its global layers.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..tokens import Tokens
from .detectron2_vit import attend_layer, spec_of
from .segment_anything import SamLayout
from .spec import TransformerSpec, is_class
from .transformers_parts import RecordedLayout, check_parts, checkpointed

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
    spec = spec_of(encoder, _Layout, "transformers", unstructured=True, attribute="layers")
    side = encoder.config.image_size // encoder.config.patch_size
    outputs = set(spec.outputs)
    if is_class(encoder, *_HQ):
        outputs.update(index for index, layer in enumerate(layers) if layer.window_size == 0)
    return replace(spec, size=(side, side), outputs=tuple(sorted(outputs)), fused=_fused)


class _Layout(RecordedLayout, SamLayout):
    norms = ("layer_norm1", "layer_norm2")

    def run(self, block: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        return checkpointed(block, super().run, block, x, tokens)


def _fused(
    attn: nn.Module, hidden_states: Tensor, output_attentions: bool = False
) -> tuple[Tensor, None]:
    """The layer with fused attention; it also returns attention weights, which are not computed."""
    return attend_layer(attn, hidden_states), None
