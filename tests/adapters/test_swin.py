"""Swin, expedited inside a stage: exactness, an explicit forward pass, data types, FLOPs."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.swin import SwinTransformer
from torch import Tensor, nn

from expedit_d2 import expedite
from expedit_d2.adapters import find_transformer
from expedit_d2.analysis.flops import count_flops
from expedit_d2.backbones.swin import D2SwinTransformer
from expedit_d2.operators import cluster_tokens, reconstruct_tokens
from support.swin import PATCH, TINY, explicit_block, images, maps, one_stage, tiny
from support.tensors import maps_error as error

# Every token its own cluster: nothing is lost.
IDENTITY = {"scope": "window", "temperature": 1e6, "neighbors": 1}


@pytest.fixture(params=[D2SwinTransformer, SwinTransformer], ids=["ours", "detectron2"])
def kind(request) -> type:
    return request.param


@pytest.mark.parametrize("alpha", [*range(10), (0, 1), (4, 5, 7)])
def test_one_cluster_a_token_is_the_plain_model(alpha, kind):
    swin, x = tiny(kind), images((72, 100))  # every stage needs padding
    expected = maps(swin, x)
    with expedite(swin, alpha, grid=(4, 4), **IDENTITY):
        assert error(maps(swin, x), expected) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"size_aware": False},
        {"positions": "grid"},
        {"residual": True},
        {"residual": False},
        {"grid": None, "ratio": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(64, 64), (20, 52), (7, 5)])
def test_one_cluster_a_token_for_other_settings(size, settings):
    swin, x = tiny(window_size=5), images(size)
    expected = maps(swin, x)
    with expedite(swin, 4, **({"grid": (5, 5)} | IDENTITY | settings)):
        assert error(maps(swin, x), expected) < 1e-5


def test_off_is_the_plain_model_to_the_bit(kind):
    swin, x = tiny(kind), images((40, 52))
    expected = maps(swin, x)
    with expedite(swin, 5, grid=(2, 2), scope="window"):
        during = maps(swin, x)
    assert all(map(torch.equal, during[:2], expected[:2]))  # stages before that of block 5
    assert error(during, expected) > 1e-3
    assert all(map(torch.equal, maps(swin, x), expected))


def test_parameters_and_buffers_stay(kind):
    swin = tiny(kind)
    tensors = {id(t) for t in (*swin.parameters(), *swin.buffers())}
    before = {name: t.clone() for name, t in swin.state_dict().items()}
    with expedite(swin, 5, grid=(3, 3), scope="window"):
        maps(swin, images((40, 52)))
        assert {id(t) for t in (*swin.parameters(), *swin.buffers())} == tensors
        assert list(swin.state_dict()) == list(before)
        assert all(torch.equal(t, before[name]) for name, t in swin.state_dict().items())
    assert {id(t) for t in (*swin.parameters(), *swin.buffers())} == tensors


# --- size-aware attention is exact where clusters hold equal tokens ---------------------------


def constant_cells(size: tuple[int, int], side: int, cells: int) -> Tensor:
    """Images whose tokens are equal within each cell of every window: a random patch for each."""
    index = [torch.arange(n) // side * cells + torch.arange(n) % side * cells // side for n in size]
    grid = [int(i.max()) + 1 for i in index]
    patches = torch.randn(2, 3, *grid, PATCH, PATCH)[:, :, index[0]][:, :, :, index[1]]
    return patches.transpose(3, 4).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize("positions", ["clusters", "grid"])
@pytest.mark.parametrize(
    "size,side,cells,unequal",
    [
        ((8, 8), 4, 2, False),
        ((10, 14), 4, 2, False),  # the last windows hold two tokens, one cell
        ((12, 12), 6, 4, True),  # cells of 2, 1, 2, 1 tokens; a shift of 3 tokens is 2 cells
        ((12, 15), 6, 4, True),
        ((9, 3), 6, 4, True),
    ],
)
def test_equal_tokens_cluster_without_loss(size, side, cells, unequal, positions):
    swin = one_stage(positions=False, window_size=side)
    x = constant_cells(size, side, cells)
    expected = maps(swin, x)
    settings = {"grid": (cells, cells), "scope": "window", "temperature": 1e4, "neighbors": 1}
    # A token joins its own cell: the first centroids of unequal cells overlap.
    settings |= {"positions": positions, "residual": False, "window": 1}
    with expedite(swin, 0, **settings):
        assert error(maps(swin, x), expected) < 1e-5
    if unequal:  # so that the test could fail
        with expedite(swin, 0, size_aware=False, **settings):
            assert error(maps(swin, x), expected) > 1e-3


# --- an explicit forward pass to compare with -------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("positions", ["clusters", "grid"])
@pytest.mark.parametrize("size_aware", [True, False])
@pytest.mark.parametrize("size", [(12, 12), (9, 7)])
def test_explicit_forward(size, size_aware, positions):
    """Windows of 6 to 4 x 3 clusters: a shift of 3 tokens is one of 2 and 2 (1.5 rounded) cells."""
    swin, x = one_stage(window_size=6), images((size[0] * PATCH, size[1] * PATCH))
    settings = {"temperature": 0.3, "neighbors": 3, "residual": False, "neighbor_window": 5}
    with expedite(
        swin,
        1,
        grid=(4, 3),
        scope="window",
        size_aware=size_aware,
        positions=positions,
        **settings,
    ):
        (actual,) = maps(swin, x)
    blocks = swin.layers[0].blocks
    tokens = swin.patch_embed(x)
    tokens = torch.stack([explicit_block(blocks[0], t, (6, 6), (0, 0)) for t in tokens])
    count = [-(-n // 6) for n in size]
    whole = (count[0] * 4, count[1] * 3)
    clusters, sizes = torch.zeros(2, *whole, 16), torch.zeros(2, *whole)
    regular = torch.stack(
        torch.meshgrid(
            (torch.arange(whole[0]) + 0.5) * 6 / 4 - 0.5,
            (torch.arange(whole[1]) + 0.5) * 6 / 3 - 0.5,
            indexing="ij",
        ),
        dim=-1,
    )
    at = regular.repeat(2, 1, 1, 1)
    valid = torch.zeros(whole, dtype=torch.bool)
    inputs = {}
    for top in range(count[0]):
        for left in range(count[1]):
            part = tokens[:, 6 * top : 6 * top + 6, 6 * left : 6 * left + 6]
            pad = (0, 6 - part.shape[2], 0, 6 - part.shape[1])
            weights = F.pad(torch.ones(part.shape[:3]), pad)
            part = F.pad(part, (0, 0, *pad))
            found = cluster_tokens(part, (4, 3), 5, 0.3, 5, weights)
            rows, cols = slice(4 * top, 4 * top + 4), slice(3 * left, 3 * left + 3)
            real = F.adaptive_max_pool2d(weights[:1], (4, 3))[0] > 0
            clusters[:, rows, cols] = found.features
            sizes[:, rows, cols], valid[rows, cols] = found.sizes, real
            if positions == "clusters":
                at[:, rows, cols] = found.positions + torch.tensor([6.0 * top, 6.0 * left])
            inputs[rows.start, cols.start] = (part, found.features, real, weights)
    cluster_sizes = torch.where(valid, sizes, 3.0) if size_aware else torch.ones_like(sizes)
    refined = []
    for image in range(2):
        cluster = clusters[image]
        for number, block in enumerate(blocks[1:], start=1):
            shift = (2, 2) if number % 2 else (0, 0)
            cluster = explicit_block(
                block, cluster, (4, 3), shift, at[image], cluster_sizes[image], ~valid
            )
        refined.append(cluster)
    refined = torch.stack(refined)
    expected = torch.zeros(2, count[0] * 6, count[1] * 6, 16)
    for (row, col), (part, before, real, weights) in inputs.items():
        top, left = row // 4 * 6, col // 3 * 6
        expected[:, top : top + 6, left : left + 6] = reconstruct_tokens(
            refined[:, row : row + 4, col : col + 3],
            part,
            before,
            3,
            0.3,
            window=5,
            valid=real.expand(2, -1, -1),
            weights=weights,
        )
    expected = swin.norm0(expected[:, : size[0], : size[1]]).permute(0, 3, 1, 2)
    assert error([actual], [expected]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("size_aware", [True, False])
def test_what_padding_holds_is_not_seen(size_aware):
    swin = one_stage()
    outputs = []
    for other in (1.0, 30.0):
        with expedite(swin, 1, grid=(2, 2), scope="window", size_aware=size_aware) as handle:

            def spoil(module, args, out, other=other):
                tokens, record = out
                noise = torch.where(tokens.valid[..., None], 0.0, other)
                return type(tokens)(**vars(tokens) | {"features": tokens.features + noise}), record

            handle.blocks.methods["after_1"].reduce.register_forward_hook(spoil)
            torch.manual_seed(1)
            outputs.append(maps(swin, images((6 * PATCH, 10 * PATCH))))
    assert error(*outputs) < 1e-5


# --- where it happens -------------------------------------------------------------------------


@pytest.mark.parametrize("alpha,stage,inside", [(0, 0, 0), (2, 1, 0), (3, 1, 1), (6, 2, 2)])
def test_alpha_counts_the_blocks_of_all_stages(alpha, stage, inside):
    swin, seen = tiny(), []
    with expedite(swin, alpha, grid=(2, 2), scope="window") as handle:
        assert handle.blocks is swin.layers[stage].blocks
        assert handle.blocks.first_alpha == inside
        method = handle.blocks.methods[f"after_{inside}"]
        method.reduce.register_forward_hook(lambda m, args, out: seen.append((args[0], out[0])))
        maps(swin, images((64, 96)))
    ((before, after),) = seen
    assert before.size == (16 >> stage, 24 >> stage) == after.size
    assert after.features.shape[1] == -(-(16 >> stage) // 4) * 2


def test_scope_map_is_an_error():
    with pytest.raises(ValueError, match="SCOPE must be one of .*'window'.* got 'map'"):
        expedite(tiny(), 4, grid=(2, 2))


def test_alpha_beyond_the_last_block_is_an_error():
    with pytest.raises(ValueError, match="ALPHA must be in 0 to 9 .* got 10"):
        expedite(tiny(), 10, grid=(2, 2), scope="window")


def test_alphas_of_several_stages_are_an_error():
    with pytest.raises(ValueError, match=r"ALPHA must stay inside one stage.*4 to 7.*\(4, 8\)"):
        expedite(tiny(), (4, 8), grid=(2, 2), scope="window")


def test_grid_larger_than_the_window_is_an_error_at_once():
    with pytest.raises(ValueError, match="GRID .* 4 x 4 tokens of the window"):
        expedite(tiny(), 4, grid=(5, 4), scope="window")


def test_official_classes_are_known_by_name():
    for name, module in (
        ("D2SwinTransformer", "mask2former.modeling.backbone.swin"),
        ("SwinTransformer", "mask2former.modeling.backbone.swin"),
        ("SwinTransformer", "maskdino.modeling.backbone.swin"),
    ):
        base = type("SwinTransformer", (SwinTransformer,), {"__module__": module})
        swin = type(name, (base,), {"__module__": module})(**TINY)
        assert find_transformer(nn.ModuleDict({"backbone": swin})).owner is swin
    with pytest.raises(ValueError, match="Swin"):
        find_transformer(nn.Linear(1, 1))


@pytest.mark.parametrize("setting", [{}, {"positions": "grid", "size_aware": False}], ids=str)
def test_both_kinds_agree(setting):
    reference = tiny(SwinTransformer)
    ours = D2SwinTransformer(**TINY).eval()
    ours.load_state_dict(reference.state_dict())
    x, outputs = images((72, 100)), []
    for swin in (reference, ours):
        with expedite(swin, 5, grid=(2, 3), scope="window", temperature=0.1, **setting):
            outputs.append(maps(swin, x))
    assert error(*outputs) < 1e-4


# --- types, gradients, threads, compilation ---------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_stays_near(dtype, autocast):
    swin, x = tiny(), images((40, 52))
    with expedite(swin, 5, grid=(2, 2), scope="window"):
        expected = maps(swin, x)[2]
        if not autocast:
            swin.to(dtype)
            x = x.to(dtype)
        with torch.autocast("cpu", dtype, enabled=autocast):
            actual = maps(swin, x)[2]
    assert torch.isfinite(actual).all()
    assert (actual.float() - expected).norm() / expected.norm() < 0.1


def test_gradients_reach_everything(kind):
    swin, x = tiny(kind, drop_path_rate=0.0).train(), images((104, 168)).requires_grad_()
    with expedite(swin, 5, grid=(2, 2), scope="window"):
        sum(out.square().mean() for out in swin(x).values()).backward()
    for name, tensor in [("x", x), *swin.named_parameters()]:
        assert tensor.grad is not None, name
        assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0, name


def test_checkpointing_changes_nothing():
    grads, x = [], images((40, 52))
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        swin = tiny(use_checkpoint=use_checkpoint, drop_path_rate=0.0).train()
        with expedite(swin, 5, grid=(2, 2), scope="window"):
            sum(out.square().mean() for out in swin(x).values()).backward()
        grads.append([p.grad for p in swin.parameters()])
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)


def test_threads_do_not_disturb_each_other(kind):
    """From alpha 0 on; official blocks that run on all tokens keep the map's size in themselves."""
    swin = tiny(kind, depths=(4,), num_heads=(2,), **_only_output(kind))
    inputs = [images(size) for size in ((64, 64), (40, 52), (24, 100))]
    with expedite(swin, 0, grid=(2, 2), scope="window"):
        expected, failed = [maps(swin, x) for x in inputs], []

        def work(index: int) -> None:
            try:
                for _ in range(10):
                    assert error(maps(swin, inputs[index]), expected[index]) < 1e-6
            except Exception as problem:
                failed.append(problem)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed, failed[0]


