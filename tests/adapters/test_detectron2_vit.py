"""Detectron2's ViT, expedited: exactness, windows, padding, relative positions, an oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from detectron2.modeling import SimpleFeaturePyramid, ViT
from torch import Tensor, nn

from expedit_d2 import expedite
from expedit_d2.adapters import find_host
from expedit_d2.operators import cluster_tokens, reconstruct_tokens
from expedit_d2.tokens import Tokens
from support import oracles

PATCH = 4
# Every token its own cluster: nothing is lost.
IDENTITY = {"temperature": 1e6, "neighbors": 1}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_vit(side: int = 12, positions: bool = True, **changes) -> ViT:
    """A random ViT with tables for a map of side x side; nothing in it is zero."""
    settings = {
        "img_size": side * PATCH,
        "patch_size": PATCH,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "use_abs_pos": positions,
        "use_rel_pos": True,
        "window_size": 7,
        "window_block_indexes": (0, 2),
        "pretrain_img_size": 8 * PATCH,
    }
    vit = ViT(**(settings | changes)).eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if "rel_pos" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif positions:
                parameter.normal_(std=0.5)
    return vit


def images(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size[0] * PATCH, size[1] * PATCH)


def features(vit: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return vit(x)["last_feat"]


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# --- one cluster a token is the plain model --------------------------------------------------


@pytest.mark.parametrize("positions", ["clusters", "grid"])
@pytest.mark.parametrize("scope", ["map", "window"])
@pytest.mark.parametrize("alpha", [0, 1, 2, 3, (0, 2), (1, 3), (0, 1, 2, 3)])
def test_one_cluster_a_token_is_the_plain_model(alpha, scope, positions):
    vit, x = tiny_vit(), images((20, 16), batch=3)  # 20 x 16 needs window padding
    expected = features(vit, x)
    grid = (20, 16) if scope == "map" else (7, 7)
    with expedite(vit, alpha, grid=grid, scope=scope, positions=positions, **IDENTITY):
        assert error(features(vit, x), expected) < 1e-5


@pytest.mark.parametrize("positions", ["clusters", "grid"])
@pytest.mark.parametrize("scope", ["map", "window"])
@pytest.mark.parametrize("size", [(12, 12), (7, 7), (5, 6), (14, 7), (3, 17)])
def test_one_cluster_a_token_at_other_sizes(size, scope, positions):
    vit, x = tiny_vit(), images(size)
    expected = features(vit, x)
    grid = size if scope == "map" else (7, 7)
    with expedite(vit, 1, grid=grid, scope=scope, positions=positions, **IDENTITY):
        assert error(features(vit, x), expected) < 1e-5


@pytest.mark.parametrize("scope", ["map", "window"])
@pytest.mark.parametrize(
    "changes",
    [
        {"use_rel_pos": False},
        {"use_abs_pos": False},
        {"window_block_indexes": (3,)},
        {"window_block_indexes": (0, 1, 2, 3)},
        {"qkv_bias": False},
        {"residual_block_indexes": (1, 3)},
        {"window_size": 1},
        {"img_size": 2 * PATCH},
    ],
    ids=str,
)
def test_one_cluster_a_token_for_other_architectures(changes, scope):
    vit, x = tiny_vit(**changes), images((9, 12))
    expected = features(vit, x)
    side = changes.get("window_size", 7)
    grid = (9, 12) if scope == "map" else (side, side)
    for size_aware in (True, False):
        with expedite(vit, 0, grid=grid, scope=scope, size_aware=size_aware, **IDENTITY):
            assert error(features(vit, x), expected) < 1e-5


def test_one_cluster_a_token_without_windows():
    vit, x = tiny_vit(window_block_indexes=()), images((9, 12))
    expected = features(vit, x)
    with expedite(vit, 1, grid=(9, 12), **IDENTITY):
        assert error(features(vit, x), expected) < 1e-5


@pytest.mark.parametrize("settings", [{"residual": True}, {"ratio": 1.0, "grid": None}], ids=str)
@pytest.mark.parametrize("scope", ["map", "window"])
def test_one_cluster_a_token_for_other_settings(settings, scope):
    vit, x = tiny_vit(), images((9, 12))
    expected = features(vit, x)
    grid = (9, 12) if scope == "map" else (7, 7)
    with expedite(vit, 1, **({"grid": grid, "scope": scope} | IDENTITY | settings)):
        assert error(features(vit, x), expected) < 1e-5


def test_inside_a_feature_pyramid():
    pyramid = SimpleFeaturePyramid(tiny_vit(), "last_feat", 8, [2.0, 1.0]).eval()
    x = images((12, 8))
    with torch.no_grad():
        expected = pyramid(x)
        with expedite(pyramid, 2, grid=(12, 8), **IDENTITY):
            actual = pyramid(x)
    assert list(actual) == list(expected)
    for name in expected:
        assert error(actual[name], expected[name]) < 1e-4


# --- size-aware attention is exact where clusters hold equal tokens --------------------------


def cells_of(size: tuple[int, int], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return tuple(torch.arange(s) * g // s for s, g in zip(size, grid, strict=True))


def constant_cells(size: tuple[int, int], grid: tuple[int, int], batch: int = 2) -> Tensor:
    """Images whose tokens are equal within each cell of the grid: a random patch for each cell."""
    rows, cols = cells_of(size, grid)
    patches = torch.randn(batch, 3, *grid, PATCH, PATCH)[:, :, rows][:, :, :, cols]
    return patches.transpose(3, 4).flatten(4, 5).flatten(2, 3)


GLOBAL = ()
MIXED = (0, 2)
EXACT = [
    # size, window, windowed blocks, grid of the map, grid given, scope; are the cells unequal?
    ((10, 10), 7, GLOBAL, (4, 4), (4, 4), "map", True),
    ((9, 14), 7, GLOBAL, (4, 5), (4, 5), "map", True),
    ((10, 10), 5, MIXED, (4, 4), (4, 4), "map", True),
    ((10, 15), 5, MIXED, (4, 6), (4, 6), "map", True),
    ((10, 10), 4, MIXED, (5, 5), (5, 5), "map", False),  # windows padded by two tokens, one cell
    ((10, 14), 4, MIXED, (5, 7), (5, 7), "map", False),
    ((10, 10), 5, MIXED, (4, 4), (2, 2), "window", True),
    ((10, 15), 5, (0, 1, 2, 3), (4, 6), (2, 2), "window", True),
    ((8, 8), 4, MIXED, (4, 4), (2, 2), "window", False),
    ((10, 10), 4, MIXED, (5, 5), (2, 2), "window", False),  # as above, and a window of one cell
    ((10, 6), 4, MIXED, (5, 3), (2, 2), "window", False),
]


@pytest.mark.parametrize("size,window,windowed,cells,grid,scope,unequal", EXACT)
def test_equal_tokens_cluster_without_loss(size, window, windowed, cells, grid, scope, unequal):
    vit = tiny_vit(10, positions=False, window_size=window, window_block_indexes=windowed)
    x = constant_cells(size, cells)
    expected = features(vit, x)
    settings = {"grid": grid, "scope": scope, "temperature": 1e4, "neighbors": 1}
    with expedite(vit, 0, **settings):
        assert error(features(vit, x), expected) < 1e-5
    if unequal:  # so that the test could fail
        with expedite(vit, 0, size_aware=False, **settings):
            assert error(features(vit, x), expected) > 1e-3


@pytest.mark.parametrize("settings", [{}, {"neighbor_window": 0, "temperature": 1e4}], ids=str)
def test_equal_tokens_cluster_without_loss_at_other_settings(settings):
    """Cells of equal size are pooled exactly at once, so the automatic temperature will do."""
    vit = tiny_vit(10, positions=False, window_size=4)
    x = constant_cells((8, 12), (4, 6))
    expected = features(vit, x)
    with expedite(vit, 0, **({"grid": (4, 6)} | settings)):
        assert error(features(vit, x), expected) < 1e-5


# --- padding ---------------------------------------------------------------------------------


def reduce(vit: ViT, maps: Tensor, **settings) -> tuple[Tokens, object]:
    with expedite(vit, 0, **settings) as handle:
        method = handle.blocks.methods["after_0"]
    size = (maps.shape[1], maps.shape[2])
    return method.reduce(Tokens(maps, size=size, span=size))


@pytest.mark.parametrize("temperature", ["auto", 0.1, 10.0])
def test_clusters_of_a_padded_window_are_those_of_its_real_part(temperature):
    # 10 x 14 in windows of 4: the last windows hold 2 of 4 rows or columns, one of two cells.
    maps = torch.randn(2, 10, 14, 32)
    tokens, _ = reduce(
        tiny_vit(window_size=4), maps, grid=(2, 2), scope="window", temperature=temperature
    )
    assert tokens.features.shape == (2, 6, 8, 32)
    assert tokens.size == (10, 14) and tokens.span == (12, 16)
    expected_valid = torch.ones(2, 6, 8, dtype=torch.bool)
    expected_valid[:, 5] = False
    expected_valid[:, :, 7] = False
    assert torch.equal(tokens.valid, expected_valid)
    for row in range(3):
        for col in range(4):
            part = maps[:, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
            h, w = part.shape[1] // 2, part.shape[2] // 2
            clusters, sizes, places = cluster_tokens(part, (h, w), 5, temperature, 5)
            here = (slice(None), slice(2 * row, 2 * row + h), slice(2 * col, 2 * col + w))
            torch.testing.assert_close(tokens.features[here], clusters, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(tokens.sizes[here], sizes, atol=1e-4, rtol=1e-5)
            places = places + torch.tensor([4.0 * row, 4.0 * col])
            torch.testing.assert_close(tokens.positions[here], places, atol=1e-4, rtol=1e-5)


def mean_position(tokens: Tokens) -> Tensor:
    """(B, 2), of all the tokens that the clusters stand for."""
    sizes = tokens.sizes if tokens.valid is None else tokens.sizes * tokens.valid
    sizes = sizes[..., None]
    return (tokens.positions * sizes).sum((1, 2)) / sizes.sum((1, 2))


@pytest.mark.parametrize("scope,grid", [("map", (5, 4)), ("window", (4, 4))])
@pytest.mark.parametrize("temperature", ["auto", 0.1])
def test_positions_are_those_of_the_map(scope, grid, temperature):
    """Their mean, weighted by size, is that of the tokens."""
    maps, settings = torch.randn(2, 20, 16, 32), {"scope": scope, "temperature": temperature}
    tokens, _ = reduce(tiny_vit(), maps, grid=grid, **settings)
    assert tokens.positions.shape == (*tokens.features.shape[:3], 2)
    torch.testing.assert_close(mean_position(tokens), torch.tensor([[9.5, 7.5]] * 2))
    without, _ = reduce(tiny_vit(), maps, grid=grid, positions="grid", **settings)
    assert without.positions is None
    assert torch.equal(without.features, tokens.features)


@pytest.mark.parametrize("size", [(20, 16), (5, 6), (8, 15)])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (7, 7), (1, 1)])
def test_every_real_token_is_in_a_valid_cluster(size, grid):
    """No token, and no vote of one, may end in a cluster that stands for padding."""
    maps = torch.randn(2, *size, 32)
    tokens, _ = reduce(tiny_vit(), maps, grid=grid, scope="window")
    valid = tokens.valid if tokens.valid is not None else torch.ones_like(tokens.sizes).bool()
    total = (tokens.sizes * valid).sum((1, 2))
    torch.testing.assert_close(total, torch.full((2,), float(size[0] * size[1])))
    assert (tokens.sizes[~valid] == 0).all()


@pytest.mark.parametrize("size_aware", [True, False])
@pytest.mark.parametrize("size", [(20, 16), (10, 9), (5, 6)])
def test_what_padding_contains_does_not_matter(size, size_aware, monkeypatch):
    from expedit_d2.methods import grid

    vit, x = tiny_vit(), images(size)
    original = grid.partition
    outputs = []
    for value in (0.0, 5.0):

        def padded_with(t, window, value=value):
            return original(t, window, value=value if t.shape[-1] == 32 else 0.0)

        monkeypatch.setattr(grid, "partition", padded_with)
        with expedite(vit, 1, grid=(4, 4), scope="window", size_aware=size_aware):
            outputs.append(features(vit, x))
    assert error(outputs[1], outputs[0]) < 1e-5


def run_block(layout, block, tokens: Tokens) -> Tensor:
    """One block on reduced tokens, prepared as the hook does it."""
    context = layout.prepare(tokens.features, tokens)
    return layout.run(block, tokens.features, replace(tokens, context=context))


@pytest.mark.parametrize("size_aware", [True, False])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_padded_places_are_not_seen_by_real_ones(index, size_aware):
    vit = tiny_vit(window_size=4, residual_block_indexes=(1, 2))
    layout = find_host(vit).layout(size_aware)
    valid = torch.ones(2, 6, 6, dtype=torch.bool)
    valid[:, 5], valid[:, :, 4:] = False, False
    places = torch.randn(2, 6, 6, 32)
    sizes = valid * (torch.rand(2, 6, 6) * 4 + 1)
    outputs = []
    for other in (1.0, 30.0):
        x = torch.where(valid[..., None], places, other * torch.randn_like(places))
        tokens = Tokens(x, size=(10, 8), span=(12, 12), sizes=sizes, valid=valid)
        with torch.no_grad():
            out = run_block(layout, vit.blocks[index], tokens)
        assert torch.isfinite(out).all()
        outputs.append(out[valid])
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1])
def test_sizes_not_given_are_one_each(index):
    """For methods that keep no count; the padding of windows keeps its votes all the same."""
    vit = tiny_vit(window_size=4)
    layout = find_host(vit).layout(True)
    outputs, x = [], torch.randn(2, 5, 5, 32)
    for sizes in (None, torch.ones(2, 5, 5)):
        tokens = Tokens(x, size=(10, 10), span=(10, 10), sizes=sizes)
        outputs.append(run_block(layout, vit.blocks[index], tokens))
    torch.testing.assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("scope,grid", [("map", (5, 4)), ("window", (4, 4))])
@pytest.mark.parametrize("x", [torch.zeros(1, 3, 80, 64), torch.full((1, 3, 36, 52), 255.0)])
def test_flat_images_stay_finite(x, scope, grid):
    vit = tiny_vit()
    for settings in ({}, {"size_aware": False}, {"residual": True}, {"normalize": "l2"}):
        with expedite(vit, 1, grid=grid, scope=scope, **settings):
            assert torch.isfinite(features(vit, x)).all()


# --- an explicit forward pass to compare with ------------------------------------------------


def explicit_attention(attn, places, step, size, margin) -> dict[tuple[int, int], Tensor]:
    """Attention among places {(row, col): (vector, votes, position)}, one pair at a time.

    A position is in tokens; None is on the regular grid.

    Args:
        step: tokens from one place of the grid to the next, along rows and columns.
        size: tokens along the sides of the original attention.
        margin: tokens that positions may lie outside of it.
    """
    heads, width = attn.num_heads, attn.proj.in_features // attn.num_heads
    at = list(places)
    qkv = attn.qkv(torch.stack([places[p][0] for p in at])).view(len(at), 3, heads, width)
    q, k, v = qkv.unbind(1)
    out = {}
    for i, here in enumerate(at):
        logits = (q[i] * k).sum(-1) * width**-0.5  # (keys, heads)
        for j, there in enumerate(at):
            logits[j] += torch.log(torch.as_tensor(places[there][1]))
            for axis, table in enumerate((attn.rel_pos_h, attn.rel_pos_w)):
                if places[here][2] is None:
                    offset = (here[axis] - there[axis]) * step[axis]
                    row = oracles.offset_row(table, offset, size[axis])
                else:
                    ends = [places[p][2][axis].item() for p in (here, there)]
                    row = oracles.position_row(table, *ends, size[axis], margin)
                logits[j] += q[i] @ row
        weights = (logits - logits.max(0).values).exp()
        weights = weights / weights.sum(0)
        out[here] = attn.proj((weights[..., None] * v).sum(0).flatten())
    return out


def explicit_block(block, x, sizes, valid, span, size, window, positions=None) -> Tensor:
    """One block on clusters (h, w, C) of one image.

    Args:
        window: cells of a window.
        positions: (h, w, 2) of the clusters on the map, in tokens; None: on the grid.
    """
    h, w, channels = x.shape
    pitch = (span[0] / h, span[1] / w)
    normed = block.norm1(x)
    attended = torch.zeros_like(x)
    if block.window_size == 0:
        places = {
            (i, j): (normed[i, j], sizes[i, j], None if positions is None else positions[i, j])
            for i in range(h)
            for j in range(w)
            if valid[i, j]
        }
        out = explicit_attention(block.attn, places, pitch, size, 0)
        for (i, j), value in out.items():
            attended[i, j] = value
    else:
        side = block.window_size
        step = (side / window[0], side / window[1])
        nothing, votes = torch.zeros(channels), float(step[0] * step[1])
        for top in range(0, h, window[0]):
            for left in range(0, w, window[1]):
                places = {}
                for i in range(window[0]):
                    for j in range(window[1]):
                        row, col = top + i, left + j
                        on_map = row < h and col < w
                        inside = on_map and valid[row, col]
                        where = None
                        if positions is not None:
                            # The middle of the cell, where there is no cluster.
                            where = torch.tensor([(row + 0.5) * pitch[0], (col + 0.5) * pitch[1]])
                            where = positions[row, col] if on_map else where - 0.5
                            where = where - torch.tensor([top * pitch[0], left * pitch[1]])
                        places[i, j] = (
                            (normed[row, col], sizes[row, col], where)
                            if inside
                            else (nothing, votes, where)
                        )
                # Clusters of the map may leave the window they belong to by three tokens.
                out = explicit_attention(block.attn, places, step, (side, side), 3)
                for (i, j), value in out.items():
                    if top + i < h and left + j < w:
                        attended[top + i, left + j] = value
    x = x + attended
    x = x + block.mlp(block.norm2(x))
    return torch.where(valid[..., None], x, 0.0)


def after_first_block(vit: ViT, x: Tensor) -> Tensor:
    seen = []
    hook = vit.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out))
    vit(x)
    hook.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("positions", ["clusters", "grid"])
@pytest.mark.parametrize("temperature", ["auto", 0.3])
def test_explicit_forward_with_clusters_of_the_map(temperature, positions):
    vit, x = tiny_vit(window_size=4, depth=4), images((9, 7))
    settings = {"grid": (5, 4), "temperature": temperature, "neighbors": 3, "residual": False}
    with expedite(vit, 1, positions=positions, **settings):
        actual = vit(x)["last_feat"]
    maps = after_first_block(vit, x)
    clusters, sizes, places = cluster_tokens(maps, (5, 4), 5, temperature, 5)
    assert sizes.std() > 0.1  # the votes differ
    refined = []
    for cluster, size, place in zip(clusters, sizes, places, strict=True):
        for block in vit.blocks[1:]:
            # 4 tokens of 9 over 5 cells, and of 7 over 4: two cells each, so one row is padded.
            valid = torch.ones(5, 4, dtype=torch.bool)
            where = place if positions == "clusters" else None
            cluster = explicit_block(block, cluster, size, valid, (9, 7), (9, 7), (2, 2), where)
        refined.append(cluster)
    expected = reconstruct_tokens(
        torch.stack(refined), maps, clusters, 3, temperature, "l1", window=5
    )
    assert error(actual, expected.permute(0, 3, 1, 2)) < 1e-5
    other = "grid" if positions == "clusters" else "clusters"
    with expedite(vit, 1, positions=other, **settings):  # so that the test could fail
        assert error(features(vit, x), actual) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("span", [(9, 7), (12, 8)])
def test_explicit_block_with_clusters_anywhere(index, span):
    """Also far outside of their window, or of the map."""
    vit = tiny_vit(window_size=4)
    x, sizes = torch.randn(2, 5, 3, 32), 4 * torch.rand(2, 5, 3) + 0.1
    places = torch.rand(2, 5, 3, 2) * 20 - 5
    valid = torch.ones(2, 5, 3, dtype=torch.bool)
    valid[:, 4], valid[1, 1, 2] = False, False
    tokens = Tokens(x, size=(9, 7), span=span, sizes=sizes, positions=places, valid=valid)
    layout = find_host(vit).layout(True)
    actual = run_block(layout, vit.blocks[index], tokens)
    for image in range(2):
        args = (x[image], sizes[image], valid[image], span, (9, 7), (2, 2), places[image])
        expected = explicit_block(vit.blocks[index], *args)
        assert error(actual[image][valid[image]], expected[valid[image]]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("positions", ["clusters", "grid"])
@pytest.mark.parametrize("residual", [False, True])
def test_explicit_forward_with_clusters_of_each_window(residual, positions):
    """10 x 6 tokens in windows of 4, each to 2 x 2: the last ones are half padding."""
    vit, x = tiny_vit(window_size=4, depth=4), images((10, 6))
    settings = {"scope": "window", "neighbors": 3, "residual": residual, "positions": positions}
    with expedite(vit, 1, grid=(2, 2), **settings):
        actual = vit(x)["last_feat"]
    maps = after_first_block(vit, x)
    clusters, sizes = torch.zeros(2, 6, 4, 32), torch.zeros(2, 6, 4)
    # Without a token, a place is the middle of its cell of two tokens.
    places = (2 * oracles.coordinates((6, 4)) + 0.5).view(6, 4, 2).float().repeat(2, 1, 1, 1)
    valid = torch.zeros(6, 4, dtype=torch.bool)
    parts = []
    for top in range(0, 10, 4):
        for left in range(0, 6, 4):
            part = maps[:, top : top + 4, left : left + 4]
            grid = (part.shape[1] // 2, part.shape[2] // 2)
            rows = slice(top // 2, top // 2 + grid[0])
            cols = slice(left // 2, left // 2 + grid[1])
            clusters[:, rows, cols], sizes[:, rows, cols], inside = cluster_tokens(part, grid)
            places[:, rows, cols] = inside + torch.tensor([top, left])
            valid[rows, cols] = True
            parts.append((top, left, rows, cols))
    refined = []
    for cluster, size, place in zip(clusters, sizes, places, strict=True):
        for block in vit.blocks[1:]:
            where = place if positions == "clusters" else None
            cluster = explicit_block(block, cluster, size, valid, (12, 8), (10, 6), (2, 2), where)
        refined.append(cluster)
    refined = torch.stack(refined)
    expected = torch.zeros_like(maps)
    for top, left, rows, cols in parts:
        part, before = maps[:, top : top + 4, left : left + 4], clusters[:, rows, cols]
        after = refined[:, rows, cols] - (before if residual else 0)
        count = min(3, before.shape[1] * before.shape[2])
        out = reconstruct_tokens(after, part, before, count, window=5)
        expected[:, top : top + 4, left : left + 4] = out + (part if residual else 0)
    assert error(actual, expected.permute(0, 3, 1, 2)) < 1e-5


# --- several alphas --------------------------------------------------------------------------


def test_several_alphas_cluster_clusters():
    vit, x = tiny_vit(), images((20, 16))
    plain, seen = features(vit, x), []
    with expedite(vit, (0, 2), ratio=0.5) as handle:
        for method in handle.blocks.methods.values():
            method.reduce.register_forward_hook(lambda m, args, out: seen.append(out[0]))
        out = features(vit, x)
    assert [tuple(t.features.shape[1:3]) for t in seen] == [(10, 8), (5, 4)]
    for tokens in seen:
        assert tokens.size == (20, 16) and tokens.span == (20, 16)
        torch.testing.assert_close(tokens.sizes.sum((1, 2)), torch.full((2,), 320.0))
        torch.testing.assert_close(mean_position(tokens), torch.tensor([[9.5, 7.5]] * 2))
    assert out.shape == plain.shape and torch.isfinite(out).all()
    assert 1e-3 < error(out, plain)


@pytest.mark.parametrize("size", [(14, 14), (20, 16)])
def test_several_alphas_cluster_the_same_windows_again(size):
    """Windows keep their tokens: a second clustering must not cut the first one's grid anew."""
    vit, x, seen = tiny_vit(), images(size), []
    with expedite(vit, (0, 2), ratio=0.6, scope="window") as handle:
        for method in handle.blocks.methods.values():
            method.reduce.register_forward_hook(lambda m, args, out: seen.append(out[0]))
        assert torch.isfinite(features(vit, x)).all()
    windows = (-(-size[0] // 7), -(-size[1] // 7))
    span = (windows[0] * 7, windows[1] * 7)
    sides = [4, 2]  # 7 to 4 to 2 in each window
    for tokens, side in zip(seen, sides, strict=True):
        assert tokens.size == size and tokens.span == span
        assert tokens.features.shape[1:3] == (windows[0] * side, windows[1] * side)
        total = tokens.sizes if tokens.valid is None else tokens.sizes * tokens.valid
        torch.testing.assert_close(total.sum((1, 2)), torch.full((2,), float(size[0] * size[1])))
        middle = torch.tensor([[(size[0] - 1) / 2, (size[1] - 1) / 2]] * 2)
        torch.testing.assert_close(mean_position(tokens), middle)


# --- types, gradients, compilation -----------------------------------------------------------

CASES = [("map", (10, 8)), ("window", (4, 4))]


def distance(actual: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(actual).all()
    return ((actual.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("scope,grid", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype, scope, grid):
    vit, x = tiny_vit(), images((20, 16))
    with expedite(vit, 1, grid=grid, scope=scope):
        expected = features(vit, x)
        vit.to(dtype)
        actual = features(vit, x.to(dtype))
    assert actual.dtype == dtype
    assert distance(actual, expected) < (0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("scope,grid", CASES)
def test_autocast_stays_near(scope, grid):
    vit, x = tiny_vit(), images((20, 16))
    with expedite(vit, 1, grid=grid, scope=scope):
        expected = features(vit, x)
        with torch.autocast("cpu", torch.bfloat16):
            actual = features(vit, x)
    assert distance(actual, expected) < 0.1


@pytest.mark.parametrize("scope,grid", CASES)
def test_gradients_reach_everything(scope, grid):
    vit, x = tiny_vit(), images((20, 16)).requires_grad_()
    vit.train()
    with expedite(vit, 1, grid=grid, scope=scope):
        vit(x)["last_feat"].square().mean().backward()
    for name, tensor in [("x", x), *vit.named_parameters()]:
        assert tensor.grad is not None, name
        assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0, name


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (8, 15), (5, 6)])
def test_gradients_of_padded_windows_are_finite(size, flat):
    """Among them windows of one token, and of equal tokens, where distances say nothing."""
    vit = tiny_vit(use_abs_pos=False)
    x = (torch.zeros(1, 3, size[0] * PATCH, size[1] * PATCH) if flat else images(size)).detach()
    x.requires_grad_()
    with expedite(vit, 1, grid=(4, 4), scope="window"):
        vit(x)["last_feat"].square().mean().backward()
    for name, tensor in [("x", x), *vit.named_parameters()]:
        assert torch.isfinite(tensor.grad).all(), name


@pytest.mark.parametrize("scope,grid", [("map", (10, 8)), ("window", (7, 7))])
def test_gradients_of_one_cluster_a_token_are_the_plain_ones(scope, grid):
    vit, x = tiny_vit(), images((10, 8))
    target = torch.randn(2, 32, 10, 8)

    def gradients() -> dict[str, Tensor]:
        vit.zero_grad()
        (vit(x)["last_feat"] * target).sum().backward()
        return {name: p.grad.clone() for name, p in vit.named_parameters()}

    expected = gradients()
    with expedite(vit, 1, grid=grid, scope=scope, **IDENTITY):
        actual = gradients()
    for name, grad in expected.items():
        assert error(actual[name], grad) < 1e-3, name


def test_stochastic_depth_still_drops():
    vit, x = tiny_vit(drop_path_rate=0.9).train(), images((10, 8))
    with expedite(vit, 1, grid=(5, 4)):
        assert error(features(vit, x), features(vit, x)) > 1e-3
        vit.eval()
        assert torch.equal(features(vit, x), features(vit, x))


@pytest.mark.parametrize("scope,grid", CASES)
def test_compiles_without_a_break(scope, grid):
    torch._dynamo.reset()
    vit, x = tiny_vit(depth=3), images((20, 16), batch=1)
    with expedite(vit, 1, grid=grid, scope=scope):
        expected = features(vit, x)
        compiled = torch.compile(vit, fullgraph=True, backend="eager")
        assert error(features(compiled, x), expected) < 1e-6
    torch._dynamo.reset()


# --- what it refuses -------------------------------------------------------------------------


def test_grid_larger_than_the_map_is_an_error_of_the_input():
    vit = tiny_vit()
    with expedite(vit, 1, grid=(10, 8)):
        features(vit, images((10, 8)))
        with pytest.raises(ValueError, match=r"GRID .* 9 x 8 .*\(10, 8\).* RATIO"):
            features(vit, images((9, 8)))


def test_grid_larger_than_the_window_is_an_error_at_once():
    with pytest.raises(ValueError, match=r"GRID .* 7 x 7 tokens of the window.*\(8, 4\)"):
        expedite(tiny_vit(), 1, grid=(8, 4), scope="window")


def test_scope_window_needs_windows():
    with pytest.raises(ValueError, match='SCOPE "window"'):
        expedite(tiny_vit(window_block_indexes=()), 1, grid=(2, 2), scope="window")


def test_ratio_follows_the_size_of_the_input():
    vit, seen = tiny_vit(), []
    with expedite(vit, 1, ratio=0.5) as handle:
        handle.blocks.methods["after_1"].reduce.register_forward_hook(
            lambda m, args, out: seen.append(tuple(out[0].features.shape[1:3]))
        )
        for size in ((12, 8), (6, 10), (1, 1)):
            assert features(vit, images(size)).shape == (2, 32, *size)
    assert seen == [(6, 4), (3, 5), (1, 1)]
