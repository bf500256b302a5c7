"""Detectron2's ViT, expedited: padded windows, and an explicit forward pass to compare with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from detectron2.modeling import ViT
from torch import Tensor

from expedit_d2 import expedite
from expedit_d2.adapters import find_transformer
from expedit_d2.operators import cluster_tokens, reconstruct_tokens
from expedit_d2.tokens import Tokens
from support import oracles
from support.detectron2_vit import features, mean_position, tiny_vit
from support.tensors import error
from support.vits import images


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
    """No token, and no share of its size, may end in a cluster that stands for padding."""
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
    layout = find_transformer(vit).layout(size_aware)
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
    """For methods that keep no count; the padding of windows is counted all the same."""
    vit = tiny_vit(window_size=4)
    layout = find_transformer(vit).layout(True)
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
    """Attention among places {(row, col): (vector, cluster size, position)}, one pair at a time.

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
        nothing, cluster_size = torch.zeros(channels), float(step[0] * step[1])
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
                            else (nothing, cluster_size, where)
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
    assert sizes.std() > 0.1  # the sizes differ
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
    layout = find_transformer(vit).layout(True)
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
