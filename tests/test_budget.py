"""BUDGET: the settings that follow, and what they cost by an exact count."""

from __future__ import annotations

import pytest
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import ViT
from torch import nn

from expedit_d2 import expedite
from expedit_d2.adapters import find_transformer
from expedit_d2.analysis.flops import count_flops
from expedit_d2.backbones.d2_vit import D2ViT
from expedit_d2.backbones.swin import D2SwinTransformer
from expedit_d2.budget import Costs, within_budget
from expedit_d2.projects import get_cfg
from expedit_d2.settings import Settings
from support.vits import images, timm_vit
from support.vits import run_timm as run


def vit_b(**kwargs) -> nn.Module:
    """A plain ViT of some width: the operators are a small part, as in use."""
    sizes = {"img_size": (192, 256), "embed_dim": 384, "depth": 6, "num_heads": 6}
    return timm.create_model("vit_small_patch16_224", num_classes=0, **sizes, **kwargs).eval()


def vitdet(**changes) -> nn.Module:
    settings = {
        "img_size": 256,
        "patch_size": 16,
        "embed_dim": 96,
        "depth": 8,
        "num_heads": 3,
        "window_size": 8,
        "window_block_indexes": (0, 1, 2, 4, 5, 6),
        "use_rel_pos": True,
        "drop_path_rate": 0.0,
    }
    return ViT(**(settings | changes)).eval()


def share_spent(model: nn.Module, x: torch.Tensor, **settings) -> float:
    """The share of the blocks' FLOPs that is left, by fvcore."""
    plain = count_flops(model, x)
    with expedite(model, **settings):
        return count_flops(model, x).blocks / plain.blocks


@pytest.mark.parametrize("budget", [0.55, 0.7])
def test_the_budget_is_met_on_a_plain_vit(budget):
    vit, x = vit_b(), torch.randn(1, 3, 192, 256)
    plain = count_flops(vit, x).blocks
    for method in (None, "merge", "tome", "density", "expedit", "pool", "hard"):
        with expedite(vit, budget=budget, method=method):
            share = count_flops(vit, x).blocks / plain
        # Distances of all pairs, for density peaks, come on top.
        assert budget - 0.04 < share < budget + 0.04, method


@pytest.mark.parametrize("budget", [0.6, 0.8])
def test_the_budget_is_met_with_windows(budget):
    share = share_spent(vitdet(), torch.randn(1, 3, 256, 256), budget=budget)
    assert budget - 0.04 < share < budget + 0.04
    # A window has a whole number of clusters along its side, and there may be fewer than allowed.
    share = share_spent(vitdet(), torch.randn(1, 3, 256, 256), budget=budget, method="expedit")
    assert budget - 0.12 < share < budget + 0.04


def test_the_budget_is_for_the_images_of_the_config():
    """Global attention weighs less on small images; without relative positions only the config
    says how large they are."""
    cfg = get_cfg()
    sizes = {"IMG_SIZE": 256, "EMBED_DIM": 96, "DEPTH": 8, "NUM_HEADS": 3, "WINDOW_SIZE": 8}
    for key, value in sizes.items():
        cfg.MODEL.VIT[key] = value
    cfg.MODEL.VIT.WINDOW_BLOCK_INDEXES = [0, 1, 2, 4, 5, 6]
    cfg.MODEL.VIT.USE_REL_POS = False
    net = D2ViT(cfg, ShapeSpec(channels=3)).eval()
    share = share_spent(net, torch.randn(1, 3, 256, 256), budget=0.6)
    assert 0.56 < share < 0.64


@pytest.mark.parametrize("window", [14, 16])
def test_the_budget_is_met_where_windows_are_padded(window):
    """14 does not divide 64 tokens, as in ViTDet: a fifth of the tokens in windows is padding."""
    sizes = {"patch_size": 4, "embed_dim": 192, "depth": 4}
    model = vitdet(**sizes, window_size=window, window_block_indexes=(0, 1, 2))
    share = share_spent(model, torch.randn(1, 3, 256, 256), budget=0.6)
    assert 0.56 < share < 0.64


def test_the_budget_is_met_on_a_swin():
    swin = D2SwinTransformer(
        embed_dim=48, depths=(2, 2, 6, 2), num_heads=(2, 2, 4, 8), window_size=8, drop_path_rate=0.0
    ).eval()
    share = share_spent(swin, torch.randn(1, 3, 256, 256), budget=0.8)
    assert 0.76 < share < 0.84
    with expedite(swin, budget=0.8) as handle:
        assert handle.settings.method == "merge"
        assert 4 <= min(handle.settings.alphas) and max(handle.settings.alphas) < 10
    share = share_spent(swin, torch.randn(1, 3, 256, 256), budget=0.8, method="expedit")
    assert 0.68 < share < 0.84
    with expedite(swin, budget=0.8, method="expedit") as handle:
        assert 4 <= handle.settings.alpha < 10 and handle.settings.scope == "window"


def test_costs_of_a_plain_model_are_those_that_fvcore_counts():
    for model, x in ((vit_b(), (192, 256)), (vitdet(), (256, 256))):
        spec = find_transformer(model)
        counted = count_flops(model, torch.randn(1, 3, *x)).blocks
        # Norms, class tokens and relative positions are not reckoned.
        assert Costs.of(spec).total == pytest.approx(counted, rel=0.05)


