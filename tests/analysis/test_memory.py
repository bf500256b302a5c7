"""Peak memory, where it can be told by hand."""

import torch

from expedit_d2.analysis.memory import peak_memory


def test_released_memory_does_not_count():
    def call():
        x = torch.empty(1000, 1000)
        y = x + 1
        del x
        z = y + 1  # the first is gone
        del y, z
        torch.empty(1000, 1000)

    largest = 2 * 4 * 1000**2
    # The number that is added is a tensor too.
    assert largest <= peak_memory(call, torch.device("cpu")) < largest + 100
