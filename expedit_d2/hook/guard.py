"""Refuses calls of the reduced blocks outside of a pass, or routes them to the pass they are in.

A model that takes its blocks by index, or takes them apart, would run them on all tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

__all__ = ["guard", "swap_running"]

#: ``block``: the block that a pass is running in this thread; ``step``: the step that called it,
#: where the block's own hooks run around it.
_running = threading.local()


def swap_running(block: nn.Module | None, step: Any) -> tuple[nn.Module | None, Any]:
    """Set what is running in this thread; returns what was running before."""
    outer = getattr(_running, "block", None), getattr(_running, "step", None)
    _running.block, _running.step = block, step
    return outer


def _forward_watched(block: nn.Module, own: Callable | None, *args: Any, **kwargs: Any) -> Any:
    """``forward`` of a block whose hooks see whole maps: a step of the pass that called it.

    Args:
        own: the block's own ``forward``, if it had one that was not its class's.
    """
    step = getattr(_running, "step", None)
    if step is None or step._block is not block:
        forward = partial(type(block).forward, block) if own is None else own
        return forward(*args, **kwargs)
    return step._run.run(step, *args, **kwargs)


def _first_layer(block: nn.Module) -> nn.Module:
    """What runs first when a block is taken apart. A layer without weights may be shared."""
    return next((m for m in block.children() if any(True for _ in m.parameters())), block)


def _refuse_alone(index: int, first: int, module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of block ``index`` and of its first layer, which only a pass may call."""
    if getattr(_running, "block", None) is None:
        raise ValueError(
            f"block {index}, or its {type(module).__name__}, was called by itself, past the loop "
            f"over the blocks in which Expedit reduces the tokens from ALPHA {first} on: the model "
            "must loop over its blocks and call each as a whole, or be left as it is"
        )


def guard(blocks: Mapping[int, nn.Module], watched: bool) -> Callable[[], None]:
    """Guard the blocks that run on reduced tokens.

    Args:
        blocks: by their index, from the first that reduces.
        watched: whether their hooks see whole maps (see `Layout`): calls are then routed.

    Returns:
        The function that undoes it.
    """
    first = min(blocks)
    hooks, routed = [], []
    for index, block in blocks.items():
        if watched:
            own = vars(block).get("forward")
            block.forward = partial(_forward_watched, block, own)
            routed.append((block, own, block.forward))
            # Its parts may run again on their own, when the block uses gradient checkpointing.
            guarded = [block]
        else:
            guarded = dict.fromkeys((block, _first_layer(block)))
        for module in guarded:
            hook = partial(_refuse_alone, index, first)
            hooks.append(module.register_forward_pre_hook(hook))

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        for block, own, forward in routed:
            if vars(block).get("forward") is not forward:
                continue  # somebody else's by now
            del block.forward
            if own is not None:
                block.forward = own

    return undo
