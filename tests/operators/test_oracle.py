"""The operators against published results and a dense float64 oracle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expedit_d2.analysis.dense import dense_clustering, dense_reconstruction
from expedit_d2.operators import (
    TokenClustering,
    TokenReconstruction,
    cluster_tokens,
    reconstruct_tokens,
)
from support import oracles
from support.token_maps import (
    padding,
    relative_error,
    smooth_map,
    spread_clusters,
    upsample,
    weights_of,
)

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request) -> tuple[dict[str, Tensor], dict]:
    with np.load(request.param) as data:
        arrays = {name: torch.from_numpy(data[name]) for name in data if name != "meta"}
        return arrays, json.loads(str(data["meta"]))


def test_golden_data_is_there():
    assert len(GOLDEN) == 6


def test_published_clusters(golden):
    arrays, meta = golden
    clustering = TokenClustering(
        meta["grid"], meta["iterations"], meta["temperature"], meta["window"]
    )
    assert relative_error(clustering(arrays["tokens"]), arrays["clusters"]) < 1e-4


def test_published_reconstruction(golden):
    arrays, meta = golden
    reconstruction = TokenReconstruction(meta["neighbors"], meta["temperature"], "l2")
    rebuilt = reconstruction(arrays["refined"], arrays["tokens"], arrays["clusters"])
    assert relative_error(rebuilt, arrays["reconstructed"]) < 1e-4


def test_oracle_is_the_published_operator(golden):
    """The oracle that the rest relies on, itself checked."""
    arrays, meta = golden
    tokens, clusters = arrays["tokens"], arrays["clusters"]
    grid, temperature = tuple(meta["grid"]), meta["temperature"]
    ours, *_ = oracles.cluster(tokens, grid, meta["iterations"], temperature, meta["window"])
    assert relative_error(ours, clusters) < 1e-4
    rebuilt = oracles.rebuild(
        arrays["refined"], tokens, clusters, meta["neighbors"], temperature, "l2"
    )
    assert relative_error(rebuilt, arrays["reconstructed"]) < 1e-4


# Tiles are at most 8 cells wide: grids below, at and above that, and windows beyond the grid.
MAPS = [
    pytest.param((13, 29), (7, 11), 1, id="odd-window1"),
    pytest.param((13, 29), (7, 11), 3, id="odd-window3"),
    pytest.param((13, 29), (7, 11), 5, id="odd-window5"),
    pytest.param((13, 29), (7, 11), 7, id="odd-window7"),
    pytest.param((20, 20), (14, 14), 5, id="square"),
    pytest.param((25, 19), (18, 17), 1, id="three-tiles-window1"),
    pytest.param((25, 19), (18, 17), 3, id="three-tiles-window3"),
    pytest.param((9, 40), (3, 25), 5, id="wide"),
    pytest.param((40, 1), (17, 1), 5, id="column"),
    pytest.param((5, 7), (2, 3), 9, id="window-beyond-grid"),
    pytest.param((10, 12), (10, 12), 3, id="grid-equals-map"),
    pytest.param((11, 6), (1, 1), 5, id="one-cluster"),
]


@pytest.mark.parametrize("temperature", [0.3, "auto"])
@pytest.mark.parametrize(("size", "grid", "window"), MAPS)
def test_clustering_equals_dense_oracle(size, grid, window, temperature):
    tokens = smooth_map(2, size, 12)
    clusters = cluster_tokens(tokens, grid, 4, temperature, window)
    expected = oracles.cluster(tokens, grid, 4, temperature, window)
    assert clusters.features.dtype == clusters.sizes.dtype == clusters.positions.dtype
    for ours, reference in zip(clusters, expected, strict=True):
        assert relative_error(ours, reference) < 1e-4


WEIGHTS = {
    "padding": padding,
    "non-uniform": lambda batch, size: 4 * torch.rand(batch, *size) + 0.1,
    "both": lambda batch, size: padding(batch, size) * (4 * torch.rand(batch, *size) + 0.1),
    "one-left": lambda batch, size: (
        F.one_hot(torch.full((batch,), 7), size[0] * size[1]).view(batch, *size).float()
    ),
}


@pytest.mark.parametrize("temperature", [0.3, "auto"])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(
    ("size", "grid", "window"), [((13, 29), (7, 11), 3), ((16, 24), (8, 12), 5)]
)
def test_weighted_clustering_equals_dense_oracle(size, grid, window, kind, temperature):
    tokens, weights = smooth_map(2, size, 12), WEIGHTS[kind](2, size)
    clusters, sizes, places = cluster_tokens(tokens, grid, 4, temperature, window, weights)
    expected, expected_sizes, expected_places = oracles.cluster(
        tokens, grid, 4, temperature, window, weights=weights
    )
    assert relative_error(sizes, expected_sizes) < 1e-4
    torch.testing.assert_close(sizes.sum((1, 2)), weights.sum((1, 2)))
    # Where a cluster stands for no token its position says nothing.
    used = expected_sizes > 1e-6
    assert relative_error(clusters[used], expected[used]) < 1e-4
    assert relative_error(places[used], expected_places[used]) < 1e-4


def test_a_cell_of_padding_stays_empty():
    """Its centroid says nothing, so no token may be drawn to it, however close."""
    tokens, weights = smooth_map(1, (16, 24), 8), torch.ones(1, 16, 24)
    weights[:, 8:] = 0
    for temperature in (1e-3, 0.3, "auto"):
        _, sizes, places = cluster_tokens(tokens, (8, 12), temperature=temperature, weights=weights)
        assert (sizes[:, 4:] == 0).all() and (sizes[:, :4] > 0).all()
        assert places.isfinite().all()
        # The other half of the map might as well not be there.
        half = cluster_tokens(tokens[:, :8], (4, 12), temperature=temperature)
        torch.testing.assert_close(sizes[:, :4], half.sizes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", [1, 2])
def test_given_positions(images):
    """Those of an earlier clustering are averaged, for all images alike or for each."""
    tokens, positions = smooth_map(2, (13, 29), 8), 9 * torch.randn(images, 13, 29, 2)
    weights = 4 * torch.rand(2, 13, 29)
    settings = (tokens, (7, 11), 3, 0.3, 3)
    places = cluster_tokens(*settings, weights, positions).positions
    _, _, expected = oracles.cluster(
        *settings, weights=weights, positions=positions.expand(2, -1, -1, -1)
    )
    assert relative_error(places, expected) < 1e-4


def test_positions_stay_in_the_window():
    """A mean of tokens whose home cells are at most r away."""
    places = cluster_tokens(smooth_map(1, (24, 36), 8), (12, 18), window=3).positions
    centers = oracles.coordinates((12, 18)).view(12, 18, 2) * 2 + 0.5
    assert (places[0] - centers).abs().max() <= 2 + 0.5


def test_integer_weights_repeat_tokens():
    """A weight of 2 is the same as the token twice: columns doubled, and the grid with them."""
    tokens = smooth_map(1, (12, 8), 6)
    doubled = tokens.repeat_interleave(2, 2)
    clusters, sizes, _ = cluster_tokens(tokens, (6, 4), 3, 0.5, 3, torch.full((1, 12, 8), 2.0))
    expected, expected_sizes, _ = cluster_tokens(doubled, (6, 4), 3, 0.5, 3)
    torch.testing.assert_close(clusters, expected)
    torch.testing.assert_close(sizes, expected_sizes)


@pytest.mark.parametrize("normalize", ["l1", "l2"])
@pytest.mark.parametrize("temperature", [0.3, "auto"])
@pytest.mark.parametrize("window", [None, 1, 3, 5, 7])
@pytest.mark.parametrize(
    ("size", "grid"), [((13, 29), (7, 11)), ((25, 19), (18, 17)), ((5, 7), (2, 3))]
)
def test_reconstruction_equals_dense_oracle(size, grid, window, temperature, normalize):
    tokens = smooth_map(2, size, 12)
    clusters = spread_clusters(tokens, grid)
    refined = torch.randn(2, *grid, 5)  # another channel count than the tokens
    neighbors = min(12, grid[0] * grid[1])
    rebuilt = reconstruct_tokens(
        refined, tokens, clusters, neighbors, temperature, normalize, window
    )
    expected = oracles.rebuild(
        refined, tokens, clusters, neighbors, temperature, normalize, window=window
    )
    assert relative_error(rebuilt, expected) < 1e-4


@pytest.mark.parametrize("temperature", [0.3, "auto"])
@pytest.mark.parametrize("window", [None, 5])
def test_padded_reconstruction_equals_dense_oracle(window, temperature):
    size, grid = (16, 24), (8, 12)
    tokens, weights = smooth_map(2, size, 12), padding(2, size)
    clusters = spread_clusters(tokens, grid)
    refined = torch.randn(2, *grid, 9)
    valid = torch.ones(2, *grid, dtype=torch.bool)
    valid[:, 7:] = False
    valid[:, ::3, 2] = False
    settings = {"window": window, "valid": valid, "weights": weights}
    rebuilt = reconstruct_tokens(refined, tokens, clusters, 10, temperature, "l1", **settings)
    expected = oracles.rebuild(refined, tokens, clusters, 10, temperature, "l1", **settings)
    assert relative_error(rebuilt, expected) < 1e-4
    shares = weights_of(tokens, clusters, neighbors=10, temperature=temperature, **settings)
    assert shares[:, :, ~valid[0].flatten()].abs().max() == 0


def test_dense_baseline_agrees():
    """What the benchmark compares with computes the same."""
    tokens, refined = smooth_map(2, (13, 29), 12), torch.randn(2, 7, 11, 5)
    clusters, *_ = cluster_tokens(tokens, (7, 11), 4, 0.3, 5)
    dense = dense_clustering(tokens, (7, 11), 4, 0.3, 5)
    assert relative_error(dense, clusters) < 1e-4
    for normalize in ("l1", "l2"):
        rebuilt = reconstruct_tokens(refined, tokens, clusters, 9, 0.3, normalize)
        dense = dense_reconstruction(refined, tokens, clusters, 9, 0.3, normalize)
        assert relative_error(dense, rebuilt) < 1e-4


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_of_reconstruction(window):
    size, grid = (9, 13), (4, 10)
    inputs = [torch.randn(2, *grid, 5), smooth_map(2, size, 6), torch.randn(2, *grid, 6)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    probe = torch.randn(2, *size, 5)
    for temperature, normalize in [(0.3, "l1"), (0.3, "l2"), ("auto", "l1")]:
        settings = (6, temperature, normalize)
        ours = reconstruct_tokens(*inputs, *settings, window)
        expected = oracles.rebuild(*inputs, *settings, window=window)
        actual = torch.autograd.grad((ours * probe).sum(), inputs)
        wanted = torch.autograd.grad((expected * probe).sum(), inputs)
        for gradient, reference in zip(actual, wanted, strict=True):
            assert relative_error(gradient, reference) < 1e-3


@pytest.mark.parametrize("temperature", [0.3, "auto"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_clustering(temperature, weighted):
    size, grid = (9, 13), (4, 10)
    tokens = smooth_map(2, size, 6).requires_grad_()
    weights = padding(2, size) if weighted else None
    probe, size_probe = torch.randn(2, *grid, 6), torch.randn(2, *grid)
    gradients = []
    for clusters, sizes, _ in (
        cluster_tokens(tokens, grid, 3, temperature, 3, weights),
        oracles.cluster(tokens, grid, 3, temperature, 3, weights=weights),
    ):
        used = sizes > 1e-6
        objective = (clusters * probe)[used].sum() + (sizes * size_probe).sum()
        gradients += torch.autograd.grad(objective, tokens)
    assert relative_error(*gradients) < 1e-3


def test_gradients_are_finite_where_distances_are_zero():
    """The hard cases of auto temperature: a flat image, half of one, tokens on their clusters."""
    tokens = smooth_map(3, (12, 18), 6)
    tokens[0] = 0.5
    tokens[1, :, :9] = -2.0
    tokens[2] = upsample(torch.randn(1, 6, 9, 6), (2, 2))[0]
    tokens.requires_grad_()
    clusters, sizes, _ = cluster_tokens(tokens, (6, 9))
    rebuilt = reconstruct_tokens(clusters, tokens, clusters)
    (rebuilt.square().sum() + sizes.square().sum()).backward()
    assert tokens.grad.isfinite().all()
