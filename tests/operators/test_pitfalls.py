"""What the published code gets wrong, and the operators must not."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from expedit_d2 import operators
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
