"""FLOP counts against numbers worked out by hand; one FLOP is one multiply-add."""

import pytest
import torch
from detectron2.modeling import ViT
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from expedit_d2 import expedite
from expedit_d2.analysis.flops import count_flops

NORM = 5  # fvcore's count of an affine layer norm, for each element


def block(tokens: int, dim: int, keys: int | None = None) -> int:
    """Linear layers (3 + 1 + 8) dim^2, attention 2 keys dim, two norms."""
    keys = tokens if keys is None else keys
    return tokens * (12 * dim * dim + 2 * keys * dim + 2 * NORM * dim)


def clustering(height, width, grid, radius, dim, iterations):
    """Tiles of up to 4 x 4 cells: products with the cells of tile and rim, and their sums."""
    rows, cols = (axis(n, g, radius) for n, g in zip((height, width), grid, strict=True))
    tiles = rows[0] * cols[0]
    tokens, cells = rows[1] * cols[1], rows[2] * cols[2]
    carried = dim + 4  # with one, row, column and a zero
    products = tiles * tokens * cells * (dim + carried)  # scores, and weighted sums of tokens
    squares = grid[0] * grid[1] * dim
    added = tiles * cells * carried
    once = height * width * carried + tiles * tokens * dim + 1  # pooling, and how far tokens spread
    return iterations * (products + squares + added) + once


def axis(tokens, cells, radius):
    """Tiles, tokens a tile, cells a tile sees."""
    tiles = -(-cells // 4)
    tile = -(-cells // tiles)
    return tiles, min(tokens, -(-tile * tokens // cells)), min(cells, tile + 2 * radius)


def test_plain_timm_vit():
    vit = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=0
    )
    flops = count_flops(vit, torch.randn(1, 3, 32, 32))
    tokens = 65
    assert flops.before == 3 * block(tokens, 16)
    # patches, final norm (global pooling by class token is free)
    assert flops.embed == 64 * 16 * 3 * 4 * 4 + NORM * tokens * 16
    assert (flops.clustering, flops.after, flops.reconstruction, flops.head) == (0, 0, 0, 0)
    assert flops.uncounted == {}


def test_expedited_timm_vit():
    vit = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=0
    )
    plain = count_flops(vit, torch.randn(1, 3, 32, 32))
    with expedite(vit, alpha=1, grid=(4, 6), window=3, iterations=2, temperature=0.1):
        flops = count_flops(vit, torch.randn(1, 3, 32, 32))
    assert flops.embed == plain.embed
    assert flops.before == block(65, 16)
    assert flops.after == 2 * block(4 * 6 + 1, 16)
    assert flops.clustering == clustering(8, 8, (4, 6), 1, 16, iterations=2)
    # Neighbors in a window of 5 x 5: two tiles, each 32 tokens by 24 clusters, scores and sums; and
    # the clusters' squares.
    assert flops.reconstruction == 2 * 2 * 32 * 24 * 16 + 24 * 16
    assert flops.total == pytest.approx(flops.transformer + flops.head)
    assert flops.uncounted == {}


def test_automatic_temperature_costs_the_nearest_distance_once():
    vit = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=0
    )
    counts = {}
    for temperature in (0.1, "auto"):
        with expedite(vit, alpha=1, grid=(4, 6), temperature=temperature):
            counts[temperature] = count_flops(vit, torch.randn(1, 3, 32, 32))
    # Once in each operator: squared norms of 64 differences, and the variance of 64 tokens, which
    # clustering takes with any temperature.
    distances, variance = 64 * (16 + 1), 64 * 16 + 1
    for part, expected in (("clustering", distances), ("reconstruction", distances + variance)):
        assert getattr(counts["auto"], part) - getattr(counts[0.1], part) == expected


def test_published_reconstruction_counts_its_neighbors():
    vit = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0
    )
    settings = {"neighbor_window": 0, "neighbors": 7, "temperature": 0.1}
    with expedite(vit, alpha=1, grid=(4, 6), **settings):
        flops = count_flops(vit, torch.randn(1, 3, 32, 32))
    assert flops.reconstruction == 64 * 24 * 16 + 64 * 7 * 16 + 24 * 16


