"""Swin: the backbone against a plain implementation and Detectron2's; expedited inside a stage."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.swin import SwinTransformer
from torch import Tensor, nn

from expedit_d2 import expedite
from expedit_d2.adapters import find_host
from expedit_d2.analysis.flops import count_flops
from expedit_d2.backbones.swin import D2SwinTransformer
from expedit_d2.operators import cluster_tokens, reconstruct_tokens
from expedit_d2.projects import Mask2Former, get_cfg
from expedit_d2.projects.Mask2Former import add_maskformer2_config
from expedit_d2.windows import partition, shifted_mask

CONFIGS = Path(Mask2Former.__file__).parent / "configs"
PATCH = 4
# Every token its own cluster: nothing is lost.
IDENTITY = {"scope": "window", "temperature": 1e6, "neighbors": 1}
TINY = {
    "embed_dim": 16,
    "depths": (2, 2, 4, 2),
    "num_heads": (2, 2, 4, 4),
    "window_size": 4,
    "drop_path_rate": 0.1,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.no_grad()
def tiny(kind: type = D2SwinTransformer, positions: bool = True, **changes) -> nn.Module:
    """A random Swin; nothing in it is zero, but for the tables without ``positions``."""
    swin = kind(**(TINY | changes)).eval()
    for name, parameter in swin.named_parameters():
        if "bias_table" not in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.normal_(std=0.5 * positions)
    return swin


def one_stage(**changes) -> D2SwinTransformer:
    """A Swin of a single stage, so that what its blocks return can be told from the output."""
    settings = {"depths": (4,), "num_heads": (2,), "out_features": ("res2",)}
    return tiny(**(settings | changes))


def images(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size)


def maps(swin: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(swin(x).values())


def error(actual: list[Tensor], expected: list[Tensor]) -> float:
    assert [a.shape for a in actual] == [e.shape for e in expected]
    assert all(torch.isfinite(a).all() for a in actual)
    return max(
        ((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)
    )


# --- the plain model -------------------------------------------------------------------------


def explicit_attention(attn, places, at, groups, votes) -> Tensor:
    """Attention among tokens, a query at a time.

    Args:
        places: (N, C) tokens behind the norm.
        at: N positions (row, column), in tokens.
        groups: N labels; only tokens of one label meet.
        votes: N numbers of tokens that each key stands for.
    """
    heads, side = attn.num_heads, attn.window_size[0]
    table = attn.relative_position_bias_table.view(2 * side - 1, 2 * side - 1, heads)
    qkv = attn.qkv(places).view(len(places), 3, heads, -1)
    out = []
    for i, (row, col) in enumerate(at):
        keys = [j for j in range(len(at)) if groups[j] == groups[i]]
        logits = torch.einsum("hd,khd->kh", qkv[i, 0], qkv[keys, 1]) / math.sqrt(qkv.shape[-1])
        for n, j in enumerate(keys):
            rel = [row - at[j][0] + side - 1, col - at[j][1] + side - 1]
            rel = [min(max(r, 0.0), 2.0 * side - 2) for r in rel]
            low = [min(int(r), max(2 * side - 3, 0)) for r in rel]
            for a in (0, 1):
                for b in (0, 1):
                    share = (1 - abs(rel[0] - low[0] - a)) * (1 - abs(rel[1] - low[1] - b))
                    logits[n] += share * table[low[0] + a, low[1] + b] if share > 0 else 0
            logits[n] += math.log(votes[j])
        weights = logits.softmax(0)
        out.append(torch.einsum("kh,khd->hd", weights, qkv[keys, 2]).flatten())
    return attn.proj(torch.stack(out))


def explicit_block(block, x, window, shift, at=None, votes=None, padding=None) -> Tensor:
    """One block on a map (H, W, C) of one image.

    Shifted windows begin at -shift: no rolling, no mask, and what the roll brings together with
    tokens from the other side of the map is a smaller window of its own.
    """
    height, width, channels = x.shape
    rows, cols = (-(-n // w) * w for n, w in zip((height, width), window, strict=True))
    places = F.pad(block.norm1(x), (0, 0, 0, cols - width, 0, rows - height))
    if padding is not None:
        places = torch.where(padding[..., None], 0.0, places)
    cells = [(i, j) for i in range(rows) for j in range(cols)]
    groups = [((i - shift[0]) // window[0], (j - shift[1]) // window[1]) for i, j in cells]
    at = cells if at is None else at.view(-1, 2).tolist()
    votes = [1.0] * len(cells) if votes is None else votes.flatten().tolist()
    out = explicit_attention(block.attn, places.reshape(-1, channels), at, groups, votes)
    x = x + out.view(rows, cols, channels)[:height, :width]
    return x + block.mlp(block.norm2(x))


def explicit_swin(swin: nn.Module, x: Tensor) -> list[Tensor]:
    """The whole plain model, one image at a time."""
    outputs = []
    for image in x:
        high, wide = (-n % PATCH for n in image.shape[1:])
        patches = F.pad(image, (0, wide, 0, high))[None]
        tokens = swin.patch_embed.norm(swin.patch_embed.proj(patches)[0].permute(1, 2, 0))
        levels = []
        for index, layer in enumerate(swin.layers):
            for number, block in enumerate(layer.blocks):
                side = layer.window_size
                tokens = explicit_block(block, tokens, (side,) * 2, (side // 2 * (number % 2),) * 2)
            levels.append(getattr(swin, f"norm{index}")(tokens).permute(2, 0, 1))
            if index == len(swin.layers) - 1:
                break
            height, width, channels = tokens.shape
            merged = torch.zeros(-(-height // 2), -(-width // 2), 4 * channels)
            for i in range(height):
                for j in range(width):
                    first = (i % 2 + 2 * (j % 2)) * channels
                    merged[i // 2, j // 2, first : first + channels] = tokens[i, j]
            tokens = layer.downsample.reduction(layer.downsample.norm(merged))
        outputs.append(levels)
    return [torch.stack(level) for level in zip(*outputs, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (29, 46)])
def test_plain_model_is_an_explicit_one(size):
    levels = ("res2", "res3", "res4")
    swin, x = tiny(depths=(2, 2, 2), num_heads=(2, 2, 4), out_features=levels), images(size)
    assert error(maps(swin, x), explicit_swin(swin, x)) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"window_size": 7}, {"qkv_bias": False}], ids=str)
@pytest.mark.parametrize("size", [(64, 64), (150, 70), (33, 200)])
def test_same_weights_as_detectron2_give_the_same_output(size, changes):
    reference, ours = tiny(SwinTransformer, **changes), D2SwinTransformer(**TINY | changes).eval()
    ours.load_state_dict(reference.state_dict())
    x = images(size)
    assert error(maps(ours, x), maps(reference, x)) < 1e-5


@pytest.mark.parametrize("changes", [{"ape": True}, {"patch_norm": False}], ids=str)
def test_options_of_the_patches_as_detectron2_has_them(changes):
    settings = changes | ({"pretrain_img_size": 32} if "ape" in changes else {})
    reference, ours = tiny(SwinTransformer, **settings), D2SwinTransformer(**TINY | settings).eval()
    ours.load_state_dict(reference.state_dict())
    x = images((64, 48))
    assert error(maps(ours, x), maps(reference, x)) < 1e-5


SIZES = {  # channels, blocks, heads, window
    "T": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "S": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "B": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "L": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}


def official_keys(dim, depths, heads, window) -> dict[str, tuple[int, ...]]:
    keys = {}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        keys[f"{name}.weight"] = shape
        if bias:
            keys[f"{name}.bias"] = shape[:1]

    add("patch_embed.proj", dim, 3, 4, 4)
    add("patch_embed.norm", dim)
    for n, depth in enumerate(depths):
        width = dim << n
        for m in range(depth):
            block = f"layers.{n}.blocks.{m}"
            keys[f"{block}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads[n])
            keys[f"{block}.attn.relative_position_index"] = (window**2, window**2)
            add(f"{block}.norm1", width)
            add(f"{block}.norm2", width)
            add(f"{block}.attn.qkv", 3 * width, width)
            add(f"{block}.attn.proj", width, width)
            add(f"{block}.mlp.fc1", 4 * width, width)
            add(f"{block}.mlp.fc2", width, 4 * width)
        add(f"norm{n}", width)
        if n < 3:
            add(f"layers.{n}.downsample.norm", 4 * width)
            add(f"layers.{n}.downsample.reduction", 2 * width, 4 * width, bias=False)
    return keys


def swin_config(expedit: dict | None = None, **changes):
    cfg = get_cfg()
    add_maskformer2_config(cfg)
    for key, value in changes.items():
        cfg.MODEL.SWIN[key] = value
    for key, value in (expedit or {}).items():
        cfg.MODEL.EXPEDIT[key] = value
    return cfg


def build(cfg) -> nn.Module:
    return BACKBONE_REGISTRY.get("D2SwinTransformer")(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize("size", SIZES)
def test_state_dict_is_the_official_one(size):
    dim, depths, heads, window = SIZES[size]
    cfg = swin_config(EMBED_DIM=dim, DEPTHS=depths, NUM_HEADS=heads, WINDOW_SIZE=window)
    with torch.device("meta"):
        swin = build(cfg)
    assert {k: tuple(v.shape) for k, v in swin.state_dict().items()} == official_keys(*SIZES[size])
    shapes = swin.output_shape()
    assert {k: (v.channels, v.stride) for k, v in shapes.items()} == {
        f"res{n + 2}": (dim << n, 4 << n) for n in range(4)
    }
    assert swin.size_divisibility == 32


def test_config_reaches_every_setting():
    swin = build(
        swin_config(
            EMBED_DIM=16,
            DEPTHS=[1, 2],
            NUM_HEADS=[2, 4],
            WINDOW_SIZE=5,
            MLP_RATIO=2.0,
            QKV_BIAS=False,
            QK_SCALE=0.3,
            DROP_RATE=0.1,
            ATTN_DROP_RATE=0.2,
            DROP_PATH_RATE=0.4,
            APE=True,
            PRETRAIN_IMG_SIZE=64,
            PATCH_NORM=False,
            OUT_FEATURES=["res3"],
            USE_CHECKPOINT=True,
        )
    )
    block = swin.layers[1].blocks[1]
    assert (block.window_size, block.shift_size) == (5, 2)
    assert block.mlp.fc1.out_features == 64 and block.attn.qkv.bias is None
    assert (block.attn.scale, block.attn.num_heads) == (0.3, 4)
    assert (block.attn.attn_drop.p, block.attn.proj_drop.p, swin.pos_drop.p) == (0.2, 0.1, 0.1)
    assert block.mlp.drop1.p == 0.1 and block.drop_path.drop_prob == pytest.approx(0.4)
    assert swin.absolute_pos_embed.shape == (1, 16, 16, 16) and swin.patch_embed.norm is None
    assert swin.layers[0].use_checkpoint
    assert list(swin(images((32, 32)))) == list(swin.output_shape()) == ["res3"]


def test_unknown_output_is_an_error():
    with pytest.raises(ValueError, match="OUT_FEATURES .*'res6'"):
        D2SwinTransformer(**TINY, out_features=["res2", "res6"])


def test_mask_keeps_both_sides_of_the_seam_apart():
    """Tokens meet where windows that begin at -shift hold both."""
    size, window, shift = (6, 8), (3, 4), (1, 2)
    mask = shifted_mask(size, window, shift)
    place = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), -1)[None]
    rolled = partition(place.roll((-1, -2), dims=(1, 2)), window).flatten(1, 2)
    group = (rolled - torch.tensor(shift)).div(torch.tensor(window), rounding_mode="floor")
    apart = (group[:, :, None] != group[:, None]).any(-1)
    assert torch.equal(mask, apart * -100.0) and apart.any()


# --- one cluster a token is the plain model ---------------------------------------------------


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
    votes = torch.where(valid, sizes, 3.0) if size_aware else torch.ones_like(sizes)
    refined = []
    for image in range(2):
        cluster = clusters[image]
        for number, block in enumerate(blocks[1:], start=1):
            shift = (2, 2) if number % 2 else (0, 0)
            cluster = explicit_block(block, cluster, (4, 3), shift, at[image], votes[image], ~valid)
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
        assert find_host(nn.ModuleDict({"backbone": swin})).owner is swin
    with pytest.raises(ValueError, match="Swin"):
        find_host(nn.Linear(1, 1))


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


def test_compiles_without_a_break():
    torch._dynamo.reset()
    swin, x = one_stage(), images((24, 40), batch=1)
    with expedite(swin, 1, grid=(2, 2), scope="window"):
        expected = maps(swin, x)
        compiled = torch.compile(swin, fullgraph=True, backend="eager")
        assert error(maps(compiled, x), expected) < 1e-6
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


# --- configs ----------------------------------------------------------------------------------

PUBLISHED = {  # ALPHA, ITERATIONS, TEMPERATURE, WINDOW, NEIGHBORS
    "coco/panoptic-segmentation": (9, 5, 0.05, 7, 10),
    "coco/instance-segmentation": (11, 5, 0.01, 11, 60),
    "ade20k/panoptic-segmentation": (14, 4, 0.01, 7, 49),
    "ade20k/semantic-segmentation": (7, 5, 0.01, 5, 10),
}


#: Swin-L at 1152 x 1152, the backbone alone; None is the plain model.
PUBLISHED_GFLOPS = {
    None: 937,
    "coco/panoptic-segmentation": 663,
    "coco/instance-segmentation": 705,
    "ade20k/panoptic-segmentation": 769,
    "ade20k/semantic-segmentation": 620,
}


@pytest.mark.parametrize("task", PUBLISHED_GFLOPS)
def test_published_flops(task):
    """Whole windows in every stage at 384 x 384 as at 1152 x 1152, and a ninth of them."""
    pattern = "*expedit*.yaml" if task else "*.yaml"
    path = sorted((CONFIGS / (task or "coco/panoptic-segmentation") / "swin").glob(pattern))[0]
    cfg = swin_config()
    cfg.merge_from_file(str(path))
    flops = count_flops(build(cfg).eval(), torch.zeros(1, 3, 384, 384))
    assert flops.uncounted == {}
    assert 9 * flops.total / 1e9 == pytest.approx(PUBLISHED_GFLOPS[task], rel=0.002)


@pytest.mark.parametrize("task", PUBLISHED)
def test_configs_hold_the_published_settings(task):
    (path,) = (CONFIGS / task / "swin").glob("*expedit*.yaml")
    cfg = swin_config()
    cfg.merge_from_file(str(path))
    node = cfg.MODEL.EXPEDIT
    values = (node.ALPHA, node.ITERATIONS, node.TEMPERATURE, node.WINDOW, node.NEIGHBORS)
    assert values == PUBLISHED[task]
    assert list(node.GRID) == [8, 8] and node.SCOPE == "window" and node.ENABLED
    assert path.stem.split("_expedit")[0] + ".yaml" in {p.name for p in path.parent.iterdir()}
    with torch.device("meta"):
        swin = build(cfg)
    assert (swin.patch_embed.proj.out_channels, swin.layers[2].window_size) == (192, 12)
    blocks = swin.layers[2].blocks
    assert blocks.first_alpha == node.ALPHA - 4 and len(blocks) == 18


def test_config_expedites_the_backbone():
    changes = {
        "EMBED_DIM": 16,
        "DEPTHS": [2, 2],
        "NUM_HEADS": [2, 2],
        "WINDOW_SIZE": 4,
        "OUT_FEATURES": ["res2", "res3"],
    }
    node = {"ENABLED": True, "ALPHA": 1, "GRID": (2, 2), "SCOPE": "window"}
    plain = build(swin_config(**changes)).eval()
    swin = build(swin_config(node, **changes)).eval()
    swin.load_state_dict(plain.state_dict())
    x = images((32, 48))
    with expedite(plain, 1, grid=(2, 2), scope="window"):
        expected = maps(plain, x)
    assert all(map(torch.equal, maps(swin, x), expected))
    assert error(maps(plain, x), expected) > 1e-3
