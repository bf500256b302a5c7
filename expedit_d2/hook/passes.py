"""One run through the blocks, and what one block hands to the next.

Once tokens are reduced, a pass continues with its own tensors and not with what the model passes
on. So each block must be given exactly what the previous block returned; anything else is refused.
In-place changes are detected too, except in compiled graphs and in `torch.inference_mode`, where
PyTorch does not count them.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import version_of
from ..methods import Method
from ..tokens import Layout, Tokens
from ..tracing import in_graph
from .guard import swap_running

__all__ = ["Pass", "Step"]

#: For each reduction, the module that rebuilds the map and its record.
_Records = tuple[tuple[nn.Module, Any], ...]


@dataclass(frozen=True)
class _State:
    """What one block passes to the next.

    Attributes:
        layout: the layout of this pass.
        tokens: the reduced tokens without their features; None before the first reduction.
        x: the reduced tokens in the model's form; None where the block returned exactly these.
        records: the records of the reductions so far.
    """

    layout: Layout
    tokens: Tokens | None = None
    x: Tensor | None = None
    records: _Records = ()


class _Mark:
    """Recognises a tensor later if nothing has changed it; does not keep it alive."""

    def __init__(self, x: Tensor) -> None:
        self._tensor = weakref.ref(x)
        self._version = _version(x)
        self.shape = tuple(x.shape)

    @property
    def alive(self) -> bool:
        return self._tensor() is not None

    def is_on(self, x: Tensor) -> bool:
        return self._tensor() is x

    def fits(self, x: Tensor) -> bool:
        return self.is_on(x) and self._version == _version(x)


def _version(x: Tensor) -> int:
    return 0 if in_graph() or x.is_inference() else version_of(x)


def _appended(records: _Records, method: Method, record: Any) -> _Records:
    """The records with one more; joined with the last one where the method can do so."""
    joined = method.joined(records[-1][1], record) if records else None
    if joined is not None:
        return (*records[:-1], (method.rebuild, joined))
    return (*records, (method.rebuild, record))


class Pass:
    """One run through the blocks.

    A state belongs to the tensor that a block returned, and lives as long as that tensor. So a
    block may run again, as it does with gradient checkpointing.
    """

    def __init__(
        self,
        layout: Layout,
        alphas: Iterable[int],
        outputs: Collection[int] | None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.layout = layout
        self.alphas = sorted(alphas)
        self.outputs = outputs
        self.size = size
        self.first: int | None = None
        self.begun: list[tuple[_Mark, _State]] = []
        self.states: dict[int, list[tuple[_Mark, _State]]] = {}

    def run(self, step: Step, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        index, block, method = step._index, step._block, step._method
        self._forget(index - 2)
        state = self._before(step, x, *args, **kwargs)
        outer = swap_running(block, None)
        try:
            out, state = self._run(index, block, method, state, x, *args, **kwargs)
        finally:
            swap_running(*outer)
        self._forget(index)
        passed = out[0] if isinstance(out, tuple) else out
        self.states.setdefault(index, []).append((_Mark(passed), state))
        return out

    def _forget(self, index: int) -> None:
        """Drop states whose tensors are gone: nothing can continue from them."""
        if index in self.states:
            self.states[index] = [entry for entry in self.states[index] if entry[0].alive]

    def _before(self, step: Step, x: Tensor, *args: Any, **kwargs: Any) -> _State:
        """The state that a block continues from.

        Raises:
            ValueError: if tokens are reduced already, and ``x`` is not what the previous block
                returned.
        """
        index = step._index
        if self.first is None:
            self.first = index
        if index == self.first:
            for mark, state in self.begun:
                if mark.is_on(x):  # run again
                    return state
            state = _State(self.layout.begin(x, step, self.size, *args, **kwargs))
            self.begun.append((_Mark(x), state))
            return state
        known = self.states.get(index - 1, ())
        for mark, state in known:
            if mark.fits(x):
                if state.tokens is not None and x.requires_grad and not torch.is_grad_enabled():
                    raise ValueError(
                        f"block {index} is checkpointed by itself with use_reentrant=True, which "
                        f"loses gradients after ALPHA {self.alphas[0]}: checkpoint with "
                        "use_reentrant=False, or all blocks as one"
                    )
                return state
        if self.first < index and not any(self.first <= a < index for a in self.alphas):
            # All tokens are still there, and the model may do what it likes with them.
            layouts = [state.layout for _, state in self.begun]
            same = all(layout == layouts[0] for layout in layouts)
            begun = layouts[0] if same else None
            return _State(begun or self.layout.begin(x, step, self.size, *args, **kwargs))
        raise ValueError(self._refusal(index, x, known))

    def _refusal(self, index: int, x: Tensor, known: Collection[tuple[_Mark, _State]]) -> str:
        if index < self.first or not known:
            what = f"block {index} was not run right after block {index - 1} on what that returned"
        elif any(mark.is_on(x) for mark, _ in known):
            what = f"the output of block {index - 1} was changed in place before block {index}"
        elif any(mark.shape != tuple(x.shape) for mark, _ in known):
            what = (
                f"block {index} was given tokens of shape {tuple(x.shape)} where block {index - 1} "
                f"returned {known[-1][0].shape}"
            )
        else:
            what = f"block {index} was given other tokens than block {index - 1} returned"
        return (
            f"{what}: from ALPHA {self.alphas[0]} on Expedit carries reduced tokens from block to "
            "block and would lose such a change; set ALPHA after it, or leave this model as it is"
        )

    def _run(
        self,
        index: int,
        block: nn.Module,
        method: Method | None,
        state: _State,
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, _State]:
        layout, tokens, records = state.layout, state.tokens, state.records
        if tokens is None and method is None:
            watched = layout.watched and index >= self.alphas[0]
            return (block.forward if watched else block)(x, *args, **kwargs), state
        if state.x is not None:
            x = state.x
        if method is None:
            x = layout.run(block, x, tokens, *args, **kwargs)
        else:
            tokens = layout.split(x, tokens)
            if method.inside:
                x, tokens, record = layout.run_reducing(
                    block, x, tokens, method.reduce, *args, **kwargs
                )
            else:
                tokens, record = method.reduce(tokens, lambda x: layout.keys(block, x))
                x = layout.join(x, tokens.features)
                tokens = replace(tokens, context=layout.prepare(x, tokens), features=None)
                x = layout.run(block, x, tokens, *args, **kwargs)
            # A state must not keep alive the tensor that it belongs to.
            tokens = replace(tokens, features=None)
            records = _appended(records, method, record)
        if not self._is_read(index, kwargs):
            return layout.returned(x), _State(layout, tokens, None, records)
        features = layout.split(x, tokens).features
        for rebuild, record in reversed(records):
            features = rebuild(features, record)
        return layout.returned(layout.join(x, features)), _State(layout, tokens, x, records)

    def _is_read(self, index: int, kwargs: Mapping[str, Any]) -> bool:
        """Whether the model reads the output of a block, given the arguments of its call."""
        named = self.outputs is None or index in self.outputs
        return named or self.layout.reads_outputs(kwargs)


class Step:
    """Block ``index`` in one pass; attributes are those of the block itself.

    Attributes that the model sets on its block in this loop are set on the block again whenever it
    runs, because another loop may have changed them in between.
    """

    def __init__(self, run: Pass, index: int, block: nn.Module, method: Method | None) -> None:
        # One by one: not every torch.compile can trace ``__dict__.update`` (2.11 cannot).
        object.__setattr__(self, "_run", run)
        object.__setattr__(self, "_index", index)
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_method", method)
        object.__setattr__(self, "_given", {})

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for name, value in self._given.items():
            setattr(self._block, name, value)
        run = self._run
        if run.layout.watched and self._index >= run.alphas[0]:
            outer = swap_running(self._block, self)
            try:
                # A class with its own ``__call__`` may checkpoint it, and would lose this pass.
                return nn.Module.__call__(self._block, x, *args, **kwargs)
            finally:
                swap_running(*outer)
        return run.run(self, x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("_block", "_given"):  # not there yet while being copied
            raise AttributeError(name)
        return self._given[name] if name in self._given else getattr(self._block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._given[name] = value
        setattr(self._block, name, value)
