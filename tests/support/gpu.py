"""The tests run on the CPU, with a GPU in the machine or without, but for those of `test_cuda`."""

from __future__ import annotations

import torch

#: The real one, for the tests that need a GPU.
is_available = torch.cuda.is_available


def hide() -> None:
    """Let this process choose the CPU."""
    if is_available():
        torch.cuda.init()  # before a test hides all devices from the processes that it starts
    torch.cuda.is_available = lambda: False
