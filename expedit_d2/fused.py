"""`fuse_attention`: a model's own attention through PyTorch's fused kernels, weights untouched.

Detectron2's ViT and Swin compute attention step by step and hold the logits of all pairs. With
their layers fused, a plain model and an expedited one are compared at the same quality of code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from .adapters import find_transformer
from .adapters.changed_blocks import refuse_changed_part

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Handle", "fuse_attention"]


class Handle:
    """Undoes a change of a model; also a context manager that does so on exit."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Put the model back exactly as it was. Safe to call more than once."""
        undo, self._undo = self._undo, lambda: None
        undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def fuse_attention(model: nn.Module) -> Handle:
    """Run every attention layer of a vision transformer by scaled dot-product attention.

    Outputs equal those of the model's own layers up to rounding; parameters, modules and state-dict
    keys stay the same. Layers that are fused already, such as all of timm's, are left as they are.
    Works on plain models and on expedited ones, whose blocks on reduced tokens are fused anyway.

    Example:

        with fuse_attention(model):
            outputs = model(inputs)

    Args:
        model: a supported ViT, or any model that contains exactly one.

    Returns:
        A handle; ``handle.remove()`` undoes it, as does leaving its ``with`` block.

    Raises:
        ValueError: for a model that is not supported, or has attention of its own.
    """
    spec = find_transformer(model)
    layers = []
    if spec.fused is not None:
        for stage in spec.stages or (spec,):
            for index in range(len(stage.blocks)):
                layers.append(stage.blocks[index].attn)
                refuse_changed_part(stage, index, layers[-1], with_hooks=False)
    layers = [layer for layer in layers if "forward" not in vars(layer)]
    for layer in layers:
        # Takes precedence over the class's own; is copied and pickled with the layer.
        layer.forward = partial(spec.fused, layer)

    def undo() -> None:
        for layer in layers:
            vars(layer).pop("forward", None)

    return Handle(undo)