def _only_output(kind: type) -> dict:
    return {"out_features": ("res2",)} if kind is D2SwinTransformer else {"out_indices": (0,)}


@pytest.mark.slow
def test_compiles_without_a_break():
    torch._dynamo.reset()
    swin, x = one_stage(), images((24, 40), batch=1)
    with expedite(swin, 1, grid=(2, 2), scope="window"):
        expected = maps(swin, x)
        compiled = torch.compile(swin, fullgraph=True, backend="eager")
        assert error(maps(compiled, x), expected) < 1e-5
    torch._dynamo.reset()


# --- FLOPs ------------------------------------------------------------------------------------

NORM = 5  # fvcore's count of an affine layer norm, for each element


def block_flops(tokens: int, padded: int, keys: int, dim: int) -> int:
    """Norms and MLP of the tokens; the attention layer of these and padding."""
    return tokens * (2 * NORM * dim + 8 * dim * dim) + padded * (4 * dim * dim + 2 * keys * dim)


def clustering_flops(windows: int, side: int, cells: int, dim: int, iterations: int) -> int:
    """One tile a window holds all of its cells: scores, sums, squares, and putting together."""
    n, m, carried = side * side, cells * cells, dim + 4  # with one, row, column and a zero
    step = n * m * (dim + carried) + m * dim + m * carried
    return windows * (iterations * step + n * carried + n * dim + 1)  # pooling, how far they spread