def vitdet(**kwargs):
    settings = {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 2,
        "use_rel_pos": True,
        "window_size": 4,
        "window_block_indexes": [0, 1],
        "use_abs_pos": False,
    }
    return ViT(**{**settings, **kwargs})


def relative(tokens, rows, cols, dim):
    """Position terms: each query with every row and with every column."""
    return tokens * (rows + cols) * dim


def test_plain_vitdet():
    flops = count_flops(vitdet(), torch.randn(1, 3, 64, 64))
    windowed = block(64, 16, keys=16) + relative(64, 4, 4, 16)
    assert flops.before == 2 * windowed + block(64, 16) + relative(64, 8, 8, 16)
    assert flops.embed == 64 * 16 * 3 * 8 * 8
    assert flops.uncounted == {}


def test_expedited_vitdet_counts_its_attention_and_positions():
    vit = vitdet()
    settings = {"iterations": 3, "temperature": 0.1, "positions": "grid"}
    with expedite(vit, alpha=1, grid=(4, 4), **settings):
        flops = count_flops(vit, torch.randn(1, 3, 64, 64))
    windowed = block(16, 16, keys=4) + relative(16, 2, 2, 16)
    assert flops.after == windowed + block(16, 16) + relative(16, 4, 4, 16)
    assert flops.clustering == clustering(8, 8, (4, 4), 2, 16, iterations=3)
    assert flops.uncounted == {}


def positioned(tokens, keys, size, margin, dim, heads):
    """Position terms of tokens anywhere, along two axes of ``size`` tokens and a margin each."""
    rows = 2 * (2 * size - 1)  # of both tables, made for this size
    places = 2 * (size + 2 * margin)
    # Each query with every row, between two of them, and summed over the places for each key.
    return tokens * rows * dim + tokens * places * heads + tokens * keys * places * heads


@pytest.mark.parametrize("grid", [(4, 4), (5, 7)])
def test_expedited_vitdet_counts_its_positions_of_clusters(grid):
    vit = vitdet()
    with expedite(vit, alpha=1, grid=grid, iterations=3, temperature=0.1):
        flops = count_flops(vit, torch.randn(1, 3, 64, 64))
    # A window of 4 x 4 tokens is one of 2 x 2 or of 2 x 4 cells; 5 rows are padded to 6.
    window = (2, 2) if grid == (4, 4) else (2, 4)
    keys = window[0] * window[1]
    real = grid[0] * grid[1]
    padded = 16 if grid == (4, 4) else 6 * 8
    # Attention works on padding too, the rest of the block does not.
    windowed = block(real, 16, keys=0) + 4 * (padded - real) * 16 * 16 + 2 * padded * keys * 16
    windowed += positioned(padded, keys, size=4, margin=3, dim=16, heads=2)
    everywhere = block(real, 16) + positioned(real, real, size=8, margin=0, dim=16, heads=2)
    assert flops.after == windowed + everywhere
    assert flops.clustering == clustering(8, 8, grid, 2, 16, iterations=3)
    assert flops.uncounted == {}


def test_head_is_everything_outside_the_transformer():
    model = nn.Sequential(
        VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=1),
        nn.Linear(1000, 10),
    )
    flops = count_flops(model, torch.randn(1, 3, 16, 16))
    assert flops.head == 1000 * 10


def test_unknown_operators_are_reported():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = VisionTransformer(
                img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=1
            )

        def forward(self, x):
            return torch.erf(self.vit(x))

    assert count_flops(Odd(), torch.randn(1, 3, 16, 16)).uncounted == {"aten::erf": 1}


def test_training_mode_is_left_as_it_was():
    vit = vitdet().train()
    count_flops(vit, torch.randn(1, 3, 64, 64))
    assert vit.training
