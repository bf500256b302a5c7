"""timm's VisionTransformer, expedited: exactness, class tokens, intermediates, an oracle."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from expedit_d2 import expedite
from expedit_d2.operators import cluster_tokens, reconstruct_tokens
from support.tensors import IDENTITY, constant_cells, distance, error
from support.vits import PATCH, SIZE, images, timm_vit
from support.vits import run_timm as run

KINDS = {
    "plain": {},
    "dinov2": {"reg_tokens": 4, "init_values": 0.5, "no_embed_class": True},
    "registers": {"reg_tokens": 3},
    "clip": {"pre_norm": True, "qk_norm": True},
    "no_class": {"class_token": False, "global_pool": "avg"},
    "map_pool": {"class_token": False, "global_pool": "map"},
    "dynamic": {"dynamic_img_size": True, "reg_tokens": 2},
    "dynamic_no_positions": {"dynamic_img_size": True, "pos_embed": "none"},
}


@pytest.fixture(params=KINDS)
def vit(request) -> VisionTransformer:
    return timm_vit(**KINDS[request.param])


def set_fused(vit, fused: bool) -> None:
    for block in vit.blocks:
        block.attn.fused_attn = fused


# --- one cluster a token is the plain model --------------------------------------------------


@pytest.mark.parametrize("size_aware", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_one_cluster_a_token_is_the_plain_model(vit, fused, size_aware):
    set_fused(vit, fused)
    x = images(batch=3)
    tokens, logits = run(vit, x), vit(x)
    for alpha in (0, 1, 2, 3, (0, 2), (0, 1, 2, 3)):
        with expedite(vit, alpha, grid=SIZE, size_aware=size_aware, **IDENTITY):
            assert error(run(vit, x), tokens) < 1e-5
            assert error(vit(x), logits) < 1e-5


@pytest.mark.parametrize("size", [(5, 9), (12, 8), (3, 3), (1, 4)])
@pytest.mark.parametrize("kind", ["dynamic", "dynamic_no_positions"])
def test_one_cluster_a_token_at_other_sizes(kind, size):
    vit, x = timm_vit(**KINDS[kind]), images(size)
    expected = run(vit, x)
    with expedite(vit, 1, grid=size, **IDENTITY):
        assert error(run(vit, x), expected) < 1e-5


def test_one_cluster_a_token_with_padded_images():
    vit = timm_vit(dynamic_img_size=True, dynamic_img_pad=True)
    x = torch.randn(2, 3, 4 * PATCH + 1, 6 * PATCH - 1)
    expected = run(vit, x)
    with expedite(vit, 1, grid=(5, 6), **IDENTITY):
        assert error(run(vit, x), expected) < 1e-5


def test_after_the_input_size_was_set():
    vit = timm_vit()
    with expedite(vit, 1, ratio=1.0, **IDENTITY):
        vit.set_input_size((6 * PATCH, 5 * PATCH))
        actual = run(vit, x := images((6, 5)))
    assert error(actual, run(vit, x)) < 1e-5


@pytest.mark.parametrize("residual", [False, True])
def test_fewer_clusters_differ_and_fused_attention_does_not(vit, residual):
    x = images()
    plain = run(vit, x)
    with expedite(vit, 1, grid=(4, 6), residual=residual):
        fused = run(vit, x)
        set_fused(vit, False)
        unfused = run(vit, x)
    assert error(fused, plain) > 1e-3
    assert error(unfused, fused) < 1e-4


# --- size-aware attention is exact where clusters hold equal tokens --------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (8, 1)])
def test_equal_tokens_cluster_without_loss(vit, grid, fused):
    set_fused(vit, fused)
    if vit.pos_embed is not None:
        vit.pos_embed.data.zero_()
    x = constant_cells(SIZE, grid)
    expected = run(vit, x)
    settings = {"grid": grid, "temperature": 1e4, "neighbors": 1}
    with expedite(vit, 0, **settings):
        assert error(run(vit, x), expected) < 1e-5  # class and register tokens included
        assert error(vit(x), vit.forward_head(expected)) < 1e-5
    unequal = SIZE[0] % grid[0] or SIZE[1] % grid[1]
    if unequal or vit.num_prefix_tokens:  # so that the test could fail
        with expedite(vit, 0, size_aware=False, **settings):
            assert error(run(vit, x), expected) > 1e-3


# --- an explicit forward pass to compare with ------------------------------------------------


def explicit_block(block, x: Tensor, cluster_sizes: Tensor) -> Tensor:
    """A block on the tokens (N, C) of one image, each key with its cluster size."""
    attn, normed = block.attn, block.norm1(x)
    heads, width = attn.num_heads, attn.head_dim
    q, k, v = attn.qkv(normed).view(-1, 3, heads, width).unbind(1)
    rows = []
    for i in range(len(x)):
        logits = (attn.q_norm(q[i]) * attn.k_norm(k)).sum(-1) * width**-0.5  # (keys, heads)
        weights = (logits - logits.max(0).values).exp() * cluster_sizes[:, None]
        rows.append(((weights / weights.sum(0))[..., None] * v).sum(0).flatten())
    x = x + block.ls1(attn.proj(torch.stack(rows)))
    return x + block.ls2(block.mlp(block.norm2(x)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dinov2", "clip", "no_class"])
@pytest.mark.parametrize("size_aware", [True, False])
def test_explicit_forward(kind, size_aware):
    vit, x = timm_vit(**KINDS[kind]), images()
    with expedite(vit, 1, grid=(3, 5), neighbors=3, size_aware=size_aware):
        actual = vit.forward_features(x)
    prefix = vit.num_prefix_tokens
    before = vit.blocks[0](vit.norm_pre(vit._pos_embed(vit.patch_embed(x))))
    maps = before[:, prefix:].reshape(2, *SIZE, 32)
    clusters, sizes, _ = cluster_tokens(maps, (3, 5))
    assert sizes.std() > 0.1  # the sizes differ
    expected = []
    for image in range(2):
        tokens = torch.cat([before[image, :prefix], clusters[image].flatten(0, 1)])
        cluster_sizes = torch.cat([torch.ones(prefix), sizes[image].flatten()])
        for block in vit.blocks[1:]:
            tokens = explicit_block(
                block, tokens, cluster_sizes if size_aware else torch.ones_like(cluster_sizes)
            )
        change = tokens[None, prefix:].view(1, 3, 5, 32) - clusters[[image]]
        rebuilt = maps[[image]] + reconstruct_tokens(
            change, maps[[image]], clusters[[image]], 3, window=5
        )
        expected.append(torch.cat([tokens[:prefix], rebuilt[0].flatten(0, 1)]))
    assert error(actual, vit.norm(torch.stack(expected))) < 1e-5


# --- intermediate outputs --------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("stop_early", [False, True])
def test_intermediates_are_full_maps_at_every_index(vit, stop_early):
    x = images()
    plain = vit.forward_intermediates(x, intermediates_only=True, stop_early=stop_early)
    tokens = run(vit, x)
    with expedite(vit, 2, grid=(4, 6)):
        final, maps = vit.forward_intermediates(x, norm=True, stop_early=stop_early)
        raw = vit.forward_intermediates(x, intermediates_only=True, stop_early=stop_early)
        features = run(vit, x)
    assert len(raw) == len(maps) == 4
    for index in range(4):
        assert raw[index].shape == (2, 32, *SIZE)
        if index < 2:
            assert torch.equal(raw[index], plain[index])
        else:
            assert error(raw[index], plain[index]) > 1e-3
    assert error(final, features) < 1e-6 and error(final, tokens) > 1e-3
    last = maps[-1].flatten(2).transpose(1, 2)
    assert error(last, features[:, vit.num_prefix_tokens :]) < 1e-6


@torch.no_grad()
def test_intermediates_do_not_depend_on_which_are_asked_for():
    vit, x = timm_vit(reg_tokens=2), images()
    with expedite(vit, (1, 2), ratio=0.6):
        every = vit.forward_intermediates(x, intermediates_only=True, return_prefix_tokens=True)
        for indices in ([0], [1, 3], [2], 2):
            for stop_early in (False, True):
                some = vit.forward_intermediates(
                    x,
                    indices,
                    intermediates_only=True,
                    return_prefix_tokens=True,
                    stop_early=stop_early,
                )
                wanted = [2, 3] if indices == 2 else indices
                for (a, a_prefix), index in zip(some, wanted, strict=True):
                    assert torch.equal(a, every[index][0])
                    assert torch.equal(a_prefix, every[index][1])


@torch.no_grad()
def test_one_cluster_a_token_keeps_every_intermediate(vit):
    x = images()
    plain = vit.forward_intermediates(x, intermediates_only=True)
    with expedite(vit, (0, 2), grid=SIZE, **IDENTITY):
        ours = vit.forward_intermediates(x, intermediates_only=True)
    for actual, expected in zip(ours, plain, strict=True):
        assert error(actual, expected) < 1e-5


@torch.no_grad()
def test_get_intermediate_layers():
    vit, x = timm_vit(reg_tokens=2), images()
    with expedite(vit, 1, grid=(4, 6)):
        features = run(vit, x)
        first, last = vit.get_intermediate_layers(x, n=[0, 3], reshape=True, norm=True)
        flat = vit.get_intermediate_layers(x, n=1, norm=True)[0]
    assert first.shape == last.shape == (2, 32, *SIZE)
    assert error(flat, features[:, vit.num_prefix_tokens :]) < 1e-6
    assert torch.equal(last.flatten(2).transpose(1, 2), flat)


@torch.no_grad()
def test_features_only_models():
    model = timm.create_model(
        "vit_tiny_patch16_224",
        features_only=True,
        img_size=96,
        embed_dim=32,
        num_heads=4,
        depth=5,
        out_indices=(0, 2, 3),
    ).eval()
    x = torch.randn(2, 3, 96, 96)
    plain = model(x)
    with expedite(model, 1, grid=(3, 3)):
        maps = model(x)
    with expedite(model, 1, grid=(6, 6), **IDENTITY):
        same = model(x)
    assert torch.equal(maps[0], plain[0])
    for index in range(3):
        assert maps[index].shape == plain[index].shape == (2, 32, 6, 6)
        assert error(same[index], plain[index]) < 1e-5
    assert error(maps[2], plain[2]) > 1e-4
    assert all(map(torch.equal, model(x), plain))


# --- several alphas --------------------------------------------------------------------------


def test_several_alphas_cluster_clusters(vit):
    x, seen = images(), []
    with expedite(vit, (0, 2), ratio=0.5) as handle:
        for method in handle.blocks.methods.values():
            method.reduce.register_forward_hook(lambda m, args, out: seen.append(out[0]))
        out = run(vit, x)
    assert [tuple(t.features.shape[1:3]) for t in seen] == [(4, 6), (2, 3)]
    for tokens in seen:
        assert tokens.size == tokens.span == SIZE
        torch.testing.assert_close(tokens.sizes.sum((1, 2)), torch.full((2,), 96.0))
    assert error(out, run(vit, x)) > 1e-3


# --- types, gradients, compilation -----------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype, fused):
    vit, x = timm_vit(reg_tokens=2), images()
    set_fused(vit, fused)
    with expedite(vit, 1, grid=(4, 6)):
        expected = run(vit, x)
        vit.to(dtype)
        actual = run(vit, x.to(dtype))
    assert actual.dtype == dtype
    assert distance(actual, expected) < (0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("fused", [True, False])
def test_autocast_stays_near(fused):
    vit, x = timm_vit(reg_tokens=2), images()
    set_fused(vit, fused)
    with expedite(vit, 1, grid=(4, 6)):
        expected = run(vit, x)
        with torch.autocast("cpu", torch.bfloat16):
            actual = run(vit, x)
    assert distance(actual, expected) < 0.1


def test_gradients_reach_everything(vit):
    x = images().requires_grad_()
    vit.train()
    with expedite(vit, 1, grid=(4, 6)):
        (vit(x) * torch.randn(2, 7)).sum().backward()
    for name, tensor in [("x", x), *vit.named_parameters()]:
        assert tensor.grad is not None, name
        assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0, name


def gradients(vit, x: Tensor) -> dict[str, Tensor]:
    vit.zero_grad()
    target = torch.randn(2, 7, generator=torch.Generator().manual_seed(1))
    (vit(x) * target).sum().backward()
    return {name: p.grad.clone() for name, p in vit.named_parameters()}


def test_gradients_of_one_cluster_a_token_are_the_plain_ones():
    vit, x = timm_vit(reg_tokens=2), images()
    expected = gradients(vit, x)
    with expedite(vit, (1, 2), grid=SIZE, **IDENTITY):
        actual = gradients(vit, x)
    for name, grad in expected.items():
        assert error(actual[name], grad) < 1e-3, name


def test_gradient_checkpointing_changes_nothing():
    """Blocks are run again during backward, when the pass they belonged to is long over."""
    vit, x = timm_vit(), images()
    with expedite(vit, (1, 2), ratio=0.6):
        expected = gradients(vit, x)
        vit.set_grad_checkpointing()
        actual = gradients(vit, x)
    for name, grad in expected.items():
        assert error(actual[name], grad) < 1e-4, name


@pytest.mark.slow
def test_compiles_without_a_break():
    torch._dynamo.reset()
    vit, x = timm_vit(depth=3, reg_tokens=2), images()
    with expedite(vit, 1, grid=(4, 6)):
        expected = run(vit, x)
        compiled = torch.compile(vit.forward_features, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert error(compiled(x), expected) < 1e-6
    torch._dynamo.reset()


# --- what it refuses -------------------------------------------------------------------------


def test_scope_window_is_refused():
    with pytest.raises(ValueError, match='SCOPE "window"'):
        expedite(timm_vit(), 1, grid=(2, 2), scope="window")


def test_grid_larger_than_the_map_is_an_error_of_the_input():
    with expedite(timm_vit(dynamic_img_size=True), 1, grid=(4, 9)) as handle:
        assert handle.settings.grid == (4, 9)
    vit = timm_vit(dynamic_img_size=True)
    with expedite(vit, 1, grid=(4, 9)):
        run(vit, images((4, 9)))
        with pytest.raises(ValueError, match=r"GRID .* 4 x 8 .*\(4, 9\).* RATIO"):
            run(vit, images((4, 8)))


def test_dropped_patches_are_refused():
    vit = timm_vit(patch_drop_rate=0.5).train()
    with expedite(vit, 1, grid=(2, 2)), pytest.raises(ValueError, match="8 x 12 tokens, got 48"):
        run(vit, images())


@pytest.mark.parametrize("size_aware", [True, False])
def test_a_mask_is_not_dropped_silently(size_aware):
    """A caller's mask speaks of original tokens: keep its effect or refuse it."""
    vit, x = timm_vit(), images()
    mask = torch.zeros(97, 97)
    mask[:, 1:40] = -1e9
    with torch.no_grad():
        expected = vit.forward_features(x, attn_mask=mask)
        assert error(expected, run(vit, x)) > 1e-3
        with expedite(vit, 1, grid=SIZE, size_aware=size_aware, **IDENTITY):
            try:
                actual = vit.forward_features(x, attn_mask=mask)
            except ValueError as refusal:
                assert "mask" in str(refusal)
            else:
                assert error(actual, expected) < 1e-5
