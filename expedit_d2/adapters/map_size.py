"""The size of the map behind tokens (B, N, C), which the blocks are not given.

It belongs to the tokens of one forward pass and is never taken from another. In this order:

- It travels with the tensors from the patch embedding to the first block.
- Gradient checkpointing may run the blocks again, on another tensor with the same memory.
- A model that embeds patches in its own way: of the maps that were embedded in the same forward,
  only one has that many tokens.
- The same of all that the model has ever embedded, for blocks that run outside of its forward.

Otherwise the size is unknown, which is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..compat import POSITIONED, StorageWeakRef, version_of
from ..tracing import in_graph, shape_of

__all__ = ["MapSizes", "Size"]

#: Rows and columns of a map, in tokens.
Size = tuple[int, int]

# Name of an attribute of tensors: a `Size`.
_LABEL = "expedit_map_size"


class MapSizes:
    """What is known about the maps that one model was given; a copy knows nothing."""

    def __init__(self) -> None:
        self._ever: dict[int, set[Size]] = {}
        self._memory: dict[StorageWeakRef, tuple[int, Size]] = {}
        self._forwards = threading.local()

    def __reduce__(self) -> tuple[type, tuple]:
        return MapSizes, ()

    def attach(self, model: nn.Module, owner: nn.Module) -> Callable[[], None]:
        """Follow the maps of a timm transformer.

        Args:
            model: the transformer, or what contains it, whose forwards are distinguished.
            owner: the transformer, with ``patch_embed``, ``_pos_embed`` and ``norm_pre``.

        Returns:
            The function that undoes it.
        """
        embed = owner.patch_embed
        hooks = [embed.register_forward_hook(self._embedded)]
        for name in ("patch_drop", "norm_pre"):
            part = getattr(owner, name, None)
            if isinstance(part, nn.Module):
                hooks.append(part.register_forward_hook(_carry))
        # For callers that take a patch embedding apart, such as the ResNet of a hybrid.
        forget = self.attach_projection(model, owner, embed.proj)
        own = vars(owner).get(POSITIONED)
        setattr(owner, POSITIONED, partial(_positioned, own, owner))

        def detach() -> None:
            forget()
            for hook in hooks:
                hook.remove()
            if own is None:
                delattr(owner, POSITIONED)
            else:
                setattr(owner, POSITIONED, own)

        return detach

    def attach_projection(
        self, model: nn.Module, owner: nn.Module, projection: nn.Module
    ) -> Callable[[], None]:
        """Follow the maps that a convolution makes, by the forwards it runs in.

        Args:
            model, owner: see `attach`.
            projection: its output is (B, C, H, W).

        Returns:
            The function that undoes it.
        """
        hooks = [projection.register_forward_hook(self._projected)]
        for module in dict.fromkeys((model, owner)):
            hooks.append(module.register_forward_pre_hook(self._enter))
            hooks.append(module.register_forward_hook(self._leave, always_call=True))

        def detach() -> None:
            for hook in hooks:
                hook.remove()

        return detach

    def of(self, x: Tensor, prefix: int) -> Size | None:
        """The size of the map of tokens (B, prefix + H * W, C), or None."""
        known = getattr(x, _LABEL, None)
        if in_graph():
            return known or _only(self._forward())
        if known is None:
            known = self._remembered(x)
        if known is None:
            count = shape_of(x)[1] - prefix
            here = {size for size in self._forward() if size[0] * size[1] == count}
            known = _only(here or self._ever.get(count, ()))
        if known is not None:
            self._remember(x, known)
        return known

    def unknown(self, count: int) -> ValueError:
        """Why the size of a map of ``count`` tokens is not known, and what to do."""
        sizes = [f"{h} x {w}" for h, w in sorted(self._ever.get(count, ()))]
        seen = f"the model has made maps of {' and '.join(sizes)}" if sizes else "none was made"
        return ValueError(
            f"the size of a map of {count} tokens is not known where the blocks begin ({seen}): "
            "run the model as a whole, or loop over "
            "expedit_d2.sized_blocks(blocks, (rows, columns)) instead of its blocks"
        )

    def _forward(self) -> list[Size]:
        """Maps that were made in this thread's innermost forward."""
        stack = getattr(self._forwards, "stack", None)
        return stack[-1][1] if stack else []

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not hasattr(self._forwards, "stack"):
            self._forwards.stack = []
        self._forwards.stack.append((module, []))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # Without its own frame if another hook raised an error before `_enter`; and above that may
        # be those of forwards that were interrupted.
        stack = getattr(self._forwards, "stack", [])
        if any(entered is module for entered, _ in stack):
            while stack.pop()[0] is not module:
                pass

    def _embedded(self, embed: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        setattr(output, _LABEL, self._made(embed.dynamic_feat_size(shape_of(args[0])[-2:])))

    def _projected(self, proj: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self._made(shape_of(output)[-2:])

    def _made(self, size: Iterable[int]) -> Size:
        size = tuple(size)
        here = self._forward()
        if size not in here:
            here.append(size)
        if not in_graph():
            self._ever.setdefault(size[0] * size[1], set()).add(size)
        return size

    # Blocks run again only for gradients; and memory that is written to in between, such as an
    # input buffer, counts its versions.

    def _remembered(self, x: Tensor) -> Size | None:
        if not x.requires_grad:
            return None
        version, size = self._memory.get(StorageWeakRef(x.untyped_storage()), (None, None))
        return size if version == version_of(x) else None

    def _remember(self, x: Tensor, size: Size) -> None:
        if x.requires_grad:
            for memory in list(self._memory):  # other threads may do the same
                if memory.expired():
                    self._memory.pop(memory, None)
            self._memory[StorageWeakRef(x.untyped_storage())] = (version_of(x), size)


def _only(sizes: Iterable[Size]) -> Size | None:
    """The one size that there is, or None."""
    first, *others = [*sizes] or [None]
    return None if others else first


def _carry(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    """Forward hook: tokens keep their label."""
    size = getattr(args[0], _LABEL, None)
    if size is not None:
        setattr(output, _LABEL, size)


def _positioned(own: Callable | None, owner: nn.Module, x: Tensor) -> Any:
    """``_pos_embed`` of timm's transformers, whose result is tokens, or a tuple that starts so."""
    out = getattr(type(owner), POSITIONED)(owner, x) if own is None else own(x)
    _carry(owner, (x,), out[0] if isinstance(out, tuple) else out)
    return out
