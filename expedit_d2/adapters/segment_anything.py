"""segment-anything's ``ImageEncoderViT``, alone or in a ``Sam``.

Its attention, windows and relative positions are those of Detectron2's ViT; its blocks have neither
stochastic depth nor a convolution.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..tokens import Tokens
from .detectron2_vit import MapLayout, spec_of
from .spec import TransformerSpec, is_class

FAMILY = "segment-anything's ImageEncoderViT (SAM)"


def matches(module: nn.Module) -> bool:
    return is_class(module, "ImageEncoderViT", "segment_anything.modeling.image_encoder")


def adapt(encoder: nn.Module) -> TransformerSpec:
    return spec_of(encoder, SamLayout, "segment_anything", unstructured=True)


class SamLayout(MapLayout):
    """Blocks that add what they compute as it is, and end with their MLP."""

    def added(self, block: nn.Module, x: Tensor, change: Tensor) -> Tensor:
        return x + change

    def finished(self, block: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        return x
