"""What the adapters of Hugging Face's models share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..compat import attention_of, checkpointing_of, recorded_outputs
from .versions import unfit

__all__ = [
    "check_masks",
    "check_parts",
    "checkpointed",
    "pair",
    "records_hidden_states",
    "refuse_attentions",
]

#: Implementations of attention that take an additive mask.
_MASKED = ("sdpa", "eager")


def pair(value: Any) -> tuple[int, int]:
    """The two sides of a setting that may name one for both."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def check_masks(config: Any) -> None:
    """
    Raises:
        ValueError: if the model's attention takes no mask, as SIZE_AWARE needs it.
    """
    implementation = attention_of(config)
    if implementation not in _MASKED:
        raise ValueError(
            f"SIZE_AWARE needs attention that takes a mask, attn_implementation one of {_MASKED}, "
            f"got {implementation!r}; load the model so, or set SIZE_AWARE False"
        )


def check_parts(model: nn.Module, modules: Any, *names: str) -> None:
    """
    Args:
        model: the transformer, whom a message names.
        modules: its layers.
        names: attributes that each must have, with dots between those of its parts.

    Raises:
        ValueError: if one is missing: another version of the library.
    """
    for module in modules:
        for name in names:
            part = module
            for step in name.split("."):
                if not hasattr(part, step):
                    raise unfit(type(model).__name__, "transformers")
                part = getattr(part, step)


def records_hidden_states() -> bool:
    """Whether the model that runs now records hidden states, by forward hooks on its layers."""
    return "hidden_states" in recorded_outputs()


def refuse_attentions(asked: bool) -> None:
    """
    Raises:
        ValueError: if attention weights are asked for.
    """
    if asked:
        raise ValueError(
            "output_attentions is not supported with Expedit, whose attention is that of clusters: "
            "set it False"
        )


def checkpointed(layer: nn.Module, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, checkpointed where the layer would checkpoint its forward."""
    if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
        return checkpointing_of(layer)(partial(function, **kwargs), *args)
    return function(*args, **kwargs)
