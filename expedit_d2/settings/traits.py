"""What settings and budgets ask of a method, and the registry of methods."""

from __future__ import annotations

import inspect
from typing import Any

from ..registry import Registry

__all__ = ["METHOD_REGISTRY", "MethodTraits", "default_method"]

_BUDGET_RULES = ("late", "evenly", "every")


class MethodTraits:
    """Set by the class of a method; see `expedit_d2.methods.Method`."""

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
    #: Whether RESIDUAL None rebuilds the change of the clusters on top of the original tokens.
    residual = False
    #: Whether it needs attention windows that divide the map.
    whole_windows = False
    #: Where BUDGET lets it reduce: once, "late" (see `GridRule`); a few times, "evenly" (see
    #: `MERGES`); or at "every" block.
    budget_rule = "late"


def _check(name: str, method: Any) -> None:
    if not (isinstance(method, type) and issubclass(method, MethodTraits)):
        raise TypeError(f"method {name} must be a subclass of expedit_d2.methods.Method")
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
METHOD_REGISTRY: Registry[type[MethodTraits]] = Registry(
    "method", "expedit_d2.methods", _check, own="expedit_d2.methods"
)


def default_method(unstructured: bool) -> str:
    """The method for METHOD None, unstructured or on a grid."""
    return "merge" if unstructured else "expedit"
