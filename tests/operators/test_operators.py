"""The two operators: against published results, a dense float64 oracle, and by what must hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from expedit_d2 import operators
from expedit_d2.analysis.dense import dense_clustering, dense_reconstruction
from expedit_d2.operators import (
    TokenClustering,
    TokenReconstruction,
    cluster_tokens,
    reconstruct_tokens,
)
from support import oracles
from support.repository import ROOT

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation as a share of the largest value."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def smooth_map(batch: int, size: tuple[int, int], channels: int) -> Tensor:
    """(B, H, W, C) of unit scale: regions and some noise, as features have."""
    regions = F.interpolate(torch.randn(batch, channels, 4, 4), size=size, mode="bilinear")
    return regions.permute(0, 2, 3, 1) + 0.3 * torch.randn(batch, *size, channels)


def upsample(cells: Tensor, factor: tuple[int, int]) -> Tensor:
    """(B, h, w, C) to (B, h * fh, w * fw, C): every cell constant."""
    return cells.repeat_interleave(factor[0], 1).repeat_interleave(factor[1], 2)


def spread_clusters(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Clusters of a map, moved apart: which of two near-equal ones is the k-th is chance."""
    clusters, *_ = cluster_tokens(tokens, grid)
    return clusters + 0.2 * torch.randn_like(clusters)


def weights_of(tokens: Tensor, clusters: Tensor, **settings) -> Tensor:
    """The reconstruction's weights (B, H * W, h * w): what it makes of one-hot clusters."""
    batch, h, w, _ = clusters.shape
    one_hot = torch.eye(h * w).view(1, h, w, h * w).expand(batch, -1, -1, -1)
    return reconstruct_tokens(one_hot, tokens, clusters, **settings).flatten(1, 2)


# --- parity -------------------------------------------------------------------------------------


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


def padding(batch: int, size: tuple[int, int]) -> Tensor:
    """1, and 0 in the last rows and columns, more of them in the later images."""
    weights = torch.ones(batch, *size)
    for index in range(batch):
        weights[index, size[0] - 3 - index :] = 0
        weights[index, :, size[1] - 2 - 3 * index :] = 0
    return weights


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


# --- closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 6), (11, 20)])
def test_as_many_clusters_as_tokens_is_the_identity(size):
    tokens = torch.randn(2, *size, 8)
    clusters, sizes, _ = cluster_tokens(tokens, size, temperature=100.0)
    torch.testing.assert_close(clusters, tokens)
    torch.testing.assert_close(sizes, torch.ones_like(sizes))
    rebuilt = reconstruct_tokens(clusters, tokens, clusters, temperature=100.0)
    torch.testing.assert_close(rebuilt, tokens)


@pytest.mark.parametrize("temperature", [0.02, "auto", 1e6])
def test_constant_map_stays_constant(temperature):
    value = torch.randn(2, 1, 1, 8)
    tokens = value.expand(2, 13, 29, 8)
    clusters, sizes, _ = cluster_tokens(tokens, (7, 11), temperature=temperature)
    torch.testing.assert_close(clusters, value.expand_as(clusters))
    torch.testing.assert_close(sizes.sum((1, 2)), torch.full((2,), 13.0 * 29))
    for window in (None, 5):
        rebuilt = reconstruct_tokens(
            clusters, tokens, clusters, temperature=temperature, window=window
        )
        torch.testing.assert_close(rebuilt, tokens.contiguous())


@pytest.mark.parametrize("window", [None, 3])
def test_one_neighbor_copies_the_nearest_cluster(window):
    tokens, clusters = torch.randn(1, 9, 12, 4), torch.randn(1, 6, 8, 4)
    refined = torch.randn(1, 6, 8, 3)
    distances = oracles.squared_distances(tokens.flatten(0, 2), clusters.flatten(0, 2))
    distances[~oracles.allowed_pairs((9, 12), (6, 8), window)] = torch.inf
    expected = refined.flatten(0, 2)[distances.argmin(1)].view(1, 9, 12, 3)
    for normalize in ("l1", "l2"):
        for temperature in (0.02, "auto"):
            rebuilt = reconstruct_tokens(
                refined, tokens, clusters, 1, temperature, normalize, window
            )
            torch.testing.assert_close(rebuilt, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 3, 5])
