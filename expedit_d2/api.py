"""`expedite`: the one way in, from Python and from ``MODEL.EXPEDIT``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from .adapters import find_host
from .budget import within_budget
from .fused import Handle, fuse_attention
from .hook import ExpeditedBlocks
from .methods import build_method
from .settings import OFF_GRID, Settings

__all__ = ["Expedited", "expedite", "expedite_from_node", "is_expedited"]


class Expedited(Handle):
    """Handle of an expedited model; also a context manager that undoes it on exit.

    Attributes:
        settings: the settings in force.
        blocks: the `ExpeditedBlocks` now in the model; None if switched off.
    """

    def __init__(
        self, settings: Settings, blocks: ExpeditedBlocks | None, undo: Callable[[], None]
    ) -> None:
        super().__init__(undo)
        self.settings = settings
        self.blocks = blocks


def expedite(
    model: nn.Module,
    alpha: int | tuple[int, ...] | None = None,
    outputs: Collection[int] | None = None,
    **settings: Any,
) -> Expedited:
    """Make a vision transformer run its later blocks on fewer tokens.

    Example::

        with expedite(model, budget=0.5):  # half of the GFLOPs of its blocks
            outputs = model(inputs)

        handle = expedite(model, alpha=10, grid=(28, 28))

    Args:
        model: a supported ViT, or any model that contains exactly one.
        alpha: number of blocks run before clustering, 0 to depth - 1, counted over all stages of
            the model; several cluster again and again; None reduces nothing.
        outputs: indices of the blocks whose output is read, each rebuilt to the full map; None:
            what is known of the model's family, else all.
        **settings: budget, or instead of it alpha and grid, ratio or keep; temperature, …: see
            `expedit_d2.settings.Settings`.

    Returns:
        A handle; ``handle.remove()`` undoes it, as does leaving its ``with`` block.

    Raises:
        ValueError: for settings out of range, or a model that is not supported or already
            expedited.
    """
    checked = Settings(alpha=alpha, **settings)
    if is_expedited(model):
        raise ValueError("the model is already expedited; remove() the first handle before")
    host = find_host(model)
    if checked.budget is not None:
        checked = within_budget(checked, host)
    if not checked.alphas:
        fused = fuse_attention(model) if checked.fused_attention else Handle(lambda: None)
        return Expedited(checked, None, fused.remove)
    if checked.scope not in host.scopes:
        raise ValueError(
            f"SCOPE must be one of {host.scopes} for {type(host.owner).__name__}, got "
            f"{checked.scope!r}"
        )

    if checked.method in OFF_GRID and not host.off_grid:
        raise ValueError(
            f"METHOD {checked.method} needs global attention in every block, which "
            f"{type(host.owner).__name__} has not; METHOD expedit keeps a grid"
        )
    host, first = host.stage_of(checked.alphas)
    original = host.blocks
    blocks = ExpeditedBlocks(
        original,
        host.layout(checked.size_aware),
        {
            alpha - first: build_method(checked, host.window, index)
            for index, alpha in enumerate(sorted(checked.alphas))
        },
        host.outputs if outputs is None else outputs,
        checked.reconstruct_at == "backbone",
    )
    blocks.train(original.training)
    detach, unguard = host.attach(model), blocks.guard()
    fused = fuse_attention(model) if checked.fused_attention else Handle(lambda: None)
    setattr(host.owner, host.attribute, blocks)

    def undo() -> None:
        fused.remove()
        original.training = blocks.training
        setattr(host.owner, host.attribute, original)
        unguard()
        detach()

    return Expedited(checked, blocks, undo)


def expedite_from_node(
    model: nn.Module, node: Mapping[str, Any], outputs: Collection[int] | None = None
) -> Expedited | None:
    """`expedite` as a ``MODEL.EXPEDIT`` node says; None if it is not enabled.

    A model whose backbone was built expedited from the same config is left as it is.

    Raises:
        ValueError: as `expedite`, naming the key.
    """
    settings = Settings.from_node(node)
    if settings is None or is_expedited(model):
        return None
    values = dict(vars(settings))
    return expedite(model, values.pop("alpha"), outputs, **values)


def is_expedited(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is expedited now."""
    return any(isinstance(module, ExpeditedBlocks) for module in model.modules())
