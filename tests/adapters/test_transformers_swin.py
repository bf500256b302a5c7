"""Hugging Face's Swin, expedited: models, backbones, the segmenters that are built on them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from expedit_d2 import expedite
from expedit_d2.adapters import find_transformer
from expedit_d2.analysis.flops import count_flops
from support.tensors import maps_error as error

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install .[transformers]"
)
PATCH = 4
WINDOW = 4
# Every token its own cluster: nothing is lost.
IDENTITY = {"grid": (WINDOW, WINDOW), "scope": "window", "temperature": 1e6, "neighbors": 1}
MERGE = {"method": "merge", "keep": 0.5}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
KINDS = ("SwinModel", "SwinBackbone", "MaskFormerSwinBackbone")


def config_of(name: str = "Swin", **changes):
    settings = {
        "image_size": 128,
        "patch_size": PATCH,
        "embed_dim": 8,
        "depths": [2, 2, 4, 2],
        "num_heads": [2, 2, 4, 4],
        "window_size": WINDOW,
        "mlp_ratio": 2.0,
        "out_features": STAGES,
    }
    return getattr(transformers, f"{name}Config")(**(settings | changes))


def randomised(model: nn.Module) -> nn.Module:
    """Nothing in the model is zero, and its positions are large enough to matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if "bias_table" in name else 0.1))
    return model.eval()


def build(kind: str, implementation: str = "sdpa", **changes) -> nn.Module:
    name = kind.removesuffix("Backbone").removesuffix("Model")
    if name == "Swin":
        changes["attn_implementation"] = implementation
    return randomised(getattr(transformers, kind)(config_of(name, **changes)))


@pytest.fixture(params=KINDS)
def model(request) -> nn.Module:
    return build(request.param)


def images(size: tuple[int, int] = (128, 160), batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size)


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    out = model(x)
    return list(out.feature_maps) if hasattr(out, "feature_maps") else [out.last_hidden_state]


