"""Runs a model's blocks: reduces the tokens after alpha of them, rebuilds the map at the end.

`ExpeditedBlocks` takes the place of a model's block container. The model loops over it as before;
each loop gets callables of its own that share that loop's state, so calls may overlap and nothing
is kept between them. The model, its blocks and its state-dict keys are untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .tokens import Layout, Method, Tokens

__all__ = ["ExpeditedBlocks", "Rebuild", "run_reduced"]

#: Features of the reduced tokens (B, M, D), in the order of the tokens, to a map (B, H, W, D).
Rebuild = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _State:
    """What one block leaves to the next; ``x`` and ``tokens`` are None before a reduction."""

    x: Tensor | None = None
    tokens: Tokens | None = None
    records: tuple[tuple[nn.Module, Any], ...] = ()


def _appended(
    records: tuple[tuple[nn.Module, Any], ...], rebuild: nn.Module, record: Any
) -> tuple[tuple[nn.Module, Any], ...]:
    """The records with one more; two that can be taken as one are."""
    if records and hasattr(record, "then") and type(record) is type(records[-1][1]):
        *before, (_, last) = records
        return (*before, (rebuild, last.then(record)))
    return (*records, (rebuild, record))


class _Pass:
    """One run through the blocks.

    A block's state is written once and kept by its index, so that a block may run again, as
    gradient checkpointing makes it.
    """

    def __init__(self, layout: Layout, outputs: Collection[int] | None) -> None:
        self.layout = layout.begin()
        self.outputs = outputs
        self.states = {-1: _State()}

    def run(
        self, index: int, block: nn.Module, method: Method | None, x: Tensor, *args, **kwargs
    ) -> Tensor:
        state = self.states.get(index - 1, self.states[-1])
        tokens, records, layout = state.tokens, state.records, self.layout
        if tokens is None and method is None:
            return block(x, *args, **kwargs)
        if tokens is None:
            tokens = layout.split(x)
        else:
            x = state.x
        if method is None:
            x = layout.run(block, x, tokens, *args, **kwargs)
        elif getattr(method, "inside", False):
            x, tokens, record = layout.run_reducing(
                block, x, tokens, method.reduce, *args, **kwargs
            )
        else:
            tokens, record = method.reduce(tokens, lambda x: layout.keys(block, x))
            x = layout.join(x, tokens.features)
            tokens = replace(tokens, context=layout.prepare(x, tokens))
            x = layout.run(block, x, tokens, *args, **kwargs)
        if method is not None:
            records = _appended(records, method.rebuild, record)
        tokens = layout.split(x, tokens)
        self.states[index] = _State(x, tokens, records)
        if not torch.is_grad_enabled() and index > 0:
            self.states.pop(index - 1, None)  # nobody will run this block again
        if self.outputs is not None and index not in self.outputs:
            return x
        features = tokens.features
        for rebuild, record in reversed(records):
            features = rebuild(features, record)
        return layout.join(x, features)


class _Step:
    """Block ``index`` in one pass; attributes are those of the block itself."""

    def __init__(self, run: _Pass, index: int, block: nn.Module, method: Method | None) -> None:
        self.__dict__.update(_run=run, _index=index, _block=block, _method=method)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._run.run(self._index, self._block, self._method, x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_block":  # not there yet, while being copied
            raise AttributeError(name)
        return getattr(self._block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._block, name, value)


class ExpeditedBlocks(nn.Module):
    """A block container that reduces the tokens before some blocks and rebuilds the map.

    The blocks keep the names they had, so the state dict keeps its keys.
    """

    def __init__(
        self,
        blocks: nn.Module,
        layout: Layout,
        methods: Mapping[int, nn.Module],
        outputs: Collection[int] | None = None,
        rebuilds: bool = True,
    ) -> None:
        """
        Args:
            blocks: the model's container (``ModuleList`` or ``Sequential``).
            layout: the adapter of the model's family.
            methods: for each alpha (number of blocks run before) the method that reduces there.
            outputs: indices of the blocks whose output the model reads, each rebuilt to the full
                map. None: all of them, for models that may read any.
            rebuilds: False leaves rebuilding to whoever calls `run_reduced`; the blocks cannot be
                looped over then.

        Raises:
            ValueError: if an alpha is outside 0 to depth - 1.
        """
        super().__init__()
        for name, block in blocks.named_children():
            self.add_module(name, block)
        self.names = tuple(name for name, _ in blocks.named_children())
        for alpha in methods:
            if not 0 <= alpha < len(self.names):
                raise ValueError(
                    f"ALPHA must be in 0 to {len(self.names) - 1} (blocks run before clustering, "
                    f"of {len(self.names)}), got {alpha}"
                )
        self.layout = layout
        self.outputs = outputs
        self.rebuilds = rebuilds
        # Not among the blocks' own names; without parameters, so without state-dict keys.
        self.methods = nn.ModuleDict({f"after_{alpha}": m for alpha, m in methods.items()})

    @property
    def first_alpha(self) -> int:
        """Number of blocks of this container that run on all tokens."""
        return min(int(name.removeprefix("after_")) for name in self.methods)

    def _steps(self, run: _Pass) -> list[_Step]:
        methods = dict(self.methods.items())
        return [
            _Step(run, index, getattr(self, name), methods.get(f"after_{index}"))
            for index, name in enumerate(self.names)
        ]

    def _looped(self, outputs: Collection[int] | None) -> list[_Step]:
        if not self.rebuilds:
            raise ValueError(
                'RECONSTRUCT_AT "head" needs a model whose head runs on clusters, such as '
                'Segmenter; set RECONSTRUCT_AT "backbone"'
            )
        return self._steps(_Pass(self.layout, outputs))

    def run_reduced(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """See the function `run_reduced`."""
        run = _Pass(self.layout, outputs=())
        for step in self._steps(run):
            x = step(x)
        state = run.states[len(self.names) - 1]
        shape = state.tokens.features.shape[1:-1]

        def rebuild(features: Tensor) -> Tensor:
            features = features.unflatten(1, shape)
            for method, record in reversed(state.records):
                # These are no tokens to which a change could be added.
                features = method(features, record, residual=False)
            return features

        return x, rebuild

    def __iter__(self) -> Iterator[_Step]:
        return iter(self._looped(self.outputs))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: int | slice) -> Any:
        if isinstance(key, slice):
            return self._looped(self.outputs)[key]
        return getattr(self, self.names[key])

    def forward(self, x: Tensor) -> Tensor:
        """All blocks in turn, as ``nn.Sequential`` runs them; only the last output is read."""
        for step in self._looped((len(self.names) - 1,)):
            x = step(x)
        return x


def run_reduced(blocks: nn.Module, x: Tensor) -> tuple[Tensor, Rebuild | None]:
    """Run a model's blocks without rebuilding the map, for a head that works on clusters.

    Args:
        blocks: the block container, expedited or plain.
        x: what the first block takes.

    Returns:
        What the last block leaves, class tokens included, and the function that rebuilds a map from
        features of its spatial tokens (as they are; RESIDUAL is for tokens only). None instead of
        it if nothing was reduced.
    """
    if isinstance(blocks, ExpeditedBlocks):
        return blocks.run_reduced(x)
    for block in blocks:
        x = block(x)
    return x, None
