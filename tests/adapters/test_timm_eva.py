"""timm's Eva, expedited: exactness, rotary positions worked out by hand, intermediates."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models.eva import Eva
from torch import Tensor

from expedit_d2 import expedite
from expedit_d2.operators import cluster_tokens, reconstruct_tokens
from support.tensors import IDENTITY, distance, error
from support.vits import PATCH, SIZE, images, timm_eva

ROPE = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}
KINDS = {
    "dinov3": ROPE
    | {
        "rope_type": "dinov3",
        "rope_temperature": 100,
        "rope_rotate_half": True,
        "num_reg_tokens": 4,
        "init_values": 0.5,
        "use_fc_norm": False,
    },
    "eva02": {
        "use_rot_pos_emb": True,
        "ref_feat_shape": (16, 16),
        "swiglu_mlp": True,
        "scale_mlp": True,
        "qkv_fused": False,
    },
    "perception": {
        "attn_type": "rope",
        "use_rot_pos_emb": True,
        "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy",
        "ref_feat_shape": (7, 5),
        "use_pre_transformer_norm": True,
        "global_pool": "map",
    },
    "mixed": ROPE | {"rope_type": "mixed", "rope_grid_indexing": "xy", "rope_temperature": 10.0},
    "mrope": ROPE | {"rope_type": "mrope", "rope_mrope_section": (2, 3, 3)},
    "no_rope": {"class_token": False},
    "no_rope_post_norm": {"use_post_norm": True},
}


def tiny_eva(kind: str = "dinov3", **changes) -> Eva:
    return timm_eva(**(KINDS[kind] | changes))


@pytest.fixture(params=KINDS)
def eva(request) -> Eva:
    return tiny_eva(request.param)


def run(eva, x: Tensor) -> Tensor:
    with torch.no_grad():
        return eva.forward_features(x)


def set_fused(eva, fused: bool) -> None:
    for block in eva.blocks:
        block.attn.fused_attn = fused


# --- off, and one cluster a token, is the plain model ----------------------------------------


def test_off_is_the_plain_model_bit_for_bit(eva):
    x, keys = images(), list(eva.state_dict())
    tokens = run(eva, x)
    with expedite(eva, 1, grid=(4, 6)):
        assert list(eva.state_dict()) == keys
        assert error(run(eva, x), tokens) > 1e-3
    assert torch.equal(run(eva, x), tokens) and list(eva.state_dict()) == keys


@pytest.mark.parametrize("positions", ["clusters", "grid"])
@pytest.mark.parametrize("fused", [True, False])
def test_one_cluster_a_token_is_the_plain_model(eva, fused, positions):
    set_fused(eva, fused)
    x = images(batch=3)
    tokens, logits = run(eva, x), eva(x)
    for alpha in (0, 2, (0, 1)):
        with expedite(eva, alpha, grid=SIZE, positions=positions, **IDENTITY):
            assert error(run(eva, x), tokens) < 1e-5
            assert error(eva(x), logits) < 1e-5


@pytest.mark.parametrize("size", [(5, 9), (12, 8), (3, 3), (1, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_cluster_a_token_at_other_sizes(kind, size):
    eva, x = tiny_eva(kind, dynamic_img_size=True), images(size)
    expected = run(eva, x)
    with expedite(eva, 1, grid=size, **IDENTITY):
        assert error(run(eva, x), expected) < 1e-5


@pytest.mark.parametrize("kind", ["dinov3", "mixed", "eva02"])
def test_after_the_input_size_was_set(kind):
    eva = tiny_eva(kind)
    with expedite(eva, 1, ratio=1.0, **IDENTITY):
        eva.set_input_size((6 * PATCH, 5 * PATCH))
        actual = run(eva, x := images((6, 5)))
    assert error(actual, run(eva, x)) < 1e-5


# --- an explicit forward pass, with rotary positions worked out by hand ----------------------


def angles(eva, kind: str, layer: int, head: int, row: float, col: float) -> list[float]:
    """The angles of one token, 8 for heads of 16 channels."""
    if kind == "dinov3":
        places = [2 * (p + 0.5) / n - 1 for p, n in zip((row, col), SIZE, strict=True)]
        return [2 * math.pi * p / 100 ** (k / 4) for p in places for k in range(4)]
    if kind == "eva02":
        places = [p / n * 16 for p, n in zip((row, col), SIZE, strict=True)]
        return [p / 10000 ** (k / 4) for p in places for k in range(4)]
    if kind == "perception":
        row, col = (row + 1) / SIZE[0] * 7, (col + 1) / SIZE[1] * 5
        return [p / 10000 ** (k / 4) for p in (col, row) for k in range(4)]
    if kind == "mixed":
        x, y = eva.rope.freqs[:, layer, head].tolist()
        return [col * a + row * b for a, b in zip(x, y, strict=True)]
    axes = [0, row, col, 0, row, col, 0, row]  # mrope; 3 of 3 sections, as far as they reach
    return [p / 10000 ** (k / 8) for k, p in enumerate(axes)]


def rotate(x: Tensor, turns: list[float], half: bool) -> Tensor:
    """A head's vector (16,), turned in 8 planes."""
    out = x.clone()
    for k, turn in enumerate(turns):
        i, j = (k, k + 8) if half else (2 * k, 2 * k + 1)
        out[i] = x[i] * math.cos(turn) - x[j] * math.sin(turn)
        out[j] = x[j] * math.cos(turn) + x[i] * math.sin(turn)
    return out


