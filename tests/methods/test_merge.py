"""METHOD merge: matching against a plain loop, exactness, counts, families, errors."""

from __future__ import annotations

import pytest
import timm
import torch

from expedit_d2 import expedite
from expedit_d2.analysis.flops import count_flops
from expedit_d2.methods import matching
from expedit_d2.methods.matching import cluster_means, cluster_sizes, match, snake_order
from expedit_d2.operators import tiling
from expedit_d2.settings import Settings
from support.oracles import plain_matching
from support.tensors import error
from support.vits import SIZE, detectron2_vit, equal_in_pairs, images, timm_vit
from support.vits import run_timm as run

TOKENS = SIZE[0] * SIZE[1]


# --- matching ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [48, 31])
@pytest.mark.parametrize("share, rounds", [(0.9, 1), (0.7, 2), (0.5, 3), (0.3, 2), (0.1, 1)])
@pytest.mark.parametrize("ward", [0.0, 0.25, 1.0])
def test_matching_is_that_of_a_plain_loop(tokens, share, rounds, ward):
    keys, sizes = torch.randn(2, tokens, 5), torch.randint(1, 5, (2, tokens)).float()
    count = max(1, round(share * tokens))
    index = match(keys, sizes, count, rounds, ward)
    assert index.shape == (2, tokens)
    for image in range(2):
        expected = plain_matching(keys[image], sizes[image], count, rounds, ward)
        found = [set((index[image] == c).nonzero().flatten().tolist()) for c in range(count)]
        assert found == expected
    features = torch.randn(2, tokens, 3)
    totals, shares = cluster_sizes(sizes, index, count)
    means = cluster_means(features, index, shares, count)
    for cluster in range(count):
        member = (index[0] == cluster)[:, None] * sizes[0][:, None]
        assert torch.allclose(totals[0, cluster], member.sum())
        mean = (features[0] * member).sum(0) / member.sum()
        assert torch.allclose(means[0, cluster], mean, atol=1e-5)
        if (index[0] == cluster).sum() == 1:  # exactly: nothing was merged
            assert torch.equal(means[0, cluster], features[0][index[0] == cluster][0])


