"""Expedit for Detectron2: large vision transformers made faster for dense prediction, untrained.

`TokenClustering` and `TokenReconstruction` are the two operators, `expedite` applies them to a
model, `add_expedit_config` adds them to a Detectron2 config. `fuse_attention` makes a model's own
attention faster and changes nothing else. `sized_blocks` is for code that runs the blocks itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import expedite
    from .config import add_expedit_config
    from .files.shipped import config_file
    from .fused import fuse_attention
    from .hook import sized_blocks
    from .operators import TokenClustering, TokenReconstruction

__version__ = "0.1.0"
__all__ = [
    "TokenClustering",
    "TokenReconstruction",
    "add_expedit_config",
    "config_file",
    "expedite",
    "fuse_attention",
    "sized_blocks",
]

#: Name -> its module, imported when it is asked for: the config needs Detectron2, which the rest
#: does not, and `expedit --help` needs not even torch.
_MODULES = {
    "TokenClustering": ".operators",
    "TokenReconstruction": ".operators",
    "add_expedit_config": ".config",
    "config_file": ".files.shipped",
    "expedite": ".api",
    "fuse_attention": ".fused",
    "sized_blocks": ".hook",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)
