"""The model: encoder and decoders, and inference by sliding windows; registered by import."""

from .decoder import DECODERS, LinearDecoder, MaskTransformer
from .inference import sliding_window
from .meta_arch import Segmenter

__all__ = ["DECODERS", "LinearDecoder", "MaskTransformer", "Segmenter", "sliding_window"]
