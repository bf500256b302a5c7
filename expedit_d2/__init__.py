"""Expedit for Detectron2: large vision transformers made faster for dense prediction, untrained.

`TokenClustering` and `TokenReconstruction` are the two operators, `expedite` applies them to a
model, `add_expedit_config` adds them to a Detectron2 config. `fuse_attention` makes a model's own
attention faster and changes nothing else. `sized_blocks` is for code that runs blocks by itself.
"""

from .api import expedite
from .fused import fuse_attention
from .hook import sized_blocks
from .operators import TokenClustering, TokenReconstruction

__version__ = "0.1.0"
__all__ = [
    "TokenClustering",
    "TokenReconstruction",
    "add_expedit_config",
    "expedite",
    "fuse_attention",
    "sized_blocks",
]


def __getattr__(name: str) -> object:
    # Detectron2 is imported only when its config is asked for.
    if name == "add_expedit_config":
        from .config import add_expedit_config

        return add_expedit_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
