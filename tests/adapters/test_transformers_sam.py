"""Hugging Face's SAM and SAM-HQ encoders, expedited: alone, in their models, hidden states."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from expedit_d2 import expedite, fuse_attention
from expedit_d2.adapters import find_transformer
from expedit_d2.analysis.flops import count_flops
from support.tensors import maps_error as error

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install .[transformers]"
)
PATCH = 4
SIDE = 10  # tokens along the sides of the map
# Every token its own cluster: nothing is lost.
IDENTITY = {"temperature": 1e6, "neighbors": 1}
KINDS = ("Sam", "SamHQ")


def config_of(kind: str, **changes):
    settings = {
        "image_size": SIDE * PATCH,
        "patch_size": PATCH,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "mlp_dim": 64,
        "output_channels": 16,
        "window_size": 7,
        "global_attn_indexes": [1, 3],
        "attn_implementation": "sdpa",
    }
    return getattr(transformers, f"{kind}VisionConfig")(**(settings | changes))


def randomised(model: nn.Module) -> nn.Module:
    """Nothing in the model is zero, and its positions are large enough to matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if "rel_pos" in name else 0.1))
    return model.eval()


def build(kind: str, **changes) -> nn.Module:
    return randomised(getattr(transformers, f"{kind}VisionModel")(config_of(kind, **changes)))


@pytest.fixture(params=KINDS)
def model(request) -> nn.Module:
    return build(request.param)


