"""Cluster sizes, relative positions and windows, against explicit loops and Detectron2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.utils import (
    add_decomposed_rel_pos,
    get_rel_pos,
    window_partition,
    window_unpartition,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from expedit_d2 import attention
from expedit_d2.attention import (
    MasksAsChannels,
    attend,
    attend_without_mask,
    key_bias,
    position_term,
    relative_positions,
)
from expedit_d2.operators import grid_positions
from expedit_d2.windows import partition, unpartition
from support import oracles


def test_key_bias_gives_a_key_as_many_votes_as_copies_of_it_would_have():
    counts = torch.tensor([1, 4, 2, 7, 1])
    q, k, v = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5, 8)
    copies_k, copies_v = (x.repeat_interleave(counts, dim=0) for x in (k, v))
    expected = (q @ copies_k.T).softmax(-1) @ copies_v
    torch.testing.assert_close((q @ k.T + key_bias(counts.float())).softmax(-1) @ v, expected)


def test_key_bias_of_one_is_zero_and_of_nothing_is_no_vote():
    bias = key_bias(torch.tensor([1.0, 0.25, 0.0]))
    assert bias[0] == 0 and bias[1] < 0
    assert torch.isfinite(bias).all()
    assert (torch.tensor([5.0, 5.0, 30.0]) + bias).softmax(-1)[2] < 1e-20


def test_key_bias_keeps_the_shape():
    sizes = torch.rand(2, 3, 4) + 0.1
    assert torch.equal(key_bias(sizes), sizes.log())


@pytest.mark.parametrize("made_for", [2, 7, 14])
@pytest.mark.parametrize("size", [1, 2, 5, 7, 13, 14, 20])
def test_relative_positions_are_detectron2s_on_the_full_map(made_for, size):
    table = torch.randn(2 * made_for - 1, 6)
    ours = relative_positions(table, size, size, size)
    assert ours.shape == (size, size, 6)
    torch.testing.assert_close(ours, get_rel_pos(size, size, table), atol=5e-6, rtol=1e-5)


def test_relative_positions_without_resampling_are_rows_of_the_table():
    table = torch.randn(13, 4)
    ours = relative_positions(table, 7, 7, 7)
    for i in range(7):
        for j in range(7):
            assert torch.equal(ours[i, j], table[i - j + 6])


@pytest.mark.parametrize(
    "made_for,cells,span,size", [(7, 4, 7, 7), (7, 3, 9, 8), (12, 5, 9, 9), (6, 1, 6, 6)]
)
def test_relative_positions_of_a_coarser_grid_by_explicit_loop(made_for, cells, span, size):
    table = torch.randn(2 * made_for - 1, 3)
    ours = relative_positions(table, cells, span, size)
    rows = table.shape[0]
    for i in range(cells):
        for j in range(cells):
            # Where F.interpolate (align_corners False) would look for this offset.
            offset = (i - j) * span / cells
            at = (offset + size - 1 + 0.5) * rows / (2 * size - 1) - 0.5
            at = min(max(at, 0.0), rows - 1.0)
            low = int(at)
            high = min(low + 1, rows - 1)
            expected = table[low] * (1 - (at - low)) + table[high] * (at - low)
            torch.testing.assert_close(ours[i, j], expected, atol=1e-5, rtol=1e-5)


def test_relative_positions_measure_offsets_in_tokens():
    offsets = torch.arange(-6.0, 7.0)[:, None]  # the table of a map of 7 holds the offset itself
    ours = relative_positions(offsets, 4, 7, 7)[..., 0]
    index = torch.arange(4.0)
    torch.testing.assert_close(ours, (index[:, None] - index) * 7 / 4)


def test_relative_positions_beyond_the_table_stay_at_its_ends():
    table = torch.randn(5, 2)  # made for 3
    ours = relative_positions(table, 9, 9, 3)
    assert torch.equal(ours[8, 0], table[-1]) and torch.equal(ours[0, 8], table[0])


def test_relative_positions_keep_the_type_and_let_gradients_through():
    table = torch.randn(13, 4, requires_grad=True)
    relative_positions(table, 4, 7, 7).sum().backward()
    assert table.grad is not None and table.grad.abs().sum() > 0
    low = relative_positions(table.detach().bfloat16(), 4, 7, 7)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), relative_positions(table, 4, 7, 7), atol=5e-2, rtol=0.1)


# --- attention -------------------------------------------------------------------------------


def queries_keys_values(channels: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(3, 2, n, channels) for n in (10, 12, 12))


def explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    return (scale * q @ k.transpose(-2, -1) + bias).softmax(-1) @ v


@pytest.mark.parametrize("entries", [10**6, 400, 130, 15])
def test_attend_adds_every_kind_of_term(entries, monkeypatch):
    monkeypatch.setattr(attention, "_PART_CPU", entries)
    q, k, v = queries_keys_values()
    pairs, heads = torch.randn(3, 2, 10, 12), torch.randn(1, 2, 1, 12)
    query, key = torch.randn(3, 2, 10, 5), torch.randn(3, 1, 5, 12)
    cluster_sizes = torch.rand(3, 12) * 4 + 0.2
    actual = attend(q, k, v, 0.3, [pairs, heads, (query, key)], cluster_sizes.log())
    bias = pairs + heads + query @ key + cluster_sizes.log()[:, None, None]
    torch.testing.assert_close(actual, explicit(q, k, v, bias, 0.3))


@pytest.mark.parametrize("entries", [10**6, 400, 130, 15])
def test_attend_takes_keys_on_a_grid(entries, monkeypatch):
    monkeypatch.setattr(attention, "_PART_CPU", entries)
    q, k, v = queries_keys_values()
    rows, cols = torch.randn(3, 2, 10, 3, 1), torch.randn(3, 2, 10, 1, 4)
    cluster_sizes = torch.rand(3, 3, 4) * 4 + 0.2
    bias = (rows + cols + cluster_sizes.log()[:, None, None]).flatten(3)
    actual = attend(q, k, v, 0.3, [rows, cols], cluster_sizes.log())
    torch.testing.assert_close(actual, explicit(q, k, v, bias, 0.3))


def test_attend_without_terms():
    q, k, v = queries_keys_values()
    torch.testing.assert_close(attend(q, k, v, 0.3), explicit(q, k, v, torch.zeros(()), 0.3))
    cluster_sizes = torch.rand(3, 3, 4) * 4 + 0.2
    bias = cluster_sizes.log().flatten(1)[:, None, None]
    actual = attend(q, k, v, 0.3, bias=cluster_sizes.log())
    torch.testing.assert_close(actual, explicit(q, k, v, bias, 0.3))


class _Recorded(TorchFunctionMode):
    """Notes how attention was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.calls.append((args[0].shape[-1], (kwargs or {}).get("attn_mask")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("channels,padded", [(12, 16), (7, 8), (8, 16), (64, 72)])
def test_key_bias_as_a_channel_is_a_key_bias(channels, padded):
    """What runs on a GPU, whose fastest kernels take no mask."""
    q, k, v = queries_keys_values(channels)
    bias = key_bias(torch.rand(3, 12) * 4 + 0.2)
    scale = channels**-0.5
    expected = explicit(q, k, v, bias[:, None, None], scale)
    with _Recorded() as record:
        out = attend_without_mask(q, k, v, bias, scale)
        torch.testing.assert_close(out, expected)
        with MasksAsChannels():
            mask = bias[:, None, None]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            torch.testing.assert_close(out, expected)
            pairs = torch.randn(3, 1, 10, 12)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=pairs)
            torch.testing.assert_close(out, explicit(q, k, v, pairs, scale))
    assert [call[0] for call in record.calls] == [padded, padded, channels]
    assert [call[1] is None for call in record.calls] == [True, True, False]


# --- positions anywhere ----------------------------------------------------------------------

# The sizes that the two tables were made for, and the size of the attention.
TABLES = [
    ((7, 7), (7, 7)),
    ((6, 4), (6, 4)),
    ((7, 9), (5, 12)),
    ((2, 20), (8, 3)),
    ((3, 3), (1, 1)),
]


def position_bias(*args) -> Tensor:
    query, key = position_term(*args)
    return query @ key


def queries_and_tables(
    made_for: tuple[int, int], tokens: int, batch: int = 3
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return torch.randn(batch, 2, tokens, 6), tuple(torch.randn(2 * n - 1, 6) for n in made_for)


@pytest.mark.parametrize("margin", [0, 3])
@pytest.mark.parametrize("made_for,size", TABLES)
def test_whole_positions_are_detectron2s(made_for, size, margin):
    q, tables = queries_and_tables(made_for, size[0] * size[1])
    positions = grid_positions(*size).flatten(1, 2).expand(3, -1, -1)
    ours = position_bias(q, tables, positions, size, margin)
    expected = add_decomposed_rel_pos(
        torch.zeros(6, q.shape[2], q.shape[2]), q.flatten(0, 1), *tables, size, size
    )
    torch.testing.assert_close(ours.flatten(0, 1), expected, atol=2e-5, rtol=1e-5)


def test_whole_positions_in_any_order_are_detectron2s():
    """Rows of the result follow the queries, columns the keys; each image has its own order."""
    q, tables = queries_and_tables((5, 6), 30)
    orders = torch.stack([torch.randperm(30) for _ in range(3)])
    expected = add_decomposed_rel_pos(
        torch.zeros(6, 30, 30), q.flatten(0, 1), *tables, (5, 6), (5, 6)
    ).unflatten(0, (3, 2))
    positions = grid_positions(5, 6).flatten(1, 2)[0]
    for image, order in enumerate(orders):
        ours = position_bias(q[image : image + 1, :, order], tables, positions[order][None], (5, 6))
        wanted = expected[image][:, order][:, :, order]
        torch.testing.assert_close(ours[0], wanted, atol=2e-5, rtol=1e-5)
    shuffled = torch.stack([q[image, :, order] for image, order in enumerate(orders)])
    together = position_bias(shuffled, tables, positions[orders], (5, 6))
    torch.testing.assert_close(together[2], ours[0])


@pytest.mark.parametrize("margin", [0, 1, 3])
@pytest.mark.parametrize("made_for,size", TABLES)
def test_positions_anywhere_by_explicit_loop(made_for, size, margin):
    q, tables = queries_and_tables(made_for, 9)
    # Some beyond the margin, and the ends themselves.
    positions = torch.rand(3, 9, 2) * (torch.tensor(size) + 10.0) - 5.0
    positions[0, 0], positions[0, 1] = -margin, torch.tensor(size) - 1.0 + margin
    positions[1, 0], positions[1, 1] = 0.0, torch.tensor(size) - 1.0
    ours = position_bias(q, tables, positions, size, margin)
    assert ours.shape == (3, 2, 9, 9)
    expected = torch.zeros(3, 2, 9, 9)
    for image in range(3):
        for here in range(9):
            for there in range(9):
                for axis, table in enumerate(tables):
                    at = [positions[image, place, axis].item() for place in (here, there)]
                    row = oracles.position_row(table, *at, size[axis], margin)
                    expected[image, :, here, there] += q[image, :, here] @ row
    torch.testing.assert_close(ours, expected, atol=3e-5, rtol=1e-5)


def test_positions_measure_offsets_in_tokens():
    """The table of a map of 7 holds the offset itself: linear, so nothing is lost."""
    offsets = torch.arange(-6.0, 7.0)[:, None]
    positions = torch.rand(2, 11, 2) * 6
    rows = position_bias(torch.ones(2, 1, 11, 1), (offsets, 0 * offsets), positions, (7, 7))
    cols = position_bias(torch.ones(2, 1, 11, 1), (0 * offsets, offsets), positions, (7, 7))
    difference = positions[:, :, None] - positions[:, None]
    torch.testing.assert_close(rows[:, 0], difference[..., 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cols[:, 0], difference[..., 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("margin", [0, 3])
def test_positions_with_a_table_of_one_row(margin):
    """Made for an axis of one token: every offset is the same one."""
    q, tables = queries_and_tables((1, 1), 4)
    ours = position_bias(q, tables, 3 * torch.randn(3, 4, 2), (1, 1), margin)
    expected = (q @ (tables[0] + tables[1])[0])[..., None].expand(-1, -1, -1, 4)
    torch.testing.assert_close(ours, expected)


def test_positions_keep_the_type_and_let_gradients_through():
    q, tables = queries_and_tables((7, 7), 9)
    positions = torch.rand(3, 9, 2) * 6
    for tensor in (q, *tables, positions):
        tensor.requires_grad_()
    full = position_bias(q, tables, positions, (7, 7), 3)
    full.square().sum().backward()
    for tensor in (q, *tables, positions):
        assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0
    for dtype in (torch.bfloat16, torch.float16):
        low = position_bias(q.to(dtype), tables, positions, (7, 7), 3)
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), full, atol=8e-2, rtol=0.1)


def test_positions_of_large_maps_stay_sharp_in_half_precision():
    """bf16 holds no 250.5; offsets are taken before anything is rounded."""
    offsets = torch.arange(-255.0, 256.0)[:, None] % 2
    positions = torch.tensor([[[250.0, 0.0], [251.0, 0.0], [250.25, 0.0]]])
    q = torch.ones(1, 1, 3, 1, dtype=torch.bfloat16)
    bias = position_bias(q, (offsets, 0 * offsets), positions, (256, 256))[0, 0]
    expected = torch.tensor([[0.0, 1.0, 0.25], [1.0, 0.0, 0.75], [0.25, 0.75, 0.375]])
    torch.testing.assert_close(bias.float(), expected)


# --- windows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 7), (14, 21), (20, 16), (3, 5), (1, 8)])
@pytest.mark.parametrize("window", [1, 4, 7])
def test_windows_are_detectron2s(size, window):
    x = torch.randn(2, *size, 5)
    expected, padded = window_partition(x, window)
    ours = partition(x, (window, window))
    assert torch.equal(ours, expected)
    assert torch.equal(unpartition(ours, size), window_unpartition(expected, window, padded, size))
    assert torch.equal(unpartition(ours, size), x)


def test_rectangular_windows_and_padding_value():
    x = torch.randn(2, 5, 7, 3)
    windows = partition(x, (2, 3), value=9.0)
    assert windows.shape == (2 * 3 * 3, 2, 3, 3)
    for image in range(2):
        for row in range(3):
            for col in range(3):
                real = x[image, 2 * row : 2 * row + 2, 3 * col : 3 * col + 3]
                expected = torch.full((2, 3, 3), 9.0)
                expected[: real.shape[0], : real.shape[1]] = real
                assert torch.equal(windows[image * 9 + row * 3 + col], expected)
    assert torch.equal(unpartition(windows, (5, 7)), x)


def test_windows_of_other_channels_go_back_to_their_places():
    windows = partition(torch.randn(2, 6, 9, 4), (3, 3))
    wider = torch.cat([windows, windows], dim=-1)
    assert unpartition(wider, (6, 9)).shape == (2, 6, 9, 8)
