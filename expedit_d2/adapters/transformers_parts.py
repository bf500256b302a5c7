"""Parts shared by the adapters of Hugging Face's models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..compat import attention_of, checkpointing_of, recorded_outputs
from .versions import unfit

__all__ = [
    "RecordedLayout",
    "check_masks",
    "check_parts",
    "checkpointed",
    "pair",
    "refuse_attentions",
    "refuse_mask",
]

#: Implementations of attention that take an additive mask.
_MASKED = ("sdpa", "eager")


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of a setting that may be a single number."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def check_masks(config: Any) -> None:
    """
    Raises:
        ValueError: if the model's attention takes no mask, as SIZE_AWARE needs it.
    """
    implementation = attention_of(config)
    if implementation not in _MASKED:
        raise ValueError(
            f"SIZE_AWARE needs attn_implementation to be one of {_MASKED}, which take a mask, got "
            f"{implementation!r}; load the model with one of these, or set SIZE_AWARE False"
        )


def check_parts(model: nn.Module, modules: Any, *names: str) -> None:
    """
    Args:
        model: the transformer, for error messages.
        modules: its layers.
        names: attributes that each layer must have, dotted for those of its parts.

    Raises:
        ValueError: if one is missing, as in another version of the library.
    """
    for module in modules:
        for name in names:
            part = module
            for step in name.split("."):
                if not hasattr(part, step):
                    raise unfit(type(model).__name__, "transformers")
                part = getattr(part, step)


class RecordedLayout:
    """Mixin for layouts of models that record hidden states by forward hooks on their layers."""

    watched = True

    def reads_outputs(self, kwargs: Mapping[str, Any]) -> bool:
        return "hidden_states" in recorded_outputs()


def refuse_mask(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model, as its layers get masks that it makes or adds to by itself.

    Raises:
        ValueError: if the model is given a mask.
    """
    if kwargs.get("attention_mask") is not None:
        raise ValueError(
            "attention_mask is not supported with Expedit, as it is for all tokens: leave it out"
        )


def refuse_attentions(requested: bool) -> None:
    """
    Raises:
        ValueError: if attention weights are requested.
    """
    if requested:
        raise ValueError(
            "output_attentions is not supported with Expedit, which attends to clusters: set it "
            "False"
        )


def checkpointed(layer: nn.Module, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, with gradient checkpointing if the layer uses it."""
    if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
        return checkpointing_of(layer)(partial(function, **kwargs), *args)
    return function(*args, **kwargs)
