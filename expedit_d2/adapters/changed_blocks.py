"""Refuses blocks whose code was changed, where an adapter runs their parts by itself.

What a subclass, a wrapper or a forward hook does to such a block or to its attention would be
passed over without a word, and the output would be wrong.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import nn

from .spec import TransformerSpec

__all__ = ["refuse_changed_blocks", "refuse_changed_part"]

#: Their wrappers (activation checkpoints, compiled modules) change no values.
_WRAPPERS = ("torch", "fairscale")


def refuse_changed_blocks(spec: TransformerSpec, first: int, inside: bool) -> None:
    """Check the blocks of a stage that will run on reduced tokens.

    Args:
        spec: of the stage.
        first: index of the first of these blocks.
        inside: whether a method reduces inside of them, which takes all of them apart.

    Raises:
        ValueError: for code that is not the library's, or a forward hook; names the block.
    """
    for index in range(first, len(spec.blocks)):
        block = spec.blocks[index]
        parts = [*spec.taken_apart(block), *([block] if inside else [])]
        for part in dict.fromkeys(parts):
            refuse_changed_part(spec, index, part)


def refuse_changed_part(
    spec: TransformerSpec, index: int, part: nn.Module, with_hooks: bool = True
) -> None:
    """Check one part of block ``index``, or the block; ``with_hooks``: and its forward hooks.

    Raises:
        ValueError: as `refuse_changed_blocks`.
    """
    if not spec.packages:
        return
    known = (*spec.packages, *_WRAPPERS)
    own, code = vars(part).get("forward"), type(part).forward
    hooks = (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
    if own is not None and _code(own) is not spec.fused and not _is_of(own, known):
        changed = f"a forward of its own in its {type(part).__name__}"
    elif not _is_of(code, known):
        changed = f"the code of {code.__module__}.{code.__qualname__}"
    elif with_hooks and not all(_is_of(hook, known) for hook in hooks):
        changed = f"a forward hook on its {type(part).__name__}"
    else:
        return
    raise ValueError(
        f"block {index} has {changed}, which Expedit would pass over, as it runs the parts of "
        "these blocks by itself: remove it, or register an adapter for them (docs/adapters.md)"
    )


def _code(function: Any) -> Any:
    return _code(function.func) if isinstance(function, partial) else function


def _is_of(function: Any, packages: Collection[str]) -> bool:
    """Whether a function or method, or what a partial calls, is defined in one of the packages."""
    module = getattr(_code(function), "__module__", None) or ""
    return module.partition(".")[0] in packages