def test_what_is_chosen():
    spec = find_transformer(vit_b())
    merge = within_budget(Settings(budget=0.5), spec)
    assert (merge.method, merge.alphas, merge.budget) == ("merge", (0, 1, 3, 4), None)
    assert within_budget(Settings(budget=0.4), spec).keep < merge.keep
    # Late where the clusters stay many enough, else earlier.
    grids = [within_budget(Settings(budget=b, method="expedit"), spec) for b in (0.75, 0.5)]
    assert grids[0].alpha == 3 and grids[1].alpha < 3
    assert min(setting.ratio for setting in grids) >= 0.6
    merge = within_budget(Settings(budget=0.5), find_transformer(vitdet()))
    assert (merge.method, merge.alphas) == ("merge", (0, 1, 2, 4, 5, 6))
    windows = within_budget(Settings(budget=0.8, method="expedit"), find_transformer(vitdet()))
    assert (windows.method, windows.scope) == ("expedit", "window")
    assert windows.grid[0] == windows.grid[1] < 8


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 24])
def test_merges_are_spread_over_any_depth(depth):
    spec = find_transformer(timm_vit(depth=depth))
    alphas = within_budget(Settings(budget=0.7), spec).alphas
    assert alphas[0] == 0 and alphas[-1] < depth
    assert len(alphas) == min(depth, 4)
    gaps = [later - earlier for earlier, later in zip(alphas, (*alphas[1:], depth), strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_other_settings_stay():
    chosen = within_budget(
        Settings(budget=0.5, rounds=3, size_aware=False), find_transformer(vit_b())
    )
    assert (chosen.rounds, chosen.size_aware) == (3, False)


def test_a_budget_in_one_argument():
    vit, x = timm_vit(), images()
    plain = run(vit, x)
    with expedite(vit, budget=0.6) as handle:
        assert handle.settings.method == "merge"
        out = run(vit, x)
    assert out.shape == plain.shape and not torch.equal(out, plain)
    assert torch.equal(run(vit, x), plain)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"budget": 0}, r"BUDGET must be a share .* got 0"),
        ({"budget": 1.2}, r"BUDGET must be a share .* got 1.2"),
        ({"budget": "half"}, r"BUDGET must be a share .* got 'half'"),
        ({"budget": 0.5, "ratio": 0.7}, "BUDGET chooses RATIO by itself"),
        ({"budget": 0.5, "method": "merge", "keep": 0.7}, "BUDGET chooses KEEP by itself"),
    ],
)
def test_budgets_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": (0, 1, 2, 3, 4, 5)},
        {"alpha": 1, "method": "merge"},
        {"alpha": (1, 3), "method": "tome"},
        {"alpha": 2, "method": "expedit"},
        {"alpha": 1, "method": "density"},
    ],
)
def test_a_given_alpha_stays(settings):
    vit, x = vit_b(), torch.randn(1, 3, 192, 256)
    with expedite(vit, budget=0.7, **settings) as handle:
        assert handle.settings.alpha in (settings["alpha"], (settings["alpha"],))
        assert handle.settings.budget is None
    assert 0.66 < share_spent(vit, x, budget=0.7, **settings) < 0.74


def test_a_given_alpha_names_the_stage():
    swin = D2SwinTransformer(
        embed_dim=48, depths=(2, 4, 6, 2), num_heads=(2, 2, 4, 8), window_size=8, drop_path_rate=0.0
    ).eval()
    x = torch.randn(1, 3, 256, 256)
    assert 0.86 < share_spent(swin, x, budget=0.9, alpha=(2, 3)) < 0.94
    windows = within_budget(
        Settings(budget=0.85, alpha=3, method="expedit"), find_transformer(swin)
    )
    assert (windows.alpha, windows.scope) == (3, "window")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"alpha": (1, 6)}, r"ALPHA must be in 0 to 5 .* got 6"),
        ({"alpha": 6, "method": "expedit"}, r"ALPHA must be in 0 to 5 .* got 6"),
        # One matching merges half of the tokens at most.
        ({"alpha": 0, "method": "tome"}, r"above 0\.5\d .* with ALPHA 0, got 0.5"),
        ({"alpha": (1, 2), "method": "pool"}, r"METHOD pool takes one ALPHA, got \(1, 2\)"),
        ({"alpha": 5}, r"BUDGET must be above 0\.8\d .* with ALPHA 5, got 0.5"),
        ({"alpha": 5, "method": "expedit"}, r"above 0\.8\d .* with ALPHA 5, got 0.5"),
    ],
)
def test_a_given_alpha_that_does_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        expedite(vit_b(), budget=0.5, **settings)


def test_a_method_that_costs_more_than_the_blocks():
    sizes = {"patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 1, "window_size": 4}
    tiny = vitdet(**sizes, window_block_indexes=(0, 1), use_rel_pos=False)
    with pytest.raises(ValueError, match="no BUDGET fits this transformer with METHOD tome"):
        expedite(tiny, budget=0.5, method="tome")


def test_a_budget_that_cannot_be_met():
    swin = D2SwinTransformer(
        embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 1, 2, 4), window_size=4
    )
    with pytest.raises(ValueError, match=r"BUDGET must be above 0\.\d+ .* got 0.2"):
        expedite(swin, budget=0.2)
