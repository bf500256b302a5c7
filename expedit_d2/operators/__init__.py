"""Token clustering and token reconstruction: the two parameter-free layers of Expedit.

Source: Liang et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without
Fine-tuning", NeurIPS 2022, arXiv 2210.01035, section 3.2. Needs torch and nothing else.
"""

from .checks import AUTO, NORMALIZATIONS, check_grid, check_temperature, check_window
from .clustering import Clusters, TokenClustering, cluster_tokens
from .maps import adaptive_pool, grid_positions, on_device
from .reconstruction import TokenReconstruction, reconstruct_tokens

__all__ = [
    "AUTO",
    "NORMALIZATIONS",
    "Clusters",
    "TokenClustering",
    "TokenReconstruction",
    "adaptive_pool",
    "check_grid",
    "check_temperature",
    "check_window",
    "cluster_tokens",
    "grid_positions",
    "on_device",
    "reconstruct_tokens",
]
