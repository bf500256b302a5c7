"""Evaluation: Detectron2's evaluators, and agreement with the plain model."""

from .agreement import Agreement
from .build import build_evaluator
from .finite import watch_finite

__all__ = ["Agreement", "build_evaluator", "watch_finite"]
