"""The official learning rate schedule, beside Detectron2's own."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from fvcore.common.param_scheduler import ParamScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["build_lr_scheduler"]


class _Poly(ParamScheduler):
    """From 1 at the start to ``end``, with a power of what is left of the training."""

    def __init__(self, power: float, end: float) -> None:
        self.power = power
        self.end = end

    def __call__(self, where: float) -> float:
        return self.end + (1 - self.end) * (1 - where) ** self.power


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Detectron2's schedules, and ``PolyLR`` from BASE_LR to BASE_LR_END."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "PolyLR":
        return build_detectron2_lr_scheduler(cfg, optimizer)
    poly = _Poly(solver.POLY_LR_POWER, solver.BASE_LR_END / solver.BASE_LR)
    return LRMultiplier(optimizer, poly, solver.MAX_ITER)
