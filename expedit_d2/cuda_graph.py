"""Replay a forward pass on a GPU without launching its kernels one by one.

At batch size 1 a GPU waits for launches, of which an expedited model has more than the plain one;
a CUDA graph launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tracing import cached_results

__all__ = ["capture"]

# Runs before recording, as PyTorch recommends: libraries set themselves up, and what a model
# computes once and keeps is kept.
_WARMUP = 3


@torch.no_grad()
def capture(call: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
    """Record a call, to be replayed for other inputs of the same sizes.

    Expedited transformers can be recorded with every method: their sizes never depend on what is
    in an image. Detection heads cannot, so record the backbone alone. Record again after a change
    of settings.

    Args:
        call: for instance a model, in evaluation mode.
        *inputs: tensors on a GPU.

    Returns:
        A function of inputs with the same shapes and types. Its outputs are those of the recorded
        call, without gradients; **the next replay overwrites them**.

    Raises:
        ValueError: for inputs that are not on a GPU, or that differ from the recorded ones in
            shape or type; inside of autocast, whose copies of the weights do not outlive it.
    """
    if torch.is_autocast_enabled():
        raise ValueError(
            "a call cannot be recorded inside of torch.autocast, as its copies of the weights are "
            "gone afterwards: enter autocast inside of the call, or convert the model"
        )
    for x in inputs:
        if not x.is_cuda:
            raise ValueError(f"CUDA graphs need inputs on a GPU, got one on {str(x.device)!r}")
    recorded = [x.clone() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            call(*recorded)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(*recorded)

    @torch.no_grad()  # the decorator above does not reach what is called later
    def replay(*others: Tensor) -> Any:
        for x, other in zip(recorded, others, strict=True):
            if (x.shape, x.dtype) != (other.shape, other.dtype):
                raise ValueError(
                    f"recorded for {tuple(x.shape)} of {x.dtype}, "
                    f"got {tuple(other.shape)} of {other.dtype}"
                )
            x.copy_(other)
        graph.replay()
        return outputs

    # The graph reads their memory: weights, and what was computed once for these sizes.
    replay.read = (call, cached_results())
    return replay
