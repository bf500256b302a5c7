"""Training and evaluation with Detectron2, from YAML configs and from LazyConfigs."""

from .checkpoint import (
    Checkpointer,
    frozen_weights,
    load_weights,
    slim_checkpoint,
    surplus_layers,
)
from .config import choose_device
from .errors import one_sentence
from .imports import import_modules
from .launch import launch
from .lazy import evaluate_lazy, load_lazy_model, train_lazy
from .lazy_config import load_lazy_config
from .outputs import check_file, check_folder, check_new_file
from .pypi_weights import PyPIWeights
from .ranges import check_ranges
from .safe_config import load_yaml
from .solver import add_solver_config
from .trainer import Trainer, check_data_sets
from .yaml_config import merge_file, merge_overrides

__all__ = [
    "Checkpointer",
    "PyPIWeights",
    "Trainer",
    "add_solver_config",
    "check_data_sets",
    "check_file",
    "check_folder",
    "check_new_file",
    "check_ranges",
    "choose_device",
    "evaluate_lazy",
    "frozen_weights",
    "import_modules",
    "launch",
    "load_lazy_config",
    "load_lazy_model",
    "load_weights",
    "load_yaml",
    "merge_file",
    "merge_overrides",
    "one_sentence",
    "slim_checkpoint",
    "surplus_layers",
    "train_lazy",
]
