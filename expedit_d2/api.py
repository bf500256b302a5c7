"""`expedite`: the single entry point, from Python and from ``MODEL.EXPEDIT``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from .adapters import TransformerSpec, find_transformer
from .adapters.changed_blocks import refuse_changed_blocks
from .budget import within_budget
from .fused import Handle, fuse_attention
from .hook import ExpeditedBlocks
from .methods import METHOD_REGISTRY, build_method
from .settings import Settings, describe

__all__ = ["Expedited", "apply", "expedite", "expedite_from_node", "is_expedited"]


_logger = logging.getLogger(__name__)


class Expedited(Handle):
    """Handle of an expedited model; also a context manager that undoes it on exit.

    Attributes:
        settings: the settings in force.
        blocks: the `ExpeditedBlocks` now in the model; None if only its attention is fused.
    """

    def __init__(
        self,
        settings: Settings,
        blocks: ExpeditedBlocks | None,
        undo: Callable[[], None],
        transformer: str,
    ) -> None:
        super().__init__(undo)
        self.settings = settings
        self.blocks = blocks
        self._transformer = transformer
        self._removed = False

    def remove(self) -> None:
        """Put the model back exactly as it was. Safe to call more than once."""
        super().remove()
        self._removed = True

    def __repr__(self) -> str:
        """The transformer, its settings in the form of `tools/compare.py`, and whether it is on."""
        text = describe(self.settings, method=self.blocks is not None)
        if self.blocks is not None:
            text += f", {len(self.blocks)} blocks"
        removed = ", removed" if self._removed else ""
        return f"Expedited({self._transformer}: {text}{removed})"


def expedite(
    model: nn.Module,
    alpha: int | tuple[int, ...] | None = None,
    outputs: Collection[int] | None = None,
    **settings: Any,
) -> Expedited:
    """Make a vision transformer run its later blocks on fewer tokens.

    Example:

        with expedite(model, budget=0.5):  # half of the GFLOPs of its blocks
            outputs = model(inputs)

        handle = expedite(model, alpha=10, grid=(28, 28))

    Args:
        model: a supported ViT, or any model that contains exactly one.
        alpha: number of blocks run before clustering, 0 to depth - 1, counted over all stages of
            the model; several cluster again and again.
        outputs: indices of the blocks whose output is read, each rebuilt to the full map, counted
            in their stage; None: those that the model's family reads, else all.
        **settings: budget, or alpha with grid, ratio, keep or budget; temperature, …: see
            `expedit_d2.settings.Settings`.

    Returns:
        A handle; ``handle.remove()`` undoes it, as does leaving its ``with`` block.

    Raises:
        ValueError: for settings that are out of range or reduce nothing, or a model that is not
            supported or already expedited.
        TypeError: for a keyword that is not a setting.
    """
    unknown = Settings.unknown(settings)
    if unknown:
        raise TypeError(f"expedite() has no setting {unknown}")
    return apply(model, Settings(alpha=alpha, **settings), outputs)


def apply(
    model: nn.Module, settings: Settings, outputs: Collection[int] | None = None
) -> Expedited:
    """`expedite`, given a `Settings` object; ``model`` and ``outputs`` are as there.

    Raises:
        ValueError: as `expedite`.
    """
    if not (settings.reduces or settings.fused_attention):
        raise ValueError(
            "neither ALPHA nor BUDGET is set, so nothing would be reduced: set BUDGET, such as 0.5 "
            "for half of the GFLOPs, or ALPHA and one of GRID, RATIO and KEEP"
        )
    if is_expedited(model):
        raise ValueError("the model is already expedited; remove() the first handle before")
    spec = find_transformer(model)
    transformer = type(spec.whole).__name__
    if settings.budget is not None:
        budget, settings = settings, within_budget(settings, spec)
        _logger.info("%s: %s -> %s", transformer, describe(budget), describe(settings, method=True))
    if not settings.alphas:
        return Expedited(settings, None, fuse_attention(model).remove, transformer)
    _check_that_it_fits(settings, spec)
    spec, first = spec.stage_of(settings.alphas)
    inside = METHOD_REGISTRY[settings.method].inside
    refuse_changed_blocks(spec, min(settings.alphas) - first, inside)
    layout, original = spec.layout(settings.size_aware), spec.blocks
    blocks = ExpeditedBlocks(
        original,
        layout,
        {
            alpha - first: build_method(settings, spec.window, index)
            for index, alpha in enumerate(settings.alphas)
        },
        spec.outputs if outputs is None else _checked_outputs(outputs, len(original)),
        settings.reconstruct_at == "backbone",
        spec.end,
    )
    blocks.training = original.training
    # First, as it may refuse the model.
    fused = fuse_attention(model) if settings.fused_attention else Handle(lambda: None)
    detach, unguard = spec.attach(model), blocks.guard()
    setattr(spec.owner, spec.attribute, blocks)

    def undo() -> None:
        fused.remove()
        original.training = blocks.training
        setattr(spec.owner, spec.attribute, original)
        unguard()
        detach()

    return Expedited(settings, blocks, undo, transformer)


def _check_that_it_fits(settings: Settings, spec: TransformerSpec) -> None:
    """Whether the transformer can do what the method needs."""
    method, transformer = METHOD_REGISTRY[settings.method], type(spec.whole).__name__
    if "scope" in method.reads and settings.scope not in spec.scopes:
        raise ValueError(
            f"SCOPE must be one of {spec.scopes} for {transformer}, got {settings.scope!r}"
        )
    if method.unstructured and not spec.unstructured:
        raise ValueError(
            f"METHOD {settings.method} leaves tokens on no grid, and there are convolutions "
            f"between the blocks of this {transformer}; METHOD expedit keeps a grid"
        )
    if method.inside and not spec.stage_of(settings.alphas)[0].inside:
        raise ValueError(
            f"METHOD {settings.method} works inside of the blocks, and those of {transformer} "
            "cannot be taken apart; METHOD merge works before them"
        )


def _checked_outputs(outputs: Collection[int], depth: int) -> tuple[int, ...]:
    several = isinstance(outputs, Collection) and not isinstance(outputs, str)
    if not several or not outputs or not all(type(i) is int and 0 <= i < depth for i in outputs):
        raise ValueError(
            f"outputs must be indices of blocks, each in 0 to {depth - 1}, or None, got {outputs!r}"
        )
    return tuple(outputs)


def expedite_from_node(model: nn.Module, node: Mapping[str, Any]) -> Expedited | None:
    """`expedite` as a ``MODEL.EXPEDIT`` node says; None if it is not enabled.

    Raises:
        ValueError: as `expedite`, naming the key.
    """
    settings = Settings.from_node(node)
    return None if settings is None else apply(model, settings)


def is_expedited(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is expedited now."""
    return any(isinstance(module, ExpeditedBlocks) for module in model.modules())
