"""Runs a model's blocks: reduces the tokens after alpha blocks and rebuilds the map at the end.

`ExpeditedBlocks` replaces a model's block container. The model loops over it as before. Each loop
gets its own callables, which share the state of that loop, so calls may overlap and nothing is
stored between them. The model, its blocks and its state-dict keys are untouched.

Once tokens are reduced, the hook continues with its own tensors and not with what the model passes
on. So each block must be given exactly what the previous block returned; anything else is refused.
In-place changes are detected too, except in compiled graphs and in `torch.inference_mode`, where
PyTorch does not count them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .compat import version_of
from .methods import Method
from .tokens import Layout, Tokens
from .tracing import in_graph

__all__ = ["ExpeditedBlocks", "Rebuild", "run_reduced", "sized_blocks"]

#: Features of the reduced tokens (B, M, D), in the order of the tokens, to a map (B, H, W, D).
Rebuild = Callable[[Tensor], Tensor]
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


class _Pass:
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

    def run(self, step: _Step, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        index, block, method = step._index, step._block, step._method
        self._forget(index - 2)
        state = self._before(step, x, *args, **kwargs)
        outer = _swap_running(block, None)
        try:
            out, state = self._run(index, block, method, state, x, *args, **kwargs)
        finally:
            _swap_running(*outer)
        self._forget(index)
        passed = out[0] if isinstance(out, tuple) else out
        self.states.setdefault(index, []).append((_Mark(passed), state))
        return out

    def _forget(self, index: int) -> None:
        """Drop states whose tensors are gone: nothing can continue from them."""
        if index in self.states:
            self.states[index] = [entry for entry in self.states[index] if entry[0].alive]

    def _before(self, step: _Step, x: Tensor, *args: Any, **kwargs: Any) -> _State:
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


#: ``block``: the block that a pass is running in this thread; ``step``: the step that called it,
#: where the block's own hooks run around it.
_running = threading.local()


def _swap_running(
    block: nn.Module | None, step: _Step | None
) -> tuple[nn.Module | None, _Step | None]:
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


class _Step:
    """Block ``index`` in one pass; attributes are those of the block itself.

    Attributes that the model sets on its block in this loop are set on the block again whenever it
    runs, because another loop may have changed them in between.
    """

    def __init__(self, run: _Pass, index: int, block: nn.Module, method: Method | None) -> None:
        self.__dict__.update(_run=run, _index=index, _block=block, _method=method, _given={})

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for name, value in self._given.items():
            setattr(self._block, name, value)
        run = self._run
        if run.layout.watched and self._index >= run.alphas[0]:
            outer = _swap_running(self._block, self)
            try:
                # A class with its own ``__call__`` may checkpoint it, and would lose this pass.
                return nn.Module.__call__(self._block, x, *args, **kwargs)
            finally:
                _swap_running(*outer)
        return run.run(self, x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("_block", "_given"):  # not there yet while being copied
            raise AttributeError(name)
        return self._given[name] if name in self._given else getattr(self._block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._given[name] = value
        setattr(self._block, name, value)


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
            ValueError: if an alpha is outside 0 to end - 1.
        """
        super().__init__()
        for name, block in blocks.named_children():
            self.add_module(name, block)
        self.names = tuple(name for name, _ in blocks.named_children())
        self.end = len(self.names) if end is None else end
        for alpha in methods:
            if not 0 <= alpha < self.end:
                rest = ", whose others are not for the map alone" if self.end < len(self) else ""
                raise ValueError(
                    f"ALPHA must be in 0 to {self.end - 1} (blocks run before clustering, of "
                    f"{len(self)}{rest}), got {alpha}"
                )
        self.layout = layout
        self.outputs = outputs
        self.rebuilds = rebuilds
        # Not among the blocks' own names; without parameters, so without state-dict keys.
        self.methods = nn.ModuleDict({f"after_{alpha}": m for alpha, m in methods.items()})

    @property
    def first_alpha(self) -> int:
        """Number of blocks of this container that run on all tokens."""
        return min(self._alphas)

    def _steps(self, run: _Pass) -> list[Callable[..., Any]]:
        methods = dict(self.methods.items())
        steps = [
            _Step(run, index, self[index], methods.get(f"after_{index}"))
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
        last = [index for index in range(len(self))[part] if index < self.end][-1:]
        if outputs is not None:
            outputs = {*outputs, *last}
        return self._steps(_Pass(self.layout, self._alphas, outputs, size))[part]

    def guard(self) -> Callable[[], None]:
        """Refuse calls of the reduced blocks, and of their parts, outside of a pass.

        A model that takes its blocks by index, or takes them apart, would run them on all tokens.
        Where blocks are watched (see `Layout`), their calls are routed to the pass that makes them.

        Returns:
            The function that undoes it.
        """
        hooks, routed = [], []
        watched = self.layout.watched
        for index in range(self.first_alpha, self.end):
            block = self[index]
            if watched:
                routed.append((block, vars(block).get("forward")))
                block.forward = partial(_forward_watched, *routed[-1])
                # Its parts may run again on their own, when the block uses gradient checkpointing.
                guarded = [block]
            else:
                guarded = dict.fromkeys((block, _first_layer(block)))
            for module in guarded:
                hook = partial(_refuse_alone, index, self.first_alpha)
                hooks.append(module.register_forward_pre_hook(hook))

        def undo() -> None:
            for hook in hooks:
                hook.remove()
            for block, own in routed:
                del block.forward
                if own is not None:
                    block.forward = own

        return undo

    def run_reduced(self, x: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Rebuild]:
        """See the function `run_reduced`."""
        run = _Pass(self.layout, self._alphas, outputs=(), size=size)
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
