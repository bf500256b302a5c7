"""Arguments that the operators refuse, and shapes that they take."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from expedit_d2.operators import (
    TokenClustering,
    TokenReconstruction,
    cluster_tokens,
    reconstruct_tokens,
)
from support.repository import ROOT
from support.token_maps import smooth_map

BAD_CLUSTERING = [
    ({"grid": (0, 4)}, "grid must be two positive"),
    ({"grid": (4,)}, "grid must be two positive"),
    ({"grid": 16}, "grid must be two positive"),
    ({"grid": (4.0, 4)}, "grid must be two positive"),
    ({"iterations": 0}, "iterations must be a positive"),
    ({"iterations": 2.5}, "iterations must be a positive"),
    ({"window": 4}, "window must be a positive odd"),
    ({"window": 0}, "window must be a positive odd"),
    ({"window": -1}, "window must be a positive odd"),
]
BAD_RECONSTRUCTION = [
    ({"neighbors": 0}, "neighbors must be a positive"),
    ({"neighbors": 2.0}, "neighbors must be a positive"),
    ({"normalize": "l3"}, "normalize must be one of .*'l3'"),
    ({"window": 2}, "window must be a positive odd"),
]
BAD_TEMPERATURES = [0, -1, float("nan"), float("inf"), True, "x", None]


@pytest.mark.parametrize(("settings", "message"), BAD_CLUSTERING)
def test_clustering_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenClustering(**{"grid": (4, 4), **settings})


@pytest.mark.parametrize(("settings", "message"), BAD_RECONSTRUCTION)
def test_reconstruction_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenReconstruction(**settings)


@pytest.mark.parametrize("temperature", BAD_TEMPERATURES)
def test_temperature_is_checked(temperature):
    with pytest.raises(ValueError, match="temperature must be"):
        TokenClustering((4, 4), temperature=temperature)
    with pytest.raises(ValueError, match="temperature must be"):
        TokenReconstruction(temperature=temperature)


@pytest.mark.parametrize("grid", [(14, 7), (7, 30), (14, 30)])
def test_grid_beyond_the_map(grid):
    with pytest.raises(ValueError, match=r"at most the token map \(13, 29\)"):
        TokenClustering(grid)(torch.zeros(1, 13, 29, 4))


@pytest.mark.parametrize("shape", [(13, 29, 4), (377, 4), (1, 1, 13, 29, 4)])
def test_clustering_needs_a_map(shape):
    with pytest.raises(ValueError, match=r"tokens must have shape \(B, H, W, C\)"):
        cluster_tokens(torch.zeros(shape), (4, 4))


def test_arguments_by_name():
    tokens, refined = smooth_map(1, (12, 18), 8), torch.randn(1, 6, 9, 4)
    clusters = cluster_tokens(tokens=tokens, grid=(6, 9)).features
    expected = reconstruct_tokens(refined, tokens, clusters)
    some = reconstruct_tokens(refined, tokens=tokens, clusters=clusters)
    named = reconstruct_tokens(refined=refined, tokens=tokens, clusters=clusters)
    assert torch.equal(some, expected) and torch.equal(named, expected)


SHAPES = [
    pytest.param((1, 4, 5, 3), (1, 54, 4), (1, 4, 5, 4), id="flat-tokens"),
    pytest.param((1, 20, 3), (1, 6, 9, 4), (1, 20, 4), id="flat-clusters"),
    pytest.param((1, 5, 4, 3), (1, 6, 9, 4), (1, 4, 5, 4), id="another-grid"),
    pytest.param((2, 4, 5, 3), (1, 6, 9, 4), (1, 4, 5, 4), id="batch-of-refined"),
    pytest.param((2, 4, 5, 3), (1, 6, 9, 4), (2, 4, 5, 4), id="batch-of-tokens"),
    pytest.param((1, 4, 5, 3), (2, 6, 9, 4), (1, 4, 5, 4), id="batch-of-clusters"),
    pytest.param((1, 4, 5, 3), (1, 6, 9, 5), (1, 4, 5, 4), id="channels"),
]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("refined", "tokens", "clusters"), SHAPES)
def test_reconstruction_needs_shapes_that_agree(refined, tokens, clusters, window):
    shapes = (torch.zeros(shape) for shape in (refined, tokens, clusters))
    with pytest.raises(ValueError, match="must have shapes"):
        reconstruct_tokens(*shapes, neighbors=2, window=window)


@pytest.mark.parametrize("neighbors", [0, -1, 21])
def test_neighbors_beyond_the_clusters(neighbors):
    tokens, clusters = torch.zeros(1, 6, 9, 4), torch.zeros(1, 4, 5, 4)
    with pytest.raises(ValueError, match=r"neighbors must be in \[1, 20\]"):
        reconstruct_tokens(clusters, tokens, clusters, neighbors=neighbors)


@pytest.mark.slow
def test_importable_without_detectron2_and_timm():
    """The operators, and the package around them, need torch alone."""
    code = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"detectron2", "timm", "fvcore", "torchvision"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from expedit_d2.operators import TokenClustering, TokenReconstruction
tokens = torch.randn(1, 6, 8, 4)
clusters = TokenClustering((3, 4))(tokens)
assert TokenReconstruction(5)(clusters, tokens, clusters).shape == tokens.shape
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