def test_constant_cells_are_recovered_exactly(window, dtype):
    """Automatic temperature finds no distance and then sends each token to its own cell alone.

    20 x 20 cells: bf16 cannot number more than 256 of them.
    """
    cells = torch.randn(2, 20, 20, 16).to(dtype)
    tokens = upsample(cells, (2, 3))
    clusters, sizes, _ = cluster_tokens(tokens, (20, 20), window=window)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0}
    torch.testing.assert_close(clusters, cells, **tolerance)
    torch.testing.assert_close(sizes, torch.full_like(sizes, 6.0))
    rebuilt = reconstruct_tokens(clusters, tokens, clusters)
    torch.testing.assert_close(rebuilt, tokens, **tolerance)


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 50.0, "auto"])
@pytest.mark.parametrize("window", [None, 5])
def test_weights_are_normalised(window, temperature):
    tokens = smooth_map(2, (13, 29), 12)
    clusters, *_ = cluster_tokens(tokens, (7, 11))
    settings = {"temperature": temperature, "window": window}
    ones = torch.ones(2, 7, 11, 3)
    torch.testing.assert_close(
        reconstruct_tokens(ones, tokens, clusters, **settings), torch.ones(2, 13, 29, 3)
    )
    norms = weights_of(tokens, clusters, normalize="l2", **settings).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


# --- invariants ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, "auto"])
def test_batch_members_do_not_meet(temperature):
    """Images of very different scale: an automatic temperature must not mix them."""
    tokens = smooth_map(4, (14, 21), 8) * torch.tensor([1.0, 20.0, 0.05, 0.0])[:, None, None, None]
    refined = torch.randn(4, 7, 10, 8)

    def both(chosen: list[int]) -> list[Tensor]:
        clusters, sizes, _ = cluster_tokens(tokens[chosen], (7, 10), temperature=temperature)
        around = [
            reconstruct_tokens(
                refined[chosen], tokens[chosen], clusters, temperature=temperature, window=window
            )
            for window in (None, 5)
        ]
        return [clusters, sizes, *around]

    together = both([0, 1, 2, 3])
    permuted = both([2, 0, 3, 1])
    for index in range(4):
        alone = both([index])
        for whole, shuffled, single in zip(together, permuted, alone, strict=True):
            torch.testing.assert_close(whole[index], single[0], rtol=1e-4, atol=1e-5)
            place = [2, 0, 3, 1].index(index)
            torch.testing.assert_close(shuffled[place], single[0], rtol=1e-4, atol=1e-5)


def test_nothing_reaches_beyond_the_window():
    """A changed token moves clusters up to r cells away, these move tokens r cells further."""
    tokens = smooth_map(1, (24, 36), 8)
    changed = tokens.clone()
    changed[0, 0, 0] += 3
    before, sizes, _ = cluster_tokens(tokens, (12, 18), 2, 0.3, window=3)
    after, new_sizes, _ = cluster_tokens(changed, (12, 18), 2, 0.3, window=3)
    moved = (before - after).abs().amax(-1)[0]
    reach = 2 * 2 * 1  # iterations * 2 * r
    assert moved[0, 0] > 1e-3
    assert moved[reach + 1 :].max() < 1e-5 and moved[:, reach + 1 :].max() < 1e-5
    torch.testing.assert_close(new_sizes[0, reach + 1 :], sizes[0, reach + 1 :])

    refined = torch.randn(1, 12, 18, 4)
    other = refined.clone()
    other[0, 0, 0] += 100
    rebuilt = [reconstruct_tokens(r, tokens, before, window=3) for r in (refined, other)]
    difference = (rebuilt[0] - rebuilt[1]).abs().amax(-1)[0]
    assert difference[:4, :4].max() > 0  # two cells of two tokens
    assert difference[4:].max() == 0 and difference[:, 4:].max() == 0


