"""ToMe (Bolya et al., Token Merging: Your ViT but Faster, arXiv 2210.09461), with unmerging.

In every block the same number of tokens is merged, between attention and MLP, by the keys of that
attention, by one bipartite matching of every second token with the others. In the end each token of
the map gets its cluster's output, as the authors do for dense prediction (arXiv 2303.17604).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings import METHOD_REGISTRY, Settings
from ..settings.spread import Spread, same_number
from ..tracing import shape_of
from .matching import match, matching_cost
from .unstructured import UnstructuredMethod, Windows

__all__ = ["ToMe"]


@METHOD_REGISTRY.register("tome")
class ToMe(UnstructuredMethod):
    """Merges the same number inside each block: the tokens left fall linearly with the alphas."""

    inside = True
    whole_windows = True
    budget_rule = "every"

    @staticmethod
    def spread(settings: Settings) -> Spread:
        return same_number

    @staticmethod
    def least(entering: float) -> float:
        return entering / 2  # one matching merges no more

    @staticmethod
    def cost(settings: Settings, tokens: float, clusters: float, channels: int) -> float:
        return matching_cost(tokens, tokens / 2, channels)

    @staticmethod
    def choose(
        settings: Settings, keys: Tensor, sizes: Tensor | None, count: int, windows: Windows | None
    ) -> tuple[Tensor, int]:
        number = 1
        if windows is not None:
            if not windows.whole:
                raise ValueError(
                    "METHOD tome merges equally many tokens in every attention window, so these "
                    "must divide the map; METHOD merge takes any map"
                )
            number = windows.number
        batch, total, _ = shape_of(keys)
        each = total // number
        # See `least`.
        left = max(count // number, (each + 1) // 2)
        unit = F.normalize(keys, dim=-1)  # compared by the cosine of their angle
        unit = unit.reshape(batch * number, each, -1)
        sizes = None if sizes is None else sizes.reshape(batch * number, each)
        index = match(unit, sizes, left, everywhere=True).view(batch, number, each)
        first = torch.arange(number, device=index.device)[:, None] * left
        return (index + first).flatten(1), left * number