def images(size: tuple[int, int] = (SIDE, SIDE), batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size[0] * PATCH, size[1] * PATCH)


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The map, and in SAM-HQ the outputs of the global layers."""
    out = model(x)
    return [out.last_hidden_state, *(getattr(out, "intermediate_embeddings", None) or ())]


# --- nothing is lost where there is nothing to lose ------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "settings",
    [
        {"grid": (SIDE, SIDE), **IDENTITY},
        {"grid": (SIDE, SIDE), "positions": "grid", **IDENTITY},
        {"grid": (7, 7), "scope": "window", **IDENTITY},
        {"grid": (SIDE, SIDE), "method": "hard"},
        {"grid": (SIDE, SIDE), "method": "pool"},
        {"keep": 1.0, "method": "density"},
        {"keep": 1.0, "method": "merge"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_tokens_is_the_plain_model(kind, settings, implementation):
    model, x = build(kind, attn_implementation=implementation), images(batch=3)
    expected = run(model, x)
    for alpha in (0, 3, (0, 2), (0, 1, 2, 3)):
        with expedite(model, alpha, **settings):
            assert error(run(model, x), expected) < 1e-5


def test_tome_on_all_tokens_is_the_plain_model():
    # ToMe merges equally many tokens in every window.
    model, x = build("Sam", window_size=5), images()
    expected = run(model, x)
    for alpha in (0, (0, 1, 2, 3)):
        with expedite(model, alpha, method="tome", keep=1.0):
            assert error(run(model, x), expected) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rel_pos": False},
        {"use_abs_pos": False},
        {"qkv_bias": False},
        {"window_size": 0},
        {"global_attn_indexes": []},
    ],
    ids=str,
)
@pytest.mark.parametrize("settings", [{"grid": (SIDE, SIDE), **IDENTITY}, {"keep": 1.0}], ids=str)
def test_other_architectures(changes, settings):
    model, x = build("SamHQ", **changes), images()
    expected = run(model, x)
    with expedite(model, 1, method="merge" if "keep" in settings else "expedit", **settings):
        assert error(run(model, x), expected) < 1e-5


@pytest.mark.parametrize("size", [(5, 6), (14, 7)])
def test_other_sizes(model, size):
    """The encoder takes images of its own size alone; its layers take any map."""
    encoder = model.vision_encoder
    encoder.patch_embed.image_size = tuple(PATCH * side for side in size)
    encoder.pos_embed = None
    x = images(size)
    expected = run(model, x)
    with expedite(model, 1, grid=size, **IDENTITY):
        assert error(run(model, x), expected) < 1e-5
    with expedite(model, (0, 2), method="merge", keep=1.0):
        assert error(run(model, x), expected) < 1e-5


def constant_cells(grid: tuple[int, int]) -> Tensor:
    """Images whose tokens are equal within each cell of the grid: a random patch for each cell."""
    rows, cols = (torch.arange(SIDE) * g // SIDE for g in grid)
    patches = torch.randn(2, 3, *grid, PATCH, PATCH)[:, :, rows][:, :, :, cols]
    return patches.transpose(3, 4).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize(
    "settings,cells",
    [
        ({"grid": (4, 4), "temperature": 1e4, "neighbors": 1}, (4, 4)),
        ({"grid": (2, 2), "scope": "window", "method": "hard"}, (4, 4)),
        ({"keep": 0.5, "method": "merge"}, (5, 5)),
    ],
    ids=str,
)
def test_equal_tokens_cluster_without_loss(model, settings, cells):
    model = build("Sam", use_abs_pos=False, use_rel_pos=False, window_size=5)
    x = constant_cells(cells)
    expected = run(model, x)
    with expedite(model, 0, **settings):
        assert error(run(model, x), expected) < 1e-5
    with expedite(model, 0, size_aware=False, **settings):
        assert error(run(model, x), expected) > 1e-3


# --- it is the model's own code until tokens are reduced, and again afterwards -----------------


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"grid": (4, 4)}, {"method": "merge", "keep": 0.5}], ids=str)
def test_hidden_states_are_whole_maps(model, settings):
    x = images()
    plain = model(x, output_hidden_states=True)
    with expedite(model, 2, **settings):
        out, alone = model(x, output_hidden_states=True), run(model, x)
        model.config.output_hidden_states = True
        by_config = model(x).hidden_states
    assert len(out.hidden_states) == len(by_config) == 5
    for index, (actual, again, expected) in enumerate(
        zip(out.hidden_states, by_config, plain.hidden_states, strict=True)
    ):
        assert torch.equal(actual, again) and actual.shape == expected.shape
        assert torch.equal(actual, expected) == (index <= 2)  # the model's own code until then
    assert torch.equal(out.last_hidden_state, alone[0])  # whatever is recorded besides


@torch.no_grad()
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_the_layers_that_sam_hq_reads_are_whole_maps(keep):
    """Those before alpha are the model's own."""
    model, x = build("SamHQ"), images()
    plain = model(x).intermediate_embeddings
    with expedite(model, 2, method="merge", keep=keep):
        own, merged = model(x).intermediate_embeddings
    assert torch.equal(own, plain[0])
    assert (error([merged], [plain[1]]) < 1e-5) == (keep == 1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 0.5},
        {"budget": 0.7, "method": "expedit"},
        {"alpha": 1, "grid": (3, 3), "scope": "window", "fused_attention": True},
    ],
    ids=str,
)
def test_remove_restores_everything(model, settings):
    x = images()
    with torch.no_grad():  # the library's own hooks are installed at this call
        model(x, output_hidden_states=True)
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


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_in_the_whole_model(kind):
    """Masks from prompts; keeping all tokens loses nothing, fewer do."""
    sizes = {"hidden_size": 16, "image_size": SIDE * PATCH, "patch_size": PATCH}
    decoder = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_dim": 32,
        "iou_head_hidden_dim": 16,
    }
    if kind == "SamHQ":
        decoder["vit_dim"] = 32
    config = getattr(transformers, f"{kind}Config")(
        vision_config=config_of(kind, num_pos_feats=8).to_dict(),
        prompt_encoder_config=sizes | {"mask_input_channels": 4},
        mask_decoder_config=decoder,
    )
    model = randomised(getattr(transformers, f"{kind}Model")(config))
    inputs = {
        "pixel_values": images(),
        "input_points": torch.tensor([[[[9.0, 12.0]]]]).repeat(2, 1, 1, 1),
        "input_labels": torch.ones(2, 1, 1, dtype=torch.long),
    }
    plain = model(**inputs).pred_masks
    assert find_transformer(model).owner is model.vision_encoder
    with expedite(model, (0, 2), method="merge", keep=1.0):
        assert error([model(**inputs).pred_masks], [plain]) < 1e-4
    with expedite(model, budget=0.5):
        assert error([model(**inputs).pred_masks], [plain]) > 1e-3
    assert torch.equal(model(**inputs).pred_masks, plain)


