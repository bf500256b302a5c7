"""DPT (Ranftl et al., arXiv 2103.13413) and Depth Anything V2 for Detectron2: depth from one image.

- ``config``: its config keys.
- ``modeling``: the model, registered by importing this package.
- ``data``: mapper, KITTI and NYU Depth V2, and any list of images and depth files.
- ``evaluation``: metrics.
- ``convert``: official checkpoints.
- ``trainer``: all of it in the trainer of `expedit_d2.engine`.
"""

from . import modeling as _  # noqa: F401  only registration
from .config import add_dpt_config
from .data import DepthMapper, register_depth_datasets, register_depth_lists
from .evaluation import DepthEvaluator
from .trainer import DPTTrainer

__all__ = [
    "DPTTrainer",
    "DepthEvaluator",
    "DepthMapper",
    "add_dpt_config",
    "register_depth_datasets",
    "register_depth_lists",
]

register_depth_datasets()