def test_tokens_of_different_windows_are_not_merged():
    keys, groups = torch.randn(2, 60, 4), (torch.arange(60) // 13).expand(2, -1)
    index = match(keys, None, 35, 2, 0.25, groups)
    for image in range(2):
        ones = torch.ones(60)
        expected = plain_matching(keys[image], ones, 35, 2, 0.25, groups[image])
        found = [set((index[image] == c).nonzero().flatten().tolist()) for c in range(35)]
        assert found == expected
        assert all(len({i // 13 for i in cluster}) == 1 for cluster in found)


def test_matching_of_many_tokens_is_in_runs_and_ranked_over_all(monkeypatch):
    """Two runs: one of tokens that are all alike, which takes nearly all of the merges."""
    monkeypatch.setattr(matching, "_RUN", 20)
    keys = torch.cat([torch.randn(1, 20, 4), 0.01 * torch.randn(1, 20, 4)], dim=1)
    index = match(keys, None, 30)
    alike = index[0, 20:].unique().numel()
    assert alike == 10 and index[0, :20].unique().numel() == 20
    assert not set(index[0, :20].tolist()) & set(index[0, 20:].tolist())


@pytest.mark.parametrize("size, window", [((6, 8), (3, 4)), ((7, 9), (4, 4)), ((5, 5), (14, 14))])
def test_tokens_are_listed_to_and_fro_in_each_window(size, window):
    order, back = snake_order(size, window, torch.device("cpu"))
    expected = []
    for top in range(0, size[0], window[0]):
        for left in range(0, size[1], window[1]):
            for row in range(top, min(top + window[0], size[0])):
                cols = list(range(left, min(left + window[1], size[1])))
                cols = cols if (row - top) % 2 == 0 else cols[::-1]
                expected += [row * size[1] + col for col in cols]
    assert order.tolist() == expected
    assert torch.equal(order[back], torch.arange(size[0] * size[1]))


def test_a_count_of_all_merges_nothing():
    index = match(torch.randn(1, 12, 4), torch.ones(1, 12), 12, 2)
    assert index.tolist() == [list(range(12))]


# --- the whole of a ViT ------------------------------------------------------------------------


def test_equal_tokens_merge_without_loss():
    """Half of the tokens are copies of the others: cluster sizes make merging exact."""
    vit = timm_vit(pos_embed="none", reg_tokens=2)
    x = equal_in_pairs()
    plain = run(vit, x)
    with expedite(vit, 1, method="merge", keep=0.5, rounds=1):
        assert error(run(vit, x), plain) < 1e-5
    with expedite(vit, 1, method="merge", keep=0.5, rounds=1, size_aware=False):
        assert error(run(vit, x), plain) > 1e-3


@pytest.mark.parametrize("residual", [None, False])
def test_one_merge_of_a_vit(residual):
    """Beside the blocks run by hand on clusters of the plain loop; None adds the residual."""
    vit = timm_vit(reg_tokens=1)
    x = images(batch=1)
    before = []
    with vit.blocks[2].register_forward_pre_hook(lambda _, args: before.append(args[0])):
        run(vit, x)
    with expedite(vit, 2, method="merge", keep=40, rounds=2, residual=residual):
        ours = run(vit, x)
    with torch.no_grad():
        prefix, tokens = before[0][:, :2], before[0][0, 2:]
        block = vit.blocks[2]
        heads = block.attn.qkv(block.norm1(tokens)).unflatten(1, (3, 4, 8))[:, 1]
        order, _ = snake_order(SIZE, (14, 14), tokens.device)
        found = plain_matching(heads.mean(1)[order], torch.ones(TOKENS), 40, 2, ward=0.25)
        groups = [{int(order[i]) for i in group} for group in found]
        clusters = torch.stack([tokens[sorted(group)].mean(0) for group in groups])
        log_sizes = torch.tensor([1.0, 1.0] + [len(group) for group in groups]).log()
        y = torch.cat([prefix, clusters[None]], dim=1)
        for block in vit.blocks[2:]:
            y = block(y, attn_mask=log_sizes[None, None, None])
        expected = torch.empty_like(tokens)
        for number, group in enumerate(groups):
            for token in group:
                difference = tokens[token] - clusters[number]
                expected[token] = y[0, 2 + number] + (0 if residual is False else difference)
        expected = vit.norm(torch.cat([y[:, :2], expected[None]], dim=1))
    assert error(ours, expected) < 1e-5


def count_of(vit, x, **settings) -> list[int]:
    """Tokens that each block runs on."""
    seen = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for block in vit.blocks
    ]
    with expedite(vit, method="merge", **settings):
        run(vit, x)
    for hook in hooks:
        hook.remove()
    return [n - vit.num_prefix_tokens for n in seen]


def test_counts_of_a_schedule():
    vit, x = timm_vit(), images()
    equal = [round(TOKENS * 0.4 ** (i / 3)) for i in (1, 2, 3)]
    assert count_of(vit, x, alpha=(0, 1, 2), keep=0.4) == [*equal, equal[-1]]
    falling = [round(TOKENS * 0.4 ** (i / 6)) for i in (3, 3 + 2, 3 + 2 + 1)]
    counts = count_of(vit, x, alpha=(0, 1, 2), keep=0.4, schedule="falling")
    assert counts == [*falling, falling[-1]]
    assert count_of(vit, x, alpha=(0, 1, 2), keep=38)[-1] == 38
    assert count_of(vit, x, alpha=(1, 3), keep=(0.75, 30)) == [96, 72, 72, 30]
    assert count_of(vit, x, alpha=(3, 1), keep=(30, 0.75)) == [96, 72, 72, 30]
    assert count_of(vit, x, alpha=1, keep=500) == [96] * 4


@pytest.mark.parametrize("name", ["vit_tiny_patch16_dinov3_qkvb", "eva02_tiny_patch14_224"])
def test_rotary_positions(name):
    """Eva: equal tokens far from each other keep their mean position; nothing else is needed."""
    try:
        eva = timm.create_model(name, img_size=(64, 96), patch_size=8, depth=3)
    except (RuntimeError, TypeError):
        pytest.skip(f"this timm has no {name}")
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        plain = eva.eval().forward_features(x)
        with expedite(eva, (0, 1), method="merge", keep=1.0):
            assert error(eva.forward_features(x), plain) < 1e-4
        with expedite(eva, (0, 1), method="merge", keep=0.5):
            out = eva.forward_features(x)
    assert out.shape == plain.shape and torch.isfinite(out).all()


@pytest.mark.parametrize("residual", [True, False])
def test_merges_in_turn_are_rebuilt_as_one(residual):
    """Each token is followed through the three merges; differences from the clusters add up."""
    vit, x = timm_vit(), images(batch=1)
    merges = []
    with expedite(vit, (0, 1, 3), method="merge", keep=0.3, residual=residual) as handle:
        for method in handle.blocks.methods.values():
            method.reduce.register_forward_hook(lambda _, a, out: merges.append((a[0], *out)))
        with torch.no_grad():
            tokens = vit._pos_embed(vit.patch_embed(x))
            last, ends = tokens, []
            vit.blocks[3].register_forward_hook(lambda _, a, out: ends.append(out))
            for block in vit.blocks:
                last = block(last)
    assert len(merges) == 3
    for token in range(TOKENS):
        place, difference = token, torch.zeros(vit.embed_dim)
        for before, after, record in merges:
            merged = before.features.flatten(1, -2)[0, place]
            place = int(record.index[0, place])
            difference += merged - after.features[0, place]
        expected = ends[0][0, 1 + place] + (difference if residual else 0)
        tolerance = 1e-5 if residual else 0
        torch.testing.assert_close(last[0, 1 + token], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method, residual", [("merge", True), ("tome", False), ("density", False)])
def test_residual_unless_told_otherwise(method, residual):
    vit, x, outs = timm_vit(), images(), []
    for given in (None, True, False):
        with expedite(vit, 1, method=method, keep=0.5, residual=given):
            outs.append(run(vit, x))
    assert torch.equal(outs[0], outs[1 if residual else 2])
    assert error(outs[1], outs[2]) > 1e-3


def test_images_of_a_batch_do_not_matter_to_each_other():
    vit, x = timm_vit(), images(batch=3)
    with expedite(vit, (0, 2), method="merge", keep=0.4):
        assert error(run(vit, x)[1:2], run(vit, x[1:2])) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    vit, x = timm_vit(), images()
    with expedite(vit, (0, 2), method="merge", keep=0.5):
        exact = run(vit, x)
        low = run(vit.to(dtype), x.to(dtype))
    assert low.dtype == dtype
    # Some pairs differ; most tokens do not.
    assert torch.nn.functional.cosine_similarity(low.float(), exact, dim=-1).median() > 0.95


def test_flops_are_counted():
    vit, x = timm_vit(), images(batch=1)
    with expedite(vit, 1, method="merge", keep=0.5, rounds=1):
        flops = count_flops(vit, x)
    assert not flops.uncounted
    tokens, clusters, channels, key = TOKENS, TOKENS // 2, 32, 8
    products = tokens * channels * key + (tokens // 2) ** 2 * key
    assert products < flops.clustering < products + 8 * tokens * channels + 4 * tokens * key
    n = clusters + 1
    block = n * channels * channels * (4 + 2 * 2) + 2 * n * n * channels
    assert abs(flops.after / (3 * block) - 1) < 0.05
    assert flops.reconstruction == 0  # it only moves


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "merge"}, "METHOD merge needs KEEP"),
        ({"method": "merge", "keep": 0.5, "grid": (2, 2)}, "would do nothing with METHOD merge"),
        ({"method": "merge", "keep": 1.5}, r"KEEP must be a share .* got 1.5"),
        ({"method": "merge", "keep": 0}, r"KEEP must be a share .* got 0"),
        ({"method": "merge", "keep": (0.5, 0.4)}, "one for each of the 1 ALPHAs"),
        ({"method": "merge", "keep": 0.5, "rounds": 0}, "ROUNDS must be a positive integer"),
        ({"keep": 0.5, "ratio": 0.5}, "would do nothing with METHOD merge"),
        ({"method": "pool", "keep": 0.5}, "KEEP 0.5 .* would do nothing with METHOD pool"),
        ({"keep": 0.5, "schedule": "rising"}, "SCHEDULE must be one of .*falling"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(alpha=1, **settings)


def test_convolutions_between_blocks_need_a_grid():
    vit = detectron2_vit(residual_block_indexes=[1])
    with pytest.raises(ValueError, match="METHOD merge leaves tokens on no grid.*convolutions"):
        expedite(vit, 1, method="merge", keep=0.5)


def test_what_is_kept_for_later_has_a_type_of_its_own():
    """A default type that was in force at the first pass would stay in the process."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        sizes, _ = cluster_sizes(None, torch.zeros(1, 3, dtype=torch.long), 1)
        tiles = tiling.tile.__wrapped__((8, 8), (4, 4), 2, 1, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {sizes.dtype, tiles.mask.dtype, tiles.real.dtype} == {torch.float32}
