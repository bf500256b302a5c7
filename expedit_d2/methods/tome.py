"""ToMe (Bolya et al., Token Merging: Your ViT but Faster, arXiv 2210.09461), with unmerging.

In every block the same number of tokens is merged, between attention and MLP, by the keys of that
attention; one bipartite matching of every second token with the others. In the end each token of
the map gets its cluster's output, as the authors do for dense prediction (arXiv 2303.17604).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..settings import Settings
from ..tracing import shape_of
from .matching import match
from .off_grid import OffGridMethod

__all__ = ["ToMe"]


class ToMe(OffGridMethod):
    """Equal numbers inside each block: the tokens left fall linearly from alpha to alpha."""

    inside = True
    spread = "numbers"

    @staticmethod
    def choose(
        settings: Settings, keys: Tensor, sizes: Tensor | None, count: int, groups: Tensor | None
    ) -> Tensor:
        total = shape_of(keys)[1]
        # One matching cannot merge more than half of the tokens.
        count = max(count, (total + 1) // 2)
        unit = F.normalize(keys, dim=-1)  # compared by the cosine of their angle
        return match(unit, sizes, count, everywhere=True)