def test_flops_by_hand():
    """Two stages of 12 x 12 and 6 x 6 tokens in windows of 4; alpha 1 of 4 + 2 blocks."""
    dim, side, cells = 16, 4, 2
    swin = tiny(depths=(4, 2), num_heads=(2, 2), out_features=("res2", "res3"))
    x = torch.randn(1, 3, 48, 48)
    plain = count_flops(swin, x)
    outside = 144 * dim * 3 * 16 + NORM * 144 * dim  # patches
    outside += 36 * (NORM * 4 * dim + 8 * dim * dim)  # merging
    outside += NORM * (144 * dim + 36 * 2 * dim)  # outputs
    first = block_flops(144, 144, side * side, dim)
    second = block_flops(36, 64, side * side, 2 * dim)
    assert plain.embed == outside
    assert plain.before == 4 * first + 2 * second
    assert (plain.clustering, plain.after, plain.reconstruction, plain.head) == (0, 0, 0, 0)
    assert plain.uncounted == {}

    settings = {"iterations": 3, "temperature": 0.1, "residual": False}
    with expedite(swin, 1, grid=(cells, cells), scope="window", **settings):
        flops = count_flops(swin, x)
    windows, n, m = 9, side * side, cells * cells
    assert flops.embed == outside and flops.before == first
    bias = 4 * windows * 2 * m * m  # bilinear, for each pair and both heads
    reduced = block_flops(windows * m, windows * m, m, dim) + bias
    assert flops.after == 3 * reduced + 2 * second
    assert flops.clustering == clustering_flops(windows, side, cells, dim, 3)
    assert flops.reconstruction == windows * (2 * n * m * dim + m * dim)
    assert flops.uncounted == {}
