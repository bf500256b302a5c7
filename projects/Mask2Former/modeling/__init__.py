"""The model: pixel decoder, transformer decoder, losses and inference; registered by import."""

from .criterion import SetCriterion
from .deformable_attention import MSDeformAttn
from .head import MaskFormerHead
from .matcher import HungarianMatcher
from .meta_arch import MaskFormer
from .pixel_decoder import MSDeformAttnPixelDecoder
from .transformer_decoder import (
    TRANSFORMER_DECODER_REGISTRY,
    MultiScaleMaskedTransformerDecoder,
)

__all__ = [
    "TRANSFORMER_DECODER_REGISTRY",
    "HungarianMatcher",
    "MSDeformAttn",
    "MSDeformAttnPixelDecoder",
    "MaskFormer",
    "MaskFormerHead",
    "MultiScaleMaskedTransformerDecoder",
    "SetCriterion",
]
