"""ToMe (Bolya et al., Token Merging: Your ViT but Faster, arXiv 2210.09461), with unmerging.

In every block the same number of tokens is merged, between attention and MLP, by the keys of that
attention; one bipartite matching of every second token with the others. In the end each token of
the map gets its cluster's output, as the authors do for dense prediction (arXiv 2303.17604).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from ..operators import shape_of
from ..settings import Settings
from ..tokens import Keys, Tokens
from .merge import Record, Unmerge, merge_tokens

__all__ = ["ToMe"]


class _Merging(nn.Module):
    """Equal numbers: the tokens left fall linearly from alpha to alpha."""

    def __init__(self, settings: Settings, index: int) -> None:
        super().__init__()
        self.settings = settings
        self.index = index

    def forward(self, tokens: Tokens, keys: Keys) -> tuple[Tokens, Record]:
        features = tokens.features.flatten(1, -2)
        now = shape_of(features)[1]
        count = self.settings.count(self.index, tokens.size[0] * tokens.size[1], "numbers")
        # One matching cannot merge more than half of the tokens.
        count = min(max(count, (now + 1) // 2), now)
        unit = F.normalize(keys(features).float(), dim=-1)  # the cosine of the angle
        return merge_tokens(tokens, unit, count, checkerboard=False)


class ToMe(nn.Module):
    """Equal numbers inside each block."""

    inside = True

    def __init__(self, settings: Settings, attention_window: int | None, index: int = 0) -> None:
        super().__init__()
        self.reduce = _Merging(settings, index)
        self.rebuild = Unmerge()
