"""Metrics: Detectron2's evaluators by data set, and agreement with the plain model's output."""

from .agreement import InstanceAgreement
from .build import build_evaluator, main_metrics

__all__ = ["InstanceAgreement", "build_evaluator", "main_metrics"]