def flat_map() -> Tensor:
    """More than half of the tokens equal their cluster: the median distance is zero."""
    tokens = torch.zeros(1, 24, 24, 8)
    tokens[:, :, 16:] = smooth_map(1, (24, 8), 8)
    return tokens


def half_flat_map() -> Tensor:
    tokens = smooth_map(1, (24, 24), 8)
    tokens[:, 12:] = 0.25
    return tokens


IMAGES = {
    "random": lambda: smooth_map(1, (24, 24), 8),
    "flat": flat_map,
    "half-flat": half_flat_map,
    "blocks": lambda: upsample(torch.randn(1, 12, 12, 8), (2, 2)),
    "all-equal": lambda: torch.full((1, 24, 24, 8), 0.75),
}
# Rounding of the input is all that may show; affinities are smooth in it.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("image", IMAGES)
def test_auto_temperature_follows_the_scale(image, scale, dtype):
    base = IMAGES[image]()
    tokens = (base * scale).to(dtype)
    clusters, sizes, _ = cluster_tokens(tokens, (12, 12))
    rebuilt = reconstruct_tokens(clusters, tokens, clusters)
    assert clusters.dtype == rebuilt.dtype == dtype and sizes.dtype == torch.float32
    for result in (clusters, sizes, rebuilt):
        assert result.isfinite().all()
    torch.testing.assert_close(sizes.sum(), torch.tensor(24.0 * 24))
    # The oracle on the image before it was scaled and rounded.
    expected, expected_sizes, _ = oracles.cluster(base, (12, 12), 5, "auto", 5)
    expected_rebuilt = oracles.rebuild(expected, base, expected, 20, "auto", "l1")
    assert relative_error(clusters.float() / scale, expected) < TOLERANCE[dtype]
    assert relative_error(rebuilt.float() / scale, expected_rebuilt) < TOLERANCE[dtype]
    if image == "random":
        assert relative_error(sizes, expected_sizes) < TOLERANCE[dtype]


@pytest.mark.parametrize("shift", [-7.0, 100.0])
@pytest.mark.parametrize("image", IMAGES)
def test_auto_temperature_ignores_a_shift(image, shift):
    tokens = IMAGES[image]()
    offset = shift * torch.randn(8)
    results = []
    for moved in (tokens, tokens + offset):
        clusters, sizes, _ = cluster_tokens(moved, (12, 12))
        results.append((clusters, reconstruct_tokens(clusters, moved, clusters), sizes))
    (clusters, rebuilt, sizes), (moved_clusters, moved_rebuilt, moved_sizes) = results
    torch.testing.assert_close(moved_clusters - offset, clusters, rtol=0, atol=2e-3)
    torch.testing.assert_close(moved_rebuilt - offset, rebuilt, rtol=0, atol=2e-3)
    torch.testing.assert_close(moved_sizes.sum(), sizes.sum())


@pytest.mark.parametrize("window", [None, 1])
def test_a_single_token(window):
    tokens = torch.randn(2, 1, 1, 4)
    clusters, sizes, _ = cluster_tokens(tokens, (1, 1))
    torch.testing.assert_close(clusters, tokens)
    assert (sizes == 1).all()
    rebuilt = reconstruct_tokens(clusters, tokens, clusters, neighbors=1, window=window)
    torch.testing.assert_close(rebuilt, tokens)


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("temperature", [1e8, 1e20, 1e30, 1e38, 1e300])
def test_huge_temperature_is_hard_assignment(temperature, window):
    tokens = smooth_map(1, (25, 13), 8)
    clusters, sizes, _ = cluster_tokens(tokens, (18, 9), 1, temperature, window)
    # In float64 this one is far into the limit already, and everything stays representable.
    expected, expected_sizes, _ = oracles.cluster(tokens, (18, 9), 1, 1e8, window)
    assert relative_error(sizes, expected_sizes) < 1e-4
    assert relative_error(clusters, expected) < 1e-4
    refined, clusters = torch.randn(1, 18, 9, 4), spread_clusters(tokens, (18, 9))
    for rebuild_window in (None, window):
        # Only the nearest is left.
        nearest = oracles.rebuild(refined, tokens, clusters, 1, 1.0, "l1", window=rebuild_window)
        for normalize in ("l1", "l2"):
            settings = (20, temperature, normalize, rebuild_window)
            rebuilt = reconstruct_tokens(refined, tokens, clusters, *settings)
            assert relative_error(rebuilt, nearest) < 1e-4


