"""The block container that takes the place of a model's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..methods import Method
from ..tokens import Layout
from ..tracing import in_graph
from .guard import guard
from .passes import Pass, Step

__all__ = ["ExpeditedBlocks", "Rebuild", "run_reduced", "sized_blocks"]

#: Features of the reduced tokens (B, M, D), in the order of the tokens, to a map (B, H, W, D).
Rebuild = Callable[[Tensor], Tensor]

#: Where a module keeps its forward hooks.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class ExpeditedBlocks(nn.Module):
    """A block container that reduces the tokens before some blocks and rebuilds the map.

    The blocks keep the names they had, so the state dict keeps its keys.
    """

    def __init__(
        self,
        blocks: nn.Module,
        layout: Layout,
        methods: Mapping[int, Method],
        outputs: Collection[int] | None = None,
        rebuilds: bool = True,
        end: int | None = None,
    ) -> None:
        """
        Args:
            blocks: the model's container (``ModuleList`` or ``Sequential``).
            layout: the adapter of the model's family.
            methods: the method that reduces at each alpha (number of blocks run before).
            outputs: indices of the blocks whose output the model reads, each rebuilt to the full
                map. None: all of them, for models that may read any.
            rebuilds: False leaves rebuilding to the caller of `run_reduced`; the blocks then cannot
                be looped over.
            end: blocks from this index on run as they are, on the whole map; None: no such blocks.

        Raises:
            ValueError: for a method outside 0 to end - 1, or a block that is there twice.
        """
        super().__init__()
        if len(set(map(id, blocks._modules.values()))) < len(blocks._modules):
            raise ValueError(
                "the model runs one of its blocks several times, which is not supported"
            )
        for name, block in blocks.named_children():
            self.add_module(name, block)
        for hooks in _HOOKS:  # of the container, which take and return whole maps
            setattr(self, hooks, getattr(blocks, hooks))
        self.names = tuple(name for name, _ in blocks.named_children())
        self.end = len(self.names) if end is None else end
        if not all(0 <= alpha < self.end for alpha in methods):
            raise ValueError(f"methods must be at 0 to {self.end - 1}, got {sorted(methods)}")
        self.layout = layout
        self.outputs = outputs
        self.rebuilds = rebuilds
        # Not among the blocks' own names; without parameters, so without state-dict keys.
        self.methods = nn.ModuleDict({f"after_{alpha}": m for alpha, m in methods.items()})

    def _replicate_for_data_parallel(self) -> nn.Module:
        """Called by `nn.DataParallel`, whose replicas would read the weights of the original."""
        raise ValueError(
            "nn.DataParallel is not supported with Expedit: use DistributedDataParallel, with a "
            "process for each GPU"
        )

    @property
    def first_alpha(self) -> int:
        """Number of blocks of this container that run on all tokens."""
        return min(self._alphas)

    def _steps(self, run: Pass) -> list[Callable[..., Any]]:
        methods = dict(self.methods.items())
        steps = [
            Step(run, index, self[index], methods.get(f"after_{index}"))
            for index in range(self.end)
        ]
        return steps + [self[index] for index in range(self.end, len(self))]

    @property
    def _alphas(self) -> list[int]:
        return [int(name.removeprefix("after_")) for name in self.methods]

    def looped(
        self,
        outputs: Collection[int] | None,
        size: tuple[int, int] | None = None,
        part: slice = slice(None),
    ) -> list[Callable[..., Any]]:
        """The blocks of one pass, or a part of them; the map is rebuilt after the last one.

        Args:
            outputs: indices of the blocks whose output is read; None: all.
            size: (H, W) of the map, if it is known.
            part: which blocks to return.
        """
        if not self.rebuilds:
            raise ValueError(
                'RECONSTRUCT_AT "head" needs a model whose head runs on clusters, such as '
                'Segmenter; set RECONSTRUCT_AT "backbone"'
            )
        indices = [index for index in range(len(self))[part] if index < self.end]
        late = bool(indices) and indices[0] > self.first_alpha
        if late and not in_graph() and not set(indices) & set(self._alphas):
            warnings.warn(
                f"blocks {indices[0]} to {indices[-1]} run on all tokens, as the model loops over "
                "its blocks in parts and the map is rebuilt after each: ALPHA may name a block of "
                "every part",
                stacklevel=3,
            )
        last = indices[-1:]
        if outputs is not None:
            outputs = {*outputs, *last}
        return self._steps(Pass(self.layout, self._alphas, outputs, size))[part]

    def guard(self) -> Callable[[], None]:
        """Refuse calls of the reduced blocks outside of a pass; returns what undoes it."""
        reduced = {index: self[index] for index in range(self.first_alpha, self.end)}
        return guard(reduced, self.layout.watched)

    def run_reduced(self, x: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Rebuild]:
        """See the function `run_reduced`."""
        run = Pass(self.layout, self._alphas, outputs=(), size=size)
        for step in self._steps(run):
            x = step(x)
        ((_, state),) = run.states[len(self.names) - 1]
        shape = state.tokens.shape

        def rebuild(features: Tensor) -> Tensor:
            features = features.unflatten(1, shape)
            for method, record in reversed(state.records):
                # These are not tokens to which a change could be added.
                features = method(features, record, residual=False)
            return features

        return x, rebuild

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter(self.looped(self.outputs))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: int | slice) -> Any:
        if isinstance(key, slice):
            return self.looped(self.outputs, part=key)
        return getattr(self, self.names[key])

    def forward(self, x: Tensor) -> Tensor:
        """All blocks in turn, as ``nn.Sequential`` runs them; only the last output is read."""
        for step in self.looped(outputs=()):
            x = step(x)
        return x


def sized_blocks(blocks: nn.Module, size: tuple[int, int]) -> Iterable[Callable[..., Tensor]]:
    """The blocks to loop over, for code that runs them itself and knows the size of the map.

    Example:

        for block in sized_blocks(vit.blocks, (height // 16, width // 16)):
            x = block(x)

    Args:
        blocks: the block container, expedited or plain.
        size: (H, W) in tokens.
    """
    if isinstance(blocks, ExpeditedBlocks):
        return blocks.looped(blocks.outputs, size)
    return blocks


def run_reduced(
    blocks: nn.Module, x: Tensor, size: tuple[int, int] | None = None
) -> tuple[Tensor, Rebuild | None]:
    """Run a model's blocks without rebuilding the map, for a head that works on clusters.

    Args:
        blocks: the block container, expedited or plain.
        x: what the first block takes.
        size: (H, W) of the map in tokens; None: the size that the embedding has seen.

    Returns:
        The output of the last block, class tokens included, and the function that rebuilds a map
        from features of its spatial tokens (without RESIDUAL, which is for tokens only), or None if
        nothing was reduced.
    """
    if isinstance(blocks, ExpeditedBlocks):
        return blocks.run_reduced(x, size)
    for block in blocks:
        x = block(x)
    return x, None
