"""Optimizer and learning rate schedule as official configs ask for them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

__all__ = ["build_lr_scheduler", "build_optimizer"]

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
# Positions of Swin and of plain ViTs, which are not decayed.
_POSITIONS = (
    "relative_position_bias_table",
    "absolute_pos_embed",
    "pos_embed",
    "rel_pos_h",
    "rel_pos_w",
)


def _param_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Every trained parameter once, with its learning rate and weight decay."""
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
    """An optimizer that first limits the norm of the gradient of all parameters together."""

    class Clipping(kind):
        def step(self, closure: Any = None) -> Any:
            parameters = itertools.chain(*(group["params"] for group in self.param_groups))
            nn.utils.clip_grad_norm_(parameters, limit)
            return super().step(closure)

    return Clipping


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW, the backbone slower by ``SOLVER.BACKBONE_MULTIPLIER``.

    ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` may be "full_model" beside Detectron2's own types.

    Raises:
        ValueError: for an unknown ``SOLVER.OPTIMIZER``.
    """
    kinds = {"SGD": torch.optim.SGD, "ADAMW": torch.optim.AdamW}
    name = cfg.SOLVER.OPTIMIZER.upper()
    if name not in kinds:
        raise ValueError(f"SOLVER.OPTIMIZER must be one of {sorted(kinds)}, got {name!r}")
    options = {"momentum": cfg.SOLVER.MOMENTUM} if name == "SGD" else {}
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.CLIP_TYPE != "full_model":
        kind = maybe_add_gradient_clipping(cfg, kinds[name])
    elif clip.ENABLED and clip.CLIP_VALUE > 0:
        kind = _clip_all(kinds[name], clip.CLIP_VALUE)
    else:
        kind = kinds[name]
    return kind(_param_groups(cfg, model), lr=cfg.SOLVER.BASE_LR, **options)


def build_lr_scheduler(
    cfg: CfgNode, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """Detectron2's schedules and ``WarmupPolyLR``, which comes with its DeepLab project."""
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return build_detectron2_lr_scheduler(cfg, optimizer)
    from detectron2.projects.deeplab import build_lr_scheduler as build_deeplab_lr_scheduler

    return build_deeplab_lr_scheduler(cfg, optimizer)