def test_tiny_temperature_is_the_mean_of_the_window():
    tokens = smooth_map(1, (16, 16), 8)
    for temperature in (1e-12, 1e-30):
        clusters, sizes, _ = cluster_tokens(tokens, (10, 10), 2, temperature, 3)
        expected, expected_sizes, _ = oracles.cluster(tokens, (10, 10), 2, temperature, 3)
        assert relative_error(sizes, expected_sizes) < 1e-4
        assert relative_error(clusters, expected) < 1e-4


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("value", [0.0, 0.3, 1e4])
def test_a_black_image_keeps_its_sizes(value, window):
    """No variance, so an extreme temperature; 25 to 18 gives tiles of unequal token counts."""
    tokens = torch.full((1, 25, 25, 8), value)
    clusters, sizes, _ = cluster_tokens(tokens, (18, 18), window=window)
    torch.testing.assert_close(clusters, torch.full_like(clusters, value))
    assert sizes.isfinite().all()
    torch.testing.assert_close(sizes.sum(), torch.tensor(25.0 * 25))


@pytest.mark.parametrize("temperature", [1.0, 1e12, "auto"])
@pytest.mark.parametrize("normalize", ["l1", "l2"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_no_valid_cluster_in_reach_stays_finite(scale, window, normalize, temperature):
    tokens = scale * smooth_map(1, (24, 24), 8)
    clusters, *_ = cluster_tokens(tokens, (12, 12))
    valid = torch.ones(1, 12, 12, dtype=torch.bool)
    valid[:, 6:] = False
    refined = torch.randn(1, 12, 12, 4)
    for mask in (valid, torch.zeros_like(valid)):
        rebuilt = reconstruct_tokens(
            refined, tokens, clusters, 20, temperature, normalize, window, mask
        )
        assert rebuilt.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, "auto"])
def test_an_image_of_nothing_but_padding(temperature):
    tokens, weights = smooth_map(2, (12, 18), 8), torch.ones(2, 12, 18)
    weights[1] = 0
    clusters, sizes, _ = cluster_tokens(tokens, (6, 9), temperature=temperature, weights=weights)
    assert clusters.isfinite().all()
    assert (sizes[1] == 0).all()
    alone, *_ = cluster_tokens(tokens[:1], (6, 9), temperature=temperature)
    torch.testing.assert_close(clusters[:1], alone)


def test_what_padding_holds_does_not_matter():
    tokens, weights = smooth_map(1, (16, 24), 8), padding(1, (16, 24))
    garbage = torch.where(weights[..., None] > 0, tokens, 1e3 * torch.randn_like(tokens))
    for temperature in (0.3, "auto"):
        clusters, sizes, _ = cluster_tokens(tokens, (8, 12), 5, temperature, weights=weights)
        again, sizes_again, _ = cluster_tokens(garbage, (8, 12), 5, temperature, weights=weights)
        torch.testing.assert_close(again, clusters, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sizes_again, sizes, rtol=1e-4, atol=1e-5)


def test_memory_layout_does_not_matter_and_inputs_stay():
    tokens = smooth_map(2, (13, 29), 8)
    weights = torch.rand(2, 13, 29)
    channels_first = tokens.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    copies = tokens.clone(), weights.clone()
    clusters, *_ = cluster_tokens(tokens, (7, 11), weights=weights)
    rebuilt = reconstruct_tokens(clusters, tokens, clusters)
    assert torch.equal(tokens, copies[0]) and torch.equal(weights, copies[1])
    again, *_ = cluster_tokens(channels_first, (7, 11), weights=weights)
    torch.testing.assert_close(again, clusters)
    torch.testing.assert_close(reconstruct_tokens(again, channels_first, again), rebuilt)