def explicit_block(
    eva, kind: str, layer: int, x: Tensor, cluster_sizes: Tensor, places: Tensor
) -> Tensor:
    """A block on the tokens (N, C) of one image; places (N - prefix, 2)."""
    block, prefix = eva.blocks[layer], eva.num_prefix_tokens
    attn, normed = block.attn, block.norm1(x)
    if attn.qkv is None:
        parts = [projection(normed) for projection in (attn.q_proj, attn.k_proj, attn.v_proj)]
    else:
        bias = (
            0 if attn.qkv.bias is not None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        )
        parts = (attn.qkv(normed) + bias).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (2, 16)).clone() for part in parts)
    half = kind in ("dinov3", "mrope")
    for i, (row, col) in enumerate(places.tolist()):
        for head in range(2):
            turns = angles(eva, kind, layer, head, row, col)
            q[prefix + i, head] = rotate(q[prefix + i, head], turns, half)
            k[prefix + i, head] = rotate(k[prefix + i, head], turns, half)
    rows = []
    for i in range(len(x)):
        logits = (q[i] * k).sum(-1) / 4  # (keys, heads)
        weights = (logits - logits.max(0).values).exp() * cluster_sizes[:, None]
        rows.append(((weights / weights.sum(0))[..., None] * v).sum(0).flatten())
    change = attn.proj(attn.norm(torch.stack(rows)))
    x = x + (change if block.gamma_1 is None else block.gamma_1 * change)
    change = block.mlp(block.norm2(x))
    return x + (change if block.gamma_2 is None else block.gamma_2 * change)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["clusters", "grid"])
@pytest.mark.parametrize("kind", ["dinov3", "eva02", "perception", "mixed", "mrope"])
def test_explicit_forward(kind, positions):
    eva, x = tiny_eva(kind), images()
    with expedite(eva, 1, grid=(3, 5), neighbors=3, positions=positions):
        actual = eva.forward_features(x)
    prefix = eva.num_prefix_tokens
    tokens, rope = eva._pos_embed(eva.patch_embed(x))
    before = eva.blocks[0](eva.norm_pre(tokens), rope=rope[0] if kind == "mixed" else rope)
    maps = before[:, prefix:].reshape(2, *SIZE, 32)
    clusters, sizes, places = cluster_tokens(maps, (3, 5))
    centres = [
        [(i + 0.5) * 8 / 3 - 0.5, (j + 0.5) * 12 / 5 - 0.5] for i in range(3) for j in range(5)
    ]
    assert error(places[0].flatten(0, 1), torch.tensor(centres)) > 0.03  # the two ways differ
    expected = []
    for image in range(2):
        tokens = torch.cat([before[image, :prefix], clusters[image].flatten(0, 1)])
        cluster_sizes = torch.cat([torch.ones(prefix), sizes[image].flatten()])
        where = torch.tensor(centres) if positions == "grid" else places[image].flatten(0, 1)
        for layer in (1, 2):
            tokens = explicit_block(eva, kind, layer, tokens, cluster_sizes, where)
        change = tokens[None, prefix:].view(1, 3, 5, 32) - clusters[[image]]
        rebuilt = maps[[image]] + reconstruct_tokens(
            change, maps[[image]], clusters[[image]], 3, window=5
        )
        expected.append(torch.cat([tokens[:prefix], rebuilt[0].flatten(0, 1)]))
    assert error(actual, eva.norm(torch.stack(expected))) < 1e-5


