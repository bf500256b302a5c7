"""The interface of a method."""

from __future__ import annotations

from abc import ABC
from typing import Any

from torch import nn

from ..settings import MethodTraits, Settings
from ..settings.spread import Spread, equal

__all__ = ["Method"]


class Method(MethodTraits, nn.Module, ABC):
    """A pair of parameter-free modules; what they share passes through an explicit record.

    Subclass `GridMethod` or `UnstructuredMethod`, which leave one or two functions to write, or
    this class.
    """

    #: (Tokens, Keys) -> (fewer Tokens, record).
    reduce: nn.Module
    #: (features (B, *shape, D) of the reduced tokens, record, residual) -> features (B, H, W, D);
    #: residual: None to follow the settings, False for features that are not tokens, such as class
    #: logits.
    rebuild: nn.Module

    def __init__(self, settings: Settings, attention_window: int | None, index: int = 0) -> None:
        """
        Args:
            settings: checked settings.
            attention_window: side, in tokens, of the model's attention windows; None: no windows.
            index: of the alpha that it reduces at, among those of the settings.

        Raises:
            ValueError: for settings that do not fit the windows.
        """
        super().__init__()

    @classmethod
    def adds_residual(cls, settings: Settings) -> bool:
        """Whether rebuilding adds the change of the clusters to the original tokens."""
        if settings.reconstruct_at == "head":
            return False  # what is rebuilt are not tokens
        return cls.residual if settings.residual is None else settings.residual

    @staticmethod
    def joined(earlier: Any, later: Any) -> Any | None:
        """The records of two successive reductions joined into one; None if they cannot be."""
        return None

    @staticmethod
    def spread(settings: Settings) -> Spread:
        """How one KEEP is spread over several alphas."""
        return equal

    @staticmethod
    def least(entering: float) -> float:
        """The smallest share of all tokens that one reduction can leave of a share."""
        return 0.0

    @staticmethod
    def cost(settings: Settings, tokens: float, clusters: float, channels: int) -> float:
        """Multiply-adds of reducing and rebuilding once; 0 where they do not matter.

        Args:
            settings: the method's settings, except its counts.
            tokens: tokens of an image before the reduction.
            clusters: clusters after it; with SCOPE "window", those of one window.
            channels: width of the tokens.
        """
        return 0.0