# --- pitfalls of the published code -------------------------------------------------------------


def test_ties_at_the_last_neighbor():
    """All clusters equally far: exactly k of them count, not all."""
    tokens, clusters = torch.zeros(1, 12, 12, 4), torch.ones(1, 6, 6, 4)
    for temperature in (0.5, "auto"):
        weights = weights_of(tokens, clusters, neighbors=5, temperature=temperature)
        assert ((weights > 0).sum(-1) == 5).all()
        torch.testing.assert_close(weights[weights > 0], torch.full((144 * 5,), 0.2))
    # In a corner of the grid a window of 3 holds 4 clusters, at an edge 6, elsewhere 9.
    weights = weights_of(tokens, clusters, neighbors=5, temperature=0.5, window=3)
    counts = (weights > 0).sum(-1).view(12, 12)
    expected = torch.full((12, 12), 5)
    for rows in (slice(0, 2), slice(10, 12)):
        for cols in (slice(0, 2), slice(10, 12)):
            expected[rows, cols] = 4
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("normalize", ["l1", "l2"])
@pytest.mark.parametrize("window", [None, 3])
def test_weights_that_underflow(window, normalize):
    """exp(-T d) is zero in any type; the ratios between the weights are not."""
    tokens = smooth_map(1, (12, 12), 8)
    clusters = smooth_map(1, (6, 6), 8) + 50
    refined = torch.randn(1, 6, 6, 4)
    settings = (4, 0.1, normalize)
    distances = oracles.squared_distances(tokens.flatten(0, 2), clusters.flatten(0, 2))
    assert (-0.1 * distances).exp().max() == 0
    rebuilt = reconstruct_tokens(refined, tokens, clusters, *settings, window)
    expected = oracles.rebuild(refined, tokens, clusters, *settings, window=window)
    assert relative_error(rebuilt, expected) < 2e-3
    assert rebuilt.abs().sum(-1).min() > 0


@pytest.mark.parametrize("window", [None, 5])
def test_cancellation_under_a_large_offset(window):
    """|x|^2 is 1e9 and differences are 1: expanding the square in fp32 would leave noise."""
    tokens = smooth_map(1, (13, 29), 16) + 1e4
    clusters, sizes, _ = cluster_tokens(tokens, (7, 11), 5, 0.3, 5)
    expected, expected_sizes, _ = oracles.cluster(tokens, (7, 11), 5, 0.3, 5)
    assert relative_error(sizes, expected_sizes) < 1e-4
    # The output itself is rounded to multiples of 1e-3.
    assert (clusters.double() - expected).abs().max() < 1.5e-3
    # Given in fp32 to both, so that only the arithmetic differs.
    clusters, refined = expected.float(), torch.randn(1, 7, 11, 4)
    for temperature in (0.3, "auto"):
        rebuilt = reconstruct_tokens(refined, tokens, clusters, 9, temperature, "l1", window)
        wanted = oracles.rebuild(refined, tokens, clusters, 9, temperature, "l1", window=window)
        assert relative_error(rebuilt, wanted) < 1e-3


def test_zero_distances_stay_zero():
    """Tokens that equal their clusters: rounding would turn the distances negative."""
    cells = 100 * torch.randn(1, 6, 6, 64)
    tokens = upsample(cells, (2, 2))
    weights = weights_of(tokens, cells, neighbors=3, temperature=1.0)
    own = F.one_hot(upsample(torch.arange(36).view(1, 6, 6, 1), (2, 2)).flatten(), 36)
    torch.testing.assert_close(weights[0], own.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1e-7, "auto"])