# In windows ToMe and the grid have their own limits.
@pytest.mark.parametrize("window,methods", [(0, [None, "tome", "expedit"]), (8, [None])])
def test_the_budget_is_met(window, methods):
    sizes = {"image_size": 256, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 8}
    changes = {"num_attention_heads": 3, "mlp_dim": 768, "global_attn_indexes": [3, 7]}
    model, x = build("Sam", **sizes, **changes, window_size=window), torch.randn(1, 3, 256, 256)
    plain = count_flops(model, x)
    for method in methods:
        with expedite(model, budget=0.5, method=method):
            assert 0.46 < count_flops(model, x).blocks / plain.blocks < 0.54, method


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_fused_attention_is_the_models_own(implementation):
    model, x = build("Sam", attn_implementation=implementation), images()
    expected = run(model, x)
    with fuse_attention(model):
        assert error(run(model, x), expected) < 1e-5
    assert all(map(torch.equal, run(model, x), expected))


@pytest.mark.parametrize(
    "settings",
    [{"grid": (5, 5)}, {"grid": (4, 4), "scope": "window"}, {"method": "merge", "keep": 0.9}],
    ids=str,
)
def test_bfloat16_stays_near(model, settings):
    x = images()
    with expedite(model, 1, **settings):
        expected = run(model, x)
        model.to(torch.bfloat16)
        actual = run(model, x.to(torch.bfloat16))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16 and torch.isfinite(a).all()
        assert ((a.float() - e).norm() / e.norm()).item() < 0.2


def test_images_of_a_batch_do_not_meet(model):
    x = images(batch=3)
    for settings in ({"grid": (4, 5)}, {"method": "merge", "keep": 0.5}):
        with expedite(model, 1, **settings):
            together = run(model, x)
            alone = [
                torch.cat(maps) for maps in zip(*(run(model, i[None]) for i in x), strict=True)
            ]
        assert error(together, alone) < 1e-5


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    target = torch.randn(16, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    (model(x).last_hidden_state * target).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("settings", [{"ratio": 0.6}, {"method": "merge", "keep": 0.5}], ids=str)
def test_gradient_checkpointing_changes_nothing(model, settings):
    """The layers checkpoint themselves, on what tokens are left."""
    x = images()
    with expedite(model, (1, 2), **settings):
        expected = gradients(model, x)
        assert all(gradient.abs().sum() > 0 for gradient in expected)
        model.train().gradient_checkpointing_enable()
        actual = gradients(model, x)
    assert error(actual, expected) < 1e-4


def test_copies_and_pickles(model):
    x = images()
    with expedite(model, 1, method="merge", keep=0.5):
        expected = run(model, x)
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert all(map(torch.equal, run(copied, x), expected))
    assert all(map(torch.equal, run(pickled, x), expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_compiles_without_a_break(kind):
    model, x = build(kind, num_hidden_layers=3), images()
    for settings in ({"grid": (4, 4)}, {"method": "merge", "keep": 0.5}):
        torch._dynamo.reset()
        with expedite(model, 1, **settings):
            expected = run(model, x)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            assert error(run(compiled, x), expected) < 1e-5
    torch._dynamo.reset()


def test_other_parts_are_refused_with_versions_that_fit(model):
    del model.vision_encoder.layers[2].attn.qkv
    with pytest.raises(ValueError, match=r"VisionEncoder of transformers .*; transformers>=5"):
        expedite(model, 1, grid=(4, 4))
