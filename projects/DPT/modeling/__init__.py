"""The model: encoder, head, losses and meta-architecture; registered by import."""

from .encoder import Encoder, Level
from .head import DPTHead
from .meta_arch import DPT
from .resize import network_size

__all__ = ["DPT", "DPTHead", "Encoder", "Level", "network_size"]
