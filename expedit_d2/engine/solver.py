"""Optimizers and learning rate schedules, and their config keys."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..config import add_keys

__all__ = [
    "add_solver_config",
    "build_lr_scheduler",
    "build_optimizer",
    "default_groups",
    "slow_backbone_groups",
]

_OPTIMIZERS = {"SGD": torch.optim.SGD, "ADAMW": torch.optim.AdamW}
_SOLVER: dict[str, Any] = {
    "OPTIMIZER": "SGD",  # or "ADAMW"
    # For `slow_backbone_groups`: learning rate of the backbone relative to BASE_LR, and weight
    # decay of embeddings.
    "BACKBONE_MULTIPLIER": 0.1,
    "WEIGHT_DECAY_EMBED": 0.0,
    # For LR_SCHEDULER_NAME "PolyLR" and "WarmupPolyLR"; only the latter has a constant ending.
    "POLY_LR_POWER": 0.9,
    "POLY_LR_CONSTANT_ENDING": 0.0,
}
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm),
)
# Position embeddings of plain ViTs and Swin, which have no weight decay.
_VIT_POSITIONS = ("pos_embed", "rel_pos_h", "rel_pos_w")
_POSITIONS = ("relative_position_bias_table", "absolute_pos_embed", *_VIT_POSITIONS)

Groups = list[dict[str, Any]]


def add_solver_config(cfg: CfgNode) -> None:
    """Add the keys of ``SOLVER`` that Detectron2 does not have."""
    add_keys(cfg, {"SOLVER": _SOLVER})


def default_groups(cfg: CfgNode, model: nn.Module) -> Groups:
    """Detectron2's parameter groups; with AdamW, no weight decay for norms and positions."""
    solver = cfg.SOLVER
    if solver.OPTIMIZER.upper() == "SGD":
        return get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )
    overrides = {name: {"weight_decay": 0.0} for name in _VIT_POSITIONS}
    return get_default_optimizer_params(model, weight_decay_norm=0.0, overrides=overrides)


def slow_backbone_groups(cfg: CfgNode, model: nn.Module) -> Groups:
    """One group per trained parameter, with BACKBONE_MULTIPLIER for those of the backbone."""
    solver = cfg.SOLVER
    groups, seen = [], set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            rate, decay = solver.BASE_LR, solver.WEIGHT_DECAY
            if "backbone" in path:
                rate *= solver.BACKBONE_MULTIPLIER
            if name in _POSITIONS:
                decay = 0.0
            elif isinstance(module, _NORMS):
                decay = solver.WEIGHT_DECAY_NORM
            elif isinstance(module, nn.Embedding):
                decay = solver.WEIGHT_DECAY_EMBED
            groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    return groups


def _clip_all(kind: type[torch.optim.Optimizer], limit: float) -> type[torch.optim.Optimizer]:
    """An optimizer that first clips the gradient norm over all parameters."""

    class Clipping(kind):
        def step(self, closure: Any = None) -> Any:
            parameters = itertools.chain(*(group["params"] for group in self.param_groups))
            nn.utils.clip_grad_norm_(parameters, limit)
            return super().step(closure)

    return Clipping


def build_optimizer(
    cfg: CfgNode,
    model: nn.Module,
    groups: Callable[[CfgNode, nn.Module], Groups] = default_groups,
) -> torch.optim.Optimizer:
    """SGD or AdamW, with gradient clipping.

    ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` may also be "full_model", besides Detectron2's types.

    Args:
        cfg: the config.
        model: the model to train.
        groups: returns its parameter groups.

    Raises:
        ValueError: for an unknown ``SOLVER.OPTIMIZER``.
    """
    solver, name = cfg.SOLVER, cfg.SOLVER.OPTIMIZER.upper()
    if name not in _OPTIMIZERS:
        raise ValueError(f"SOLVER.OPTIMIZER must be one of {sorted(_OPTIMIZERS)}, got {name!r}")
    sgd = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    clip, kind = solver.CLIP_GRADIENTS, _OPTIMIZERS[name]
    if clip.CLIP_TYPE != "full_model":
        kind = maybe_add_gradient_clipping(cfg, kind)
    elif clip.ENABLED and clip.CLIP_VALUE > 0:
        kind = _clip_all(kind, clip.CLIP_VALUE)
    return kind(
        groups(cfg, model),
        lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        **(sgd if name == "SGD" else {}),
    )


class _Poly(ParamScheduler):
    """Polynomial decay from 1 to ``end``."""

    def __init__(self, power: float, end: float) -> None:
        self.power = power
        self.end = end

    def __call__(self, where: float) -> float:
        return self.end + (1 - self.end) * (1 - where) ** self.power


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Detectron2's schedules, DeepLab's ``WarmupPolyLR``, and ``PolyLR`` down to BASE_LR_END."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "PolyLR":
        poly = _Poly(solver.POLY_LR_POWER, solver.BASE_LR_END / solver.BASE_LR)
        return LRMultiplier(optimizer, poly, solver.MAX_ITER)
    if solver.LR_SCHEDULER_NAME == "WarmupPolyLR":
        from detectron2.projects.deeplab import build_lr_scheduler as build_deeplab_lr_scheduler

        return build_deeplab_lr_scheduler(cfg, optimizer)
    return build_detectron2_lr_scheduler(cfg, optimizer)
