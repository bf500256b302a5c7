"""The competitors pool, hard and tome, each beside a plain loop; what all methods share."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from expedit_d2 import expedite
from expedit_d2.backbones.swin import D2SwinTransformer
from expedit_d2.methods import METHOD_REGISTRY, build_method
from expedit_d2.methods.density import density_peaks
from expedit_d2.methods.matching import snake_order
from expedit_d2.settings import Settings
from expedit_d2.tokens import Tokens
from support.oracles import allowed_pairs, plain_matching
from support.tensors import error, perturbed
from support.vits import SIZE, detectron2_vit, equal_in_pairs, images, timm_vit
from support.vits import run_timm as run

H, W = SIZE


def tokens_of(features: Tensor, **more) -> Tokens:
    size = features.shape[1:3]
    return Tokens(features, size=size, span=size, **more)


def counts(name: str) -> dict:
    return {"keep": 0.5} if METHOD_REGISTRY[name].unstructured else {"ratio": 0.75}


@pytest.mark.parametrize("name", METHOD_REGISTRY)
def test_every_method_runs_and_can_be_removed(name):
    vit, x = timm_vit(reg_tokens=1), images()
    plain = run(vit, x)
    with expedite(vit, (1, 2), method=name, **counts(name)):
        out = run(vit, x)
    assert out.shape == plain.shape and torch.isfinite(out).all()
    assert not torch.equal(out, plain)
    assert torch.equal(run(vit, x), plain)


@pytest.mark.parametrize(
    "name", sorted(name for name in METHOD_REGISTRY if not METHOD_REGISTRY[name].unstructured)
)
@pytest.mark.parametrize("scope", ["map", "window"])
def test_methods_with_a_grid_run_with_windows(name, scope):
    vit = detectron2_vit()
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad(), expedite(vit, 1, method=name, scope=scope, ratio=0.6):
        out = vit(x)["last_feat"]
    assert torch.isfinite(out).all()


# --- pool --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_pool_is_the_mean_of_each_cell(weighted):
    features = torch.randn(2, H, W, 5)
    weights = torch.rand(2, H, W) if weighted else None
    method = build_method(
        Settings(alpha=0, grid=(4, 3), method="pool", residual=False), attention_window=None
    )
    reduced, record = method.reduce(tokens_of(features, sizes=weights))
    w = torch.ones(2, H, W) if weights is None else weights
    for image in range(2):
        for row in range(4):
            for col in range(3):
                cell = (image, slice(2 * row, 2 * row + 2), slice(4 * col, 4 * col + 4))
                total = w[cell].sum()
                mean = (features[cell] * w[cell][..., None]).sum((0, 1)) / total
                assert torch.allclose(reduced.features[image, row, col], mean, atol=1e-6)
                assert torch.allclose(reduced.sizes[image, row, col], total)
    # A plane is what bilinear upsampling gives back, but for the border.
    rows, cols = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    plane = (2.0 * rows - cols)[None, ..., None]
    reduced, record = method.reduce(tokens_of(plane))
    rebuilt = method.rebuild(reduced.features, record)
    assert torch.allclose(rebuilt[:, 1:-1, 2:-2], plane[:, 1:-1, 2:-2], atol=1e-4)


# --- hard --------------------------------------------------------------------------------------


def test_hard_is_lloyds_algorithm_near_each_token():
    features, grid, window = torch.randn(2, H, W, 5), (4, 6), 3
    settings = Settings(
        alpha=0, grid=grid, method="hard", window=window, neighbor_window=window, residual=False
    )
    method = build_method(settings, attention_window=None)
    reduced, record = method.reduce(tokens_of(features))
    refined = torch.randn(2, *grid, 7)
    rebuilt = method.rebuild(refined, record)
    allowed = allowed_pairs(SIZE, grid, window)
    for image in range(2):
        x = features[image].flatten(0, 1).double()
        centroids = F.adaptive_avg_pool2d(x.view(H, W, 5).permute(2, 0, 1), grid)
        centroids = centroids.flatten(1).T
        for _ in range(settings.iterations):
            distance = torch.cdist(x, centroids).masked_fill(~allowed, float("inf"))
            nearest = distance.argmin(1)
            for cluster in range(len(centroids)):
                if (nearest == cluster).any():
                    centroids[cluster] = x[nearest == cluster].mean(0)
        filled = nearest.bincount(minlength=len(centroids))
        assert torch.allclose(reduced.sizes[image].flatten().double(), filled.double(), atol=1e-3)
        there = filled > 0
        ours = reduced.features[image].flatten(0, 1)
        assert torch.allclose(ours[there].double(), centroids[there], atol=1e-4)
        distance = torch.cdist(x, ours.double()).masked_fill(~allowed, float("inf"))
        distance[:, ~there] = float("inf")
        expected = refined[image].flatten(0, 1)[distance.argmin(1)]
        assert torch.allclose(rebuilt[image].flatten(0, 1), expected, atol=1e-5)


# --- tome --------------------------------------------------------------------------------------


def test_tome_is_merging_inside_of_every_block():
    """Against blocks taken apart by hand, with clusters from a plain loop; sizes count tokens."""
    vit, x = timm_vit(init_values=0.5), images(batch=1)
    with expedite(vit, (0, 1, 2, 3), method="tome", keep=0.5):
        ours = run(vit, x)
    entering = []
    with vit.blocks[0].register_forward_pre_hook(lambda _, args: entering.append(args[0])):
        run(vit, x)
    with torch.no_grad():
        groups, y = [{i} for i in range(H * W)], entering[0]
        for number, block in enumerate(vit.blocks):
            cluster_sizes = torch.tensor([1.0, *(len(group) for group in groups)])
            keys = block.attn.qkv(block.norm1(y))[0, 1:].unflatten(1, (3, 4, 8))[:, 1].mean(1)
            keys = F.normalize(keys, dim=-1)
            y = y + block.ls1(
                block.attn(block.norm1(y), attn_mask=cluster_sizes.log()[None, None, None])
            )
            count = round(H * W * (1 - 0.5 * (number + 1) / 4))
            if number == 0:  # in the order of the method: to and fro
                order, _ = snake_order(SIZE, (14, 14), keys.device)
                keys, y = keys[order], torch.cat([y[:, :1], y[:, 1:][:, order]], dim=1)
                groups = [groups[i] for i in order.tolist()]
            merged = plain_matching(keys, cluster_sizes[1:], count, 1)
            rows = []
            for group in merged:
                members = sorted(group)
                share = cluster_sizes[1:][members] / cluster_sizes[1:][members].sum()
                rows.append((y[0, 1:][members] * share[:, None]).sum(0))
            groups = [set().union(*(groups[m] for m in group)) for group in merged]
            y = torch.cat([y[:, :1], torch.stack(rows)[None]], dim=1)
            y = y + block.ls2(block.mlp(block.norm2(y)))
        out = torch.empty(1, H * W, 32)
        for number, group in enumerate(groups):
            out[0, sorted(group)] = y[0, 1 + number]
        expected = vit.norm(torch.cat([y[:, :1], out], dim=1))
    assert error(ours, expected) < 1e-5


def test_tome_merges_equal_tokens_without_loss():
    vit = timm_vit(pos_embed="none")
    x = equal_in_pairs()
    plain = run(vit, x)
    with expedite(vit, 1, method="tome", keep=0.5):
        assert error(run(vit, x), plain) < 1e-5


def test_tome_needs_blocks_that_can_be_taken_apart():
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=2)
    with pytest.raises(ValueError, match="METHOD tome works inside of the blocks, .* Eva cannot"):
        expedite(eva, 1, method="tome", keep=0.5)


# --- density -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 17, 40])
def test_density_peaks_by_a_plain_loop(count):
    """Density from the five nearest, gap to the nearest denser one, centres by their product."""
    points = torch.randn(40, 3, dtype=torch.float64)
    distance = [[(p - q).square().sum().item() for q in points] for p in points]
    means = [sum(sorted(row)[1:6]) / 5 for row in distance]
    average = sum(means) / len(means)
    density = [torch.tensor(-m / average).exp().item() for m in means]
    gaps = []
    for i, row in enumerate(distance):
        denser = [d for j, d in enumerate(row) if density[j] > density[i]]
        gaps.append(min(denser) if denser else max(max(r) for r in distance))
    order = sorted(range(40), key=lambda i: density[i] * gaps[i], reverse=True)
    centres = order[:count]
    expected = [min(range(count), key=lambda c: row[centres[c]]) for row in distance]
    index = density_peaks(points.float()[None], count)[0]
    assert index.tolist() == expected


def test_density_runs_blocks_on_the_means_of_its_clusters():
    vit, x = timm_vit(), images(batch=1)
    before = []
    with vit.blocks[2].register_forward_pre_hook(lambda _, args: before.append(args[0])):
        run(vit, x)
    with expedite(vit, 2, method="density", keep=30):
        ours = run(vit, x)
    with torch.no_grad():
        tokens, block = before[0][0, 1:], vit.blocks[2]
        keys = block.attn.qkv(block.norm1(tokens)).unflatten(1, (3, 4, 8))[:, 1].mean(1)
        index = density_peaks(keys[None], 30)[0]
        clusters = torch.stack([tokens[index == c].mean(0) for c in range(30)])
        log_sizes = torch.cat([torch.ones(1), index.bincount(minlength=30).float()]).log()
        y = torch.cat([before[0][:, :1], clusters[None]], dim=1)
        for block in vit.blocks[2:]:
            y = block(y, attn_mask=log_sizes[None, None, None])
        expected = vit.norm(torch.cat([y[:, :1], y[:, 1:][:, index]], dim=1))
    assert error(ours, expected) < 1e-5


# --- windows with padding ----------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["clusters", "grid"])
@pytest.mark.parametrize("method", ["pool", "hard"])
@pytest.mark.parametrize("kind", ["detectron2_vit", "swin"])
def test_a_full_grid_in_padded_windows_is_the_plain_model(kind, method, positions):
    """Cells of padding alone keep their places, which relative positions look up."""
    if kind == "swin":
        model = D2SwinTransformer(
            embed_dim=16, depths=(2,), num_heads=(2,), window_size=4, out_features=["res2"]
        )
        side, x = 4, torch.randn(2, 3, 24, 36)
        model = perturbed(model)
    else:
        model, side, x = detectron2_vit(), 5, torch.randn(2, 3, 32, 48)
    settings = {"scope": "window", "method": method, "positions": positions}
    with torch.no_grad():
        plain = model(x)
        for alpha in (0, (0, 1)):
            with expedite(model, alpha, grid=(side, side), **settings):
                for name, out in model(x).items():
                    assert error(out, plain[name]) < 1e-5


def test_pool_rebuilds_tokens_between_cells_of_tokens_alone():
    """By a plain loop over the two nearest cells along each axis."""
    method = build_method(
        Settings(alpha=0, grid=(2, 2), method="pool", scope="window", residual=False),
        attention_window=4,
    )
    tokens = torch.randn(1, 6, 5, 3)  # windows of 4 x 4; the last cells hold padding alone
    reduced, record = method.reduce(tokens_of(tokens))
    refined = torch.randn_like(reduced.features)
    rebuilt = method.rebuild(refined, record)
    assert reduced.valid[0].tolist() == [[True, True, True, False]] * 3 + [[False] * 4]
    for row in range(6):
        for col in range(5):
            total, sum_ = 0.0, torch.zeros(3)
            for i in range(4):
                for j in range(4):
                    if (i // 2, j // 2) != (row // 4, col // 4) or not reduced.valid[0, i, j]:
                        continue
                    # Where a cell of two tokens has its middle, and border cells all beyond it.
                    at = [min(max(n % 4, 0.5), 2.5) for n in (row, col)]
                    middle = [2 * (n % 2) + 0.5 for n in (i, j)]
                    weight = 1.0
                    for here, there in zip(at, middle, strict=True):
                        weight *= max(0.0, 1 - abs(here - there) / 2)
                    total, sum_ = total + weight, sum_ + weight * refined[0, i, j]
            assert torch.allclose(rebuilt[0, row, col], sum_ / total, atol=1e-5)


# --- an image that is not finite ---------------------------------------------------------------

PAIRS = [
    (kind, scope, method)
    for kind, scope in [("timm", "map"), ("detectron2", "map"), ("detectron2", "window")]
    for method in METHOD_REGISTRY
    if kind == "timm" or not METHOD_REGISTRY[method].unstructured
]


@torch.no_grad()
@pytest.mark.parametrize("kind,scope,method", PAIRS)
def test_an_image_of_nan_spoils_no_other(kind, scope, method):
    model = timm_vit() if kind == "timm" else detectron2_vit()
    x = images(batch=3)
    x[1, 0, 5, 5] = float("nan")
    with expedite(model, (1, 2), method=method, scope=scope, **counts(method)):
        out, alone = (
            (o["last_feat"] if isinstance(o, dict) else o) for o in map(model, (x, x[::2]))
        )
    assert error(out[::2], alone) < 1e-5
    assert out[1].isnan().all()


def test_tome_needs_blocks_that_a_layout_takes_apart():
    swin = D2SwinTransformer(
        embed_dim=24, depths=(2, 2), num_heads=(1, 1), window_size=4, out_features=["res3"]
    )
    with pytest.raises(ValueError, match="METHOD tome works inside of the blocks, .*D2Swin"):
        expedite(swin, 2, method="tome", keep=0.5)
