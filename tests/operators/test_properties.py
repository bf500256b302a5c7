"""The operators where the result has a closed form, and by what must hold for any input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expedit_d2.operators import (
    cluster_tokens,
    reconstruct_tokens,
)
from support import oracles
from support.token_maps import (
    DTYPES,
    padding,
    relative_error,
    smooth_map,
    spread_clusters,
    upsample,
    weights_of,
)


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
