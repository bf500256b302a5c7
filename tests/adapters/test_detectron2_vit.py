"""Detectron2's ViT, expedited: exactness, several alphas, data types, gradients."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import SimpleFeaturePyramid
from torch import Tensor

from expedit_d2 import expedite
from support.detectron2_vit import features, mean_position, tiny_vit
from support.tensors import IDENTITY, constant_cells, distance, error
from support.vits import PATCH, images


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
@pytest.mark.slow
def test_compiles_without_a_break(scope, grid):
    torch._dynamo.reset()
    vit, x = tiny_vit(depth=3), images((20, 16), batch=1)
    with expedite(vit, 1, grid=grid, scope=scope):
        expected = features(vit, x)
        compiled = torch.compile(vit, fullgraph=True, backend="eager")
        assert error(features(compiled, x), expected) < 1e-5
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