# --- nothing is lost where there is nothing to lose ------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "settings",
    [
        IDENTITY,
        IDENTITY | {"positions": "grid"},
        {"grid": (WINDOW, WINDOW), "scope": "window", "method": "hard"},
        {"method": "merge", "keep": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_tokens_is_the_plain_model(kind, settings, implementation):
    model = build(kind, implementation)
    for size in ((128, 128), (124, 140)):  # the windows divide the map, or not
        x = images(size, batch=1)
        expected = run(model, x)
        for alpha in (0, (5, 6)):
            with expedite(model, alpha, **settings):
                assert error(run(model, x), expected) < 1e-5


def constant_cells(cells: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Images whose tokens are equal within each cell: a random patch for each cell."""
    side = [s // PATCH for s in size]
    rows, cols = (torch.arange(n) * c // n for n, c in zip(side, cells, strict=True))
    patches = torch.randn(2, 3, *cells, PATCH, PATCH)[:, :, rows][:, :, :, cols]
    return patches.transpose(3, 4).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize("settings", [{"method": "hard"}, MERGE], ids=["hard", "merge"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_tokens_cluster_without_loss(kind, settings):
    """In stage 1 of 32 x 32 tokens; positions off, so that equal tokens stay equal."""
    model = build(kind, depths=[1, 1, 1, 1])
    for name, parameter in model.named_parameters():
        if "bias_table" in name:
            parameter.data.zero_()
    x = constant_cells((16, 16), (128, 128))
    expected = run(model, x)
    if settings["method"] == "hard":
        settings = settings | {"grid": (2, 2), "scope": "window"}
    with expedite(model, 0, **settings):
        assert error(run(model, x), expected) < 1e-5


@pytest.mark.parametrize("settings", [IDENTITY, {"method": "merge", "keep": 1.0}], ids=str)
def test_a_map_that_is_one_window_is_not_shifted(settings):
    """The model by itself drops the shift there; its backbone does not."""
    for kind in ("SwinModel", "SwinBackbone"):
        x = images((32, 32))  # 4 x 4 tokens in stage 2, which is one window; later ones have fewer
        model = build(kind, depths=[2, 2], num_heads=[2, 2], out_features=["stage1", "stage2"])
        expected = run(model, x)
        with expedite(model, 2, **settings):
            assert error(run(model, x), expected) < 1e-5


# --- it is the model's own code until tokens are reduced, and again afterwards -----------------


@torch.no_grad()
@pytest.mark.parametrize("settings", [{**IDENTITY, "grid": (2, 2)}, MERGE], ids=str)
def test_hidden_states_are_whole_maps(settings):
    model, x = build("SwinModel"), images()
    plain = model(x, output_hidden_states=True)
    with expedite(model, 5, **settings):
        out = model(x, output_hidden_states=True)
    for name in ("hidden_states", "reshaped_hidden_states"):
        for index, (actual, expected) in enumerate(
            zip(getattr(out, name), getattr(plain, name), strict=True)
        ):
            assert actual.shape == expected.shape
            assert torch.equal(actual, expected) == (index < 3)  # the model's own code until then


@pytest.mark.parametrize("settings", [{"budget": 0.8}, {"alpha": 5, **MERGE}], ids=str)
def test_remove_restores_everything(model, settings):
    x = images()
    expected, keys, modules = run(model, x), list(model.state_dict()), list(model.modules())
    attributes = [
        {name: copy.copy(value) for name, value in vars(module).items()} for module in modules
    ]
    with expedite(model, **settings):
        assert list(model.state_dict()) == keys
        assert error(run(model, x), expected) > 1e-4
    assert list(model.state_dict()) == keys
    assert list(model.modules()) == modules
    for module, before in zip(modules, attributes, strict=True):
        assert vars(module).keys() == before.keys()
        for name in ("_modules", "_forward_hooks", "_forward_pre_hooks", "_parameters"):
            assert dict(vars(module)[name]) == dict(before[name])
    assert all(map(torch.equal, run(model, x), expected))


# --- in use ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{**IDENTITY, "grid": (3, 3)}, MERGE], ids=str)
def test_images_of_a_batch_do_not_meet(model, settings):
    x = images(batch=3)
    with expedite(model, 5, **settings):
        together = run(model, x)
        alone = [
            torch.cat(maps) for maps in zip(*(run(model, image[None]) for image in x), strict=True)
        ]
    assert error(together, alone) < 1e-5


@pytest.mark.parametrize(
    "settings", [{**IDENTITY, "grid": (3, 3)}, {"method": "merge", "keep": 0.9}], ids=str
)
def test_bfloat16_stays_near(model, settings):
    x = images()
    with expedite(model, 5, **settings):
        expected = run(model, x)
        model.to(torch.bfloat16)
        actual = run(model, x.to(torch.bfloat16))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16 and torch.isfinite(a).all()
        assert ((a.float() - e).norm() / e.norm()).item() < 0.2


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = model(x)
    sum(m.square().mean() for m in getattr(out, "feature_maps", out[:1])).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("settings", [{**IDENTITY, "grid": (3, 3)}, MERGE], ids=str)
def test_gradient_checkpointing_changes_nothing(model, settings):
    """The stages checkpoint themselves, and so run their blocks again."""
    x = images()
    for module in model.modules():
        if hasattr(module, "drop_path"):  # at random in training
            module.drop_path = nn.Identity()
    with expedite(model, (5, 6), **settings):
        expected = gradients(model, x)
        model.train().gradient_checkpointing_enable()
        actual = gradients(model, x)
    assert error(actual, expected) < 1e-4


def test_copies(model):
    x = images()
    with expedite(model, 5, **MERGE):
        expected = run(model, x)
        copied = copy.deepcopy(model)
    assert all(map(torch.equal, run(copied, x), expected))


@pytest.mark.slow
def test_compiles_without_a_break():
    # The stage that is reduced has a block of either kind after the first reduced one.
    model, x = build("SwinBackbone", depths=[1, 1, 3, 1]), images()
    for settings in ({**IDENTITY, "grid": (3, 3)}, MERGE):
        torch._dynamo.reset()
        with expedite(model, 2, **settings):
            expected = run(model, x)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            assert error(run(compiled, x), expected) < 1e-5
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SwinBackbone", "MaskFormerSwinBackbone"])
def test_the_budget_is_met(kind):
    sizes = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]}
    model, x = build(kind, **sizes, window_size=8, image_size=256), images((256, 256), batch=1)
    plain = count_flops(model, x)
    with expedite(model, budget=0.7):
        assert 0.66 < count_flops(model, x).blocks / plain.blocks < 0.74


@pytest.mark.parametrize("kind", KINDS)
def test_other_parts_are_refused_with_versions_that_fit(kind):
    model = build(kind)
    del find_transformer(model).whole.encoder.layers[2].blocks[1].layernorm_after
    with pytest.raises(ValueError, match=r"SwinModel of transformers .*; transformers>=5"):
        expedite(model, 1, **MERGE)


def test_attention_weights_are_refused():
    model = build("SwinModel", "eager")
    with expedite(model, 5, **MERGE), pytest.raises(ValueError, match="output_attentions"):
        model(images(), output_attentions=True)
