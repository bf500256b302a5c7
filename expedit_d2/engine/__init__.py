"""Training and evaluation with Detectron2, from YAML configs and from LazyConfigs."""

from .checkpoint import Checkpointer, load_weights, slim_checkpoint, surplus_layers
from .config import add_solver_config, choose_device
from .launch import launch
from .lazy import evaluate_lazy, load_lazy_config, load_lazy_model, train_lazy
from .pypi_weights import PyPIWeights
from .safe_config import load_yaml, merge_yaml
from .trainer import Trainer

__all__ = [
    "Checkpointer",
    "PyPIWeights",
    "Trainer",
    "add_solver_config",
    "choose_device",
    "evaluate_lazy",
    "launch",
    "load_lazy_config",
    "load_lazy_model",
    "load_weights",
    "load_yaml",
    "merge_yaml",
    "slim_checkpoint",
    "surplus_layers",
    "train_lazy",
]