def test_half_precision_does_not_overflow(temperature, dtype):
    """Squared norms of 1e8 where fp16 ends at 65504."""
    tokens = (300 * smooth_map(1, (14, 21), 1024)).to(dtype)
    clusters, sizes, _ = cluster_tokens(tokens, (7, 10), temperature=temperature)
    wanted, wanted_sizes, _ = cluster_tokens(tokens.float(), (7, 10), temperature=temperature)
    assert clusters.dtype == dtype and clusters.isfinite().all()
    torch.testing.assert_close(sizes, wanted_sizes)
    # The arithmetic is that of fp32: only the output is rounded.
    assert torch.equal(clusters, wanted.to(dtype))
    for window in (None, 5):
        rebuilt = reconstruct_tokens(
            clusters, tokens, clusters, temperature=temperature, window=window
        )
        full = reconstruct_tokens(
            clusters.float(), tokens, clusters, temperature=temperature, window=window
        )
        assert rebuilt.dtype == dtype and torch.equal(rebuilt, full.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype):
    """Under autocast a plain product is taken in half precision, whatever its inputs."""
    tokens, refined = 40 * smooth_map(1, (13, 29), 256), torch.randn(1, 7, 11, 8)
    for temperature in (1e-4, "auto"):
        clusters, sizes, _ = cluster_tokens(tokens, (7, 11), temperature=temperature)
        with torch.autocast("cpu", dtype):
            again, sizes_again, _ = cluster_tokens(tokens, (7, 11), temperature=temperature)
        torch.testing.assert_close(again, clusters)
        torch.testing.assert_close(sizes_again, sizes)
        for window in (None, 5):
            settings = {"temperature": temperature, "window": window}
            rebuilt = reconstruct_tokens(refined, tokens, clusters, **settings)
            with torch.autocast("cpu", dtype):
                rebuilt_again = reconstruct_tokens(refined, tokens, clusters, **settings)
            torch.testing.assert_close(rebuilt_again, rebuilt)


