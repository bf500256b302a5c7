"""Feature maps (C, h, w) of a transformer without a head.

They are compared in two ways, so models output them with the keys of both. Only directions are
compared, as features are mostly used by cosine similarity.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data.catalog import Metadata
from torch import Tensor

from .drawing import canvas_of, to_image
from .prediction import Prediction, Record

__all__ = ["CosinePrediction", "NeighborPrediction", "draw_features"]

_SLACK = 1e-6  # rounding tolerance for equally similar tokens


def draw_features(image: np.ndarray, features: Tensor, metadata: Metadata) -> np.ndarray:
    """Draw the three principal components as red, green and blue.

    Args:
        image, metadata: not used.
        features: (C, h, w).
    """
    tokens = _directions(features)
    tokens = tokens - tokens.mean(0)
    axes = torch.linalg.eigh(tokens.T @ tokens).eigenvectors[:, -3:].flip(1)
    # The sign of a component is arbitrary; make it the same for similar maps.
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    axes = axes * largest.sign()
    parts = tokens @ axes
    low, high = torch.quantile(parts, torch.tensor([0.02, 0.98]), dim=0)
    shares = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colors = (255 * shares).round().byte()
    return to_image(canvas_of(colors.reshape(*features.shape[1:], 3).numpy()))


def _directions(features: Tensor) -> Tensor:
    """Unit vectors (N, C) of a map (C, h, w), in row-major order, on the CPU."""
    return F.normalize(features.to("cpu", torch.float32).flatten(1).T, dim=1)


def _nearest_is_here(mine: Tensor, plain: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether the most similar plain token is at a token's own position or next to it, (N,) bool.

    Merged tokens have the same features, so only one of them could match at its own position.
    """
    places = torch.cartesian_prod(*map(torch.arange, size))
    around = (places[:, None] - places[None]).abs().amax(2) <= 1
    similar = mine @ plain.T
    return similar.masked_fill(~around, -torch.inf).amax(1) >= similar.amax(1) - _SLACK


class _FeaturePrediction(Prediction):
    draw = staticmethod(draw_features)

    def keep(self, output: Tensor) -> Record:
        """``tokens`` (N, C) with norm 1, and ``size`` (h, w)."""
        tokens = _directions(output).half().numpy()
        return {"tokens": tokens, "size": np.array(output.shape[1:])}

    @staticmethod
    def _tokens(record: Record) -> Tensor:
        return F.normalize(torch.from_numpy(record["tokens"]).float(), dim=1)


class NeighborPrediction(_FeaturePrediction):
    """Features; tokens whose nearest neighbour in the plain map is at their position agree."""

    key = "features"
    name = "nearest neighbour"
    meaning = (
        "tokens whose most similar token of the plain model, in the same image, is at their own "
        "place or next to it"
    )

    def terms(self, mine: Record, plain: Record) -> np.ndarray:
        size = tuple(plain["size"].tolist())
        here = _nearest_is_here(self._tokens(mine), self._tokens(plain), size)
        return np.array([float(here.sum()), len(here)])

    def differ(self, plain: Tensor, other: Tensor) -> np.ndarray:
        """Tokens instead of pixels."""
        size = tuple(plain.shape[1:])
        here = _nearest_is_here(_directions(other), _directions(plain), size)
        return ~here.reshape(size).numpy()


class CosinePrediction(_FeaturePrediction):
    """Features, by the mean cosine with the plain model's token at the same position."""

    key = "feature_directions"
    name = "cosine"
    meaning = "mean cosine between a token's features and the plain model's"

    def terms(self, mine: Record, plain: Record) -> np.ndarray:
        cosines = (self._tokens(mine) * self._tokens(plain)).sum(1)
        return np.array([float(cosines.sum()), len(cosines)])

    def differ(self, plain: Tensor, other: Tensor) -> np.ndarray:
        """Tokens instead of pixels, with a cosine below 0.9."""
        cosines = (_directions(other) * _directions(plain)).sum(1)
        return (cosines < 0.9).reshape(plain.shape[1:]).numpy()
