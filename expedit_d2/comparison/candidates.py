"""Settings worth trying on a model, according to its adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..adapters import TransformerSpec
from ..settings import Settings, describe

__all__ = ["candidates"]

#: First reduced block, as a share of the depth.
_STARTS = (1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3)
#: Clusters along each side, as a share of the tokens.
_RATIOS = (0.5, 0.6, 0.7, 0.8, 0.85)
#: Leading part of the network in which each block merges.
_MERGED = (1 / 3, 1 / 2, 1)
_KEEPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
#: For the rules of `expedit_d2.budget`.
_BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def _on_the_grid(scopes: Sequence[str], first: int, depth: int) -> Iterator[Settings]:
    """Clustering on a grid, of the map or of each window, after some blocks."""
    for start in sorted({round(share * depth) for share in _STARTS}):
        for scope in scopes:
            for ratio in _RATIOS:
                yield Settings(alpha=first + start, ratio=ratio, scope=scope)


def _merging(first: int, depth: int) -> Iterator[Settings]:
    for part in sorted({max(1, round(share * depth)) for share in _MERGED}):
        for keep in _KEEPS:
            yield Settings(alpha=tuple(range(first, first + part)), method="merge", keep=keep)


def candidates(spec: TransformerSpec) -> dict[str, Settings]:
    """Settings to try on a transformer, by name.

    If its blocks are in stages, tokens are reduced in the longest one, which costs most.

    Args:
        spec: of the model, see `find_transformer`.
    """
    stage, first = spec.longest_stage
    depth = len(stage.blocks)
    scopes = [scope for scope in spec.scopes if scope != "window" or stage.window is not None]
    tried = [Settings(budget=budget) for budget in _BUDGETS]
    tried += _on_the_grid(scopes, first, depth)
    if spec.unstructured:
        tried += _merging(first, depth)
    return {describe(settings): settings for settings in tried}
