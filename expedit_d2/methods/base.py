"""The interface of a method, and the registry of methods, which other packages can add to.

The traits of a method are on its class, where `expedit_d2.settings` and `expedit_d2.budget` read
them.
"""

from __future__ import annotations

import inspect
from abc import ABC
from typing import TYPE_CHECKING, Any

from torch import nn

from ..registry import Registry
from .spread import Spread, equal

if TYPE_CHECKING:
    from ..settings import Settings

__all__ = ["METHOD_REGISTRY", "Method"]

_BUDGET_RULES = ("late", "early", "every")


class Method(nn.Module, ABC):
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

    #: Settings that say how many tokens are left; exactly one of them is given.
    counts: tuple[str, ...] = ()
    #: The other settings that it reads; all others must keep their defaults.
    reads: frozenset[str] = frozenset(
        {"size_aware", "positions", "residual", "reconstruct_at", "fused_attention"}
    )
    #: Whether the tokens it leaves do not lie on a grid.
    unstructured = False
    #: Whether it reduces inside the block after alpha, between its attention and its MLP.
    inside = False
    #: Where BUDGET lets it reduce: once, "late" (see `GridRule`); a few times, "early" (see
    #: `MergeRule`); or at "every" block.
    budget_rule = "late"

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

    @staticmethod
    def joined(earlier: Any, later: Any) -> Any | None:
        """The records of two successive reductions joined into one; None if they cannot be."""
        return None

    @staticmethod
    def spread(settings: Settings) -> Spread:
        """How one KEEP is spread over several alphas."""
        return equal

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


def _check(name: str, method: Any) -> None:
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError(f"method {name} must be a subclass of {Method.__module__}.Method")
    if inspect.isabstract(method):
        raise TypeError(f"method {name} needs {', '.join(sorted(method.__abstractmethods__))}")
    if not method.counts:
        raise TypeError(f"method {name} needs counts, such as ('grid', 'ratio') or ('keep',)")
    if method.budget_rule not in _BUDGET_RULES:
        raise TypeError(
            f"budget_rule of method {name} must be one of {_BUDGET_RULES}, got "
            f"{method.budget_rule!r}"
        )


#: Name in ``METHOD`` -> class::
#:
#:     @METHOD_REGISTRY.register("mine")
#:     class Mine(GridMethod):
#:         ...
METHOD_REGISTRY: Registry[type[Method]] = Registry("method", "expedit_d2.methods", _check)