def test_the_hand_made_angles_are_those_of_the_model():
    """So that the test above is about clusters, and not about two readings of timm."""
    for kind in ("dinov3", "eva02", "perception", "mixed", "mrope"):
        eva = tiny_eva(kind)
        _, rope = eva._pos_embed(eva.patch_embed(images()))
        table = rope[1, 1] if kind == "mixed" else rope  # (H * W, sin and cos)
        sin, cos = table.detach().unflatten(0, SIZE)[6, 9].chunk(2)
        turns = torch.tensor(angles(eva, kind, 1, 1, 6, 9))
        half = kind in ("dinov3", "mrope")
        turns = turns.repeat(2) if half else turns.repeat_interleave(2)
        torch.testing.assert_close(torch.stack([sin, cos]), torch.stack([turns.sin(), turns.cos()]))


# --- size-aware attention is exact where clusters hold equal tokens --------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("grid", [(3, 5), (8, 1)])
@pytest.mark.parametrize("kind", ["no_rope", "no_rope_post_norm", "mixed"])
def test_equal_tokens_cluster_without_loss(kind, grid, fused):
    eva = tiny_eva(kind)
    set_fused(eva, fused)
    # Positions are what tells equal tokens apart: turned off, in either form.
    for positions in (eva.pos_embed, getattr(eva.rope, "freqs", None)):
        if positions is not None:
            positions.data.zero_()
    rows, cols = (torch.arange(s) * g // s for s, g in zip(SIZE, grid, strict=True))
    patches = torch.randn(2, 3, *grid, PATCH, PATCH)[:, :, rows][:, :, :, cols]
    x = patches.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    expected = run(eva, x)
    settings = {"grid": grid, "temperature": 1e4, "neighbors": 1}
    with expedite(eva, 0, **settings):
        assert error(run(eva, x), expected) < 1e-5  # the class token included
    if grid == (3, 5) or eva.num_prefix_tokens:  # so that the test could fail
        with expedite(eva, 0, size_aware=False, **settings):
            assert error(run(eva, x), expected) > 1e-3


# --- intermediate outputs --------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("stop_early", [False, True])
def test_intermediates_are_full_maps_at_every_index(eva, stop_early):
    x = images()
    plain = eva.forward_intermediates(x, intermediates_only=True, stop_early=stop_early)
    with expedite(eva, 1, grid=(4, 6)):
        maps = eva.forward_intermediates(x, intermediates_only=True, stop_early=stop_early)
        final, normed = eva.forward_intermediates(x, norm=True)
        features = run(eva, x)
    assert len(maps) == 3 and torch.equal(maps[0], plain[0])
    for index in (1, 2):
        assert maps[index].shape == (2, 32, *SIZE)
        assert error(maps[index], plain[index]) > 1e-3
    assert torch.equal(final, features)
    last = normed[-1].flatten(2).transpose(1, 2)
    assert torch.equal(last, features[:, eva.num_prefix_tokens :])


@torch.no_grad()
def test_only_what_is_read_is_rebuilt():
    eva, x, calls = tiny_eva(), images(), []
    with expedite(eva, 0, grid=(4, 6)):
        expected = run(eva, x)
    eva.expedit_outputs = (2,)
    with expedite(eva, 0, grid=(4, 6)) as handle:
        rebuild = handle.blocks.methods["after_0"].rebuild
        rebuild.register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(run(eva, x), expected)
    assert len(calls) == 1


def test_several_alphas_cluster_clusters(eva):
    x, seen = images(), []
    with expedite(eva, (0, 2), ratio=0.5) as handle:
        for method in handle.blocks.methods.values():
            method.reduce.register_forward_hook(lambda m, args, out: seen.append(out[0]))
        out = run(eva, x)
    assert [tuple(t.positions.shape) for t in seen] == [(2, 4, 6, 2), (2, 2, 3, 2)]
    assert error(out, run(eva, x)) > 1e-3


# --- types, gradients, compilation -----------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("kind", ["dinov3", "eva02", "mixed"])
def test_bf16_and_autocast_stay_near(kind, dynamic):
    eva, x = tiny_eva(kind, dynamic_img_size=dynamic), images()
    with expedite(eva, 1, grid=(4, 6)):
        expected = run(eva, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(run(eva, x), expected) < 0.1
        eva.to(torch.bfloat16)
        actual = run(eva, x.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert distance(actual, expected) < 0.1


def gradients(eva, x: Tensor) -> dict[str, Tensor]:
    eva.zero_grad()
    target = torch.randn(2, 7, generator=torch.Generator().manual_seed(1))
    (eva(x) * target).sum().backward()
    return {name: p.grad.clone() for name, p in eva.named_parameters()}


@pytest.mark.parametrize("kind", ["dinov3", "mixed"])
def test_gradients_are_those_of_the_plain_model_and_of_checkpointing(kind):
    eva, x = tiny_eva(kind), images()
    expected = gradients(eva, x)
    with expedite(eva, (1, 2), grid=SIZE, **IDENTITY):
        actual = gradients(eva, x)
    for name, grad in expected.items():
        assert error(actual[name], grad) < 1e-3, name
    with expedite(eva, (1, 2), ratio=0.6):
        expected = gradients(eva, x)
        eva.set_grad_checkpointing()
        actual = gradients(eva, x)
    for name, grad in expected.items():
        assert error(actual[name], grad) < 1e-4, name
        assert grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["dinov3", "mixed"])
@pytest.mark.slow
def test_compiles_without_a_break(kind):
    torch._dynamo.reset()
    eva, x = tiny_eva(kind, dynamic_img_size=True), images()
    with expedite(eva, 1, grid=(4, 6)):
        expected = run(eva, x)
        compiled = torch.compile(eva.forward_features, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert error(compiled(x), expected) < 1e-6
    torch._dynamo.reset()


def test_jitter_of_training_does_not_reach_evaluation():
    eva, x = tiny_eva(rope_jitter_coords=2.0, rope_shift_coords=0.5), images()
    plain = tiny_eva()
    plain.load_state_dict(eva.state_dict())
    with expedite(eva, 1, grid=(4, 6)), expedite(plain, 1, grid=(4, 6)):
        assert torch.equal(run(eva, x), run(plain, x))
        eva.train()
        assert torch.isfinite(run(eva, x)).all()


# --- what it refuses -------------------------------------------------------------------------


def test_dropped_patches_are_refused():
    eva = tiny_eva(patch_drop_rate=0.5).train()
    with expedite(eva, 1, grid=(2, 2)), pytest.raises(ValueError, match="8 x 12 tokens, got 48"):
        run(eva, images())


def test_unknown_rotary_positions_are_refused():
    eva = tiny_eva()
    eva.rope = torch.nn.Identity()
    with pytest.raises(ValueError, match="RotaryEmbeddingDinoV3.* got Identity"):
        expedite(eva, 1, grid=(2, 2))


def test_masks_and_windows_are_refused():
    eva = tiny_eva()
    with pytest.raises(ValueError, match='SCOPE "window"'):
        expedite(eva, 1, grid=(2, 2), scope="window")
    with expedite(eva, 1, grid=(2, 2)), pytest.raises(ValueError, match="attn_mask"):
        eva.forward_features(images(), attn_mask=torch.zeros(101, 101))