def test_no_device_is_hard_coded():
    folder = Path(operators.__file__).parent
    source = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
    assert not re.search(r"\.(cuda|cpu)\(|device=[\"']", source)
    tokens = torch.empty(2, 13, 29, 8, device="meta")
    clusters, sizes, _ = cluster_tokens(tokens, (7, 11), weights=tokens[..., 0])
    assert (clusters.shape, clusters.device.type) == ((2, 7, 11, 8), "meta")
    assert (sizes.shape, sizes.device.type) == ((2, 7, 11), "meta")
    for window in (None, 5):
        rebuilt = reconstruct_tokens(clusters, tokens, clusters, window=window, valid=sizes > 0)
        assert (rebuilt.shape, rebuilt.device.type) == ((2, 13, 29, 8), "meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu():
    tokens, refined = smooth_map(2, (25, 19), 64), torch.randn(2, 18, 17, 8)
    clusters, sizes, _ = cluster_tokens(tokens, (18, 17))
    on_gpu, sizes_on_gpu, _ = cluster_tokens(tokens.cuda(), (18, 17))
    assert relative_error(on_gpu.cpu(), clusters) < 1e-3
    assert relative_error(sizes_on_gpu.cpu(), sizes) < 1e-3
    for window in (None, 5):
        rebuilt = reconstruct_tokens(refined, tokens, clusters, window=window)
        rebuilt_on_gpu = reconstruct_tokens(
            refined.cuda(), tokens.cuda(), clusters.cuda(), window=window
        )
        assert relative_error(rebuilt_on_gpu.cpu(), rebuilt) < 1e-3


def test_layers_keep_nothing():
    clustering, reconstruction = TokenClustering((7, 11)), TokenReconstruction()
    before = [dict(vars(layer)) for layer in (clustering, reconstruction)]
    tokens = smooth_map(1, (13, 29), 8)
    clusters = clustering(tokens)
    reconstruction(clusters, tokens, clusters)
    for layer, attributes in zip((clustering, reconstruction), before, strict=True):
        assert not layer.state_dict()
        assert not [*layer.parameters(), *layer.buffers()]
        assert vars(layer) == attributes
    assert "grid=(7, 11)" in repr(clustering) and "neighbors=20" in repr(reconstruction)


def test_layers_are_the_functions():
    tokens, weights = smooth_map(2, (13, 29), 8), padding(2, (13, 29))
    clusters, sizes = TokenClustering((7, 11), 3, 0.2, 3)(tokens, weights, return_sizes=True)
    expected, expected_sizes, _ = oracles.cluster(tokens, (7, 11), 3, 0.2, 3, weights=weights)
    used = expected_sizes > 1e-6
    assert relative_error(clusters[used], expected[used]) < 1e-4
    assert relative_error(sizes, expected_sizes) < 1e-4
    clusters = spread_clusters(tokens, (7, 11))
    refined, valid = torch.randn(2, 7, 11, 5), torch.rand(2, 7, 11) > 0.2
    rebuilt = TokenReconstruction(4, 0.2, "l2", 5)(refined, tokens, clusters, valid, weights)
    expected = oracles.rebuild(refined, tokens, clusters, 4, 0.2, "l2", window=5, valid=valid)
    reachable = (oracles.allowed_pairs((13, 29), (7, 11), 5) & valid.flatten(1)[:, None]).any(-1)
    assert reachable.all()
    assert relative_error(rebuilt, expected) < 1e-4


def test_two_threads_share_a_layer():
    clustering, reconstruction = TokenClustering((7, 10)), TokenReconstruction(neighbors=9)
    maps = [smooth_map(1, size, 32) * scale for size, scale in (((14, 21), 1.0), ((28, 30), 30.0))]

    def once(tokens: Tensor) -> Tensor:
        clusters = clustering(tokens)
        return reconstruction(clusters, tokens, clusters)

    serial = [once(tokens) for tokens in maps]
    start = threading.Barrier(len(maps))
    wrong: list[int] = []

    def repeat(index: int) -> None:
        start.wait()
        for _ in range(15):
            if not torch.allclose(once(maps[index]), serial[index], rtol=1e-4, atol=1e-4):
                wrong.append(index)

    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(len(maps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Recorder(TorchDispatchMode):
    """Keeps the inner and the last axis of every matrix product and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, int]] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.products.append(tuple(args[-1].shape[-2:]))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            # An expanded view takes no memory.
            if isinstance(tensor, Tensor) and tensor.numel():
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.largest = max(self.largest, elements)
        return result


@pytest.mark.parametrize("temperature", [0.3, "auto"])
@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_no_product_is_wasted(iterations, temperature):
    """One product for the scores and one for the update in each step, sizes and places in it."""
    channels = 24
    tokens = smooth_map(1, (20, 20), channels)
    with Recorder() as recorder:
        cluster_tokens(tokens, (14, 14), iterations, temperature)
    scores = [product for product in recorder.products if product[0] == channels]
    updates = [product for product in recorder.products if product[1] == channels + 4]
    assert (len(scores), len(updates)) == (iterations, iterations)
    assert len(recorder.products) == 2 * iterations


def test_products_are_local():
    """At 40 x 40 to 28 x 28 the tiles do a fifth of the dense work."""
    tokens = torch.randn(1, 40, 40, 64)
    with FlopCounterMode(display=False) as counter:
        cluster_tokens(tokens, (28, 28), 5, 0.3)
    dense = 5 * 2 * (2 * 1600 * 784 * 64)  # this counter takes two FLOPs a multiply-add
    assert counter.get_total_flops() < 0.2 * dense


def test_memory_stays_small():
    n, m, c = 40 * 40, 28 * 28, 256
    tokens = torch.randn(1, 40, 40, c)
    with Recorder() as clustering:
        clusters, *_ = cluster_tokens(tokens, (28, 28))
    with Recorder() as windowed:
        reconstruct_tokens(clusters, tokens, clusters, window=5)
    with Recorder() as everywhere:
        reconstruct_tokens(clusters, tokens, clusters)
    # Copies of the map and of the clusters with their rims; a global search needs every score.
    assert clustering.largest <= 4 * n * c and windowed.largest <= 4 * n * c
    assert everywhere.largest <= n * m
    assert max(clustering.largest, windowed.largest, everywhere.largest) < n * m * c / 100


# --- arguments ----------------------------------------------------------------------------------

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
