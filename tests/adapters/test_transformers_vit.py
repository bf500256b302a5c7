"""Hugging Face's ViT, DINOv2 and DINOv3, expedited: models, backbones, hidden states."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

from expedit_d2 import expedite, fuse_attention
from expedit_d2.adapters import find_transformer
from expedit_d2.analysis.flops import count_flops
from support.tensors import IDENTITY, constant_cells, error, perturbed

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install .[transformers]"
)
PATCH = 4
SIDE = 8  # tokens along the sides of the model's own map
KINDS = {
    "ViT": {},
    "Dinov2": {"mlp_ratio": 2, "layerscale_value": 0.5},
    "Dinov2 SwiGLU": {"mlp_ratio": 2, "use_swiglu_ffn": True},
    "Dinov2WithRegisters": {"mlp_ratio": 2, "num_register_tokens": 4},
    "DINOv3ViT": {"num_register_tokens": 3},
    "DINOv3ViT gated": {"num_register_tokens": 0, "use_gated_mlp": True},
    "Beit": {"use_relative_position_bias": True, "drop_path_rate": 0.0},
    "Beit shared": {
        "use_shared_relative_position_bias": True,
        "use_absolute_position_embeddings": True,
        "drop_path_rate": 0.0,
    },
}
#: Those that embed images of any size.
RESIZED = [kind for kind in KINDS if kind != "ViT"]
BACKBONES = [kind for kind in KINDS if kind != "ViT"]


def config_of(kind: str, **changes):
    settings = {
        "image_size": SIDE * PATCH,
        "patch_size": PATCH,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "attn_implementation": "sdpa",
    }
    return getattr(transformers, f"{kind.split()[0]}Config")(**(settings | KINDS[kind] | changes))


def build(kind: str, part: str = "Model", **changes) -> nn.Module:
    """A random model; nothing in it is zero."""
    model = perturbed(getattr(transformers, kind.split()[0] + part)(config_of(kind, **changes)))
    for name, parameter in model.named_parameters():
        if "position_bias" in name:  # large enough to matter
            parameter.data.normal_()
    return model


@pytest.fixture(params=KINDS)
def model(request) -> nn.Module:
    return build(request.param)


def images(size: tuple[int, int] = (SIDE, SIDE), batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size[0] * PATCH, size[1] * PATCH)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).last_hidden_state


# --- nothing is lost where there is nothing to lose ------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["expedit", "hard", "merge", "tome"])
def test_keeping_all_tokens_is_the_plain_model(model, method, implementation):
    model.set_attn_implementation(implementation)
    x = images(batch=3)
    expected = run(model, x)
    settings = {"keep": 1.0} if method in ("merge", "tome") else {"grid": (SIDE, SIDE)}
    if method == "expedit":
        settings |= IDENTITY
    for alpha in (0, 1, 3, (0, 2), (0, 1, 2, 3)):
        with expedite(model, alpha, method=method, **settings):
            assert error(run(model, x), expected) < 1e-5


@pytest.mark.parametrize("size", [(5, 9), (10, 8), (3, 3), (1, 4)])
@pytest.mark.parametrize("kind", RESIZED)
def test_other_sizes(kind, size):
    model, x = build(kind), images(size)
    expected = run(model, x)
    with expedite(model, 1, grid=size, **IDENTITY):
        assert error(run(model, x), expected) < 1e-5
    with expedite(model, (0, 2), method="merge", keep=1.0):
        assert error(run(model, x), expected) < 1e-5


def test_other_sizes_of_a_vit_with_its_positions_interpolated():
    model, x = build("ViT"), images((5, 9))
    with torch.no_grad():
        expected = model(x, interpolate_pos_encoding=True).last_hidden_state
        with expedite(model, 1, grid=(5, 9), **IDENTITY):
            actual = model(x, interpolate_pos_encoding=True).last_hidden_state
    assert error(actual, expected) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "settings",
    [
        {"grid": (3, 4), "temperature": 1e4, "neighbors": 1},
        {"grid": (3, 4), "method": "hard"},
        {"keep": 0.5, "method": "merge"},
        {"keep": 0.6, "method": "tome"},
    ],
    ids=str,
)
def test_equal_tokens_cluster_without_loss(model, settings, implementation):
    """Class and register tokens attend to as many tokens as there were before."""
    model.set_attn_implementation(implementation)
    x = constant_cells((SIDE, SIDE), settings.get("grid", (4, 4)))
    with torch.no_grad():  # tokens are equal only without positions
        for name, parameter in model.named_parameters():
            if "position_embeddings" in name or "position_bias" in name:
                parameter.zero_()
        if hasattr(model, "rope_embeddings"):
            model.rope_embeddings.inv_freq.zero_()
    expected = run(model, x)
    with expedite(model, 0, **settings):
        assert error(run(model, x), expected) < 1e-5
    with expedite(model, 0, size_aware=False, **settings):
        assert error(run(model, x), expected) > 1e-3


def test_clusters_turn_by_their_mean_positions():
    """Tokens of one feature and several places: a reference with the layer's own parts."""
    model, x = build("DINOv3ViT"), images()
    first = model.model.layer[0]
    seen = []
    first.register_forward_hook(lambda module, args, out: seen.append(out))
    with expedite(model, 1, method="merge", keep=0.5, residual=False) as handle, torch.no_grad():
        reduce = handle.blocks.methods["after_1"].reduce
        reduce.register_forward_hook(lambda module, args, out: seen.append(out))
        actual = model(x).last_hidden_state
    before, (tokens, record) = seen
    places = tokens.positions
    coordinates = 2 * (places + 0.5) / SIDE - 1  # (B, M, 2)
    angles = torch.cat(
        [
            2 * torch.pi * coordinates[..., i : i + 1] * model.rope_embeddings.inv_freq
            for i in (0, 1)
        ],
        dim=-1,
    )
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    mask = torch.cat([torch.zeros(2, 4), tokens.sizes.log()], dim=1)[:, None, None]
    y = torch.cat([before[:, :4], tokens.features], dim=1)
    with torch.no_grad():
        for layer in model.model.layer[1:]:
            y = layer(y, attention_mask=mask, position_embeddings=(angles.cos(), angles.sin()))
        maps = y[:, 4:].gather(1, record.index[..., None].expand(-1, -1, 32))
        expected = model.norm(torch.cat([y[:, :4], maps], dim=1))
    assert error(actual, expected) < 1e-5


# --- hidden states and backbones -------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0, 2])
@pytest.mark.parametrize("settings", [{"grid": (4, 4)}, {"method": "merge", "keep": 0.5}], ids=str)
def test_hidden_states_are_whole_maps(model, alpha, settings):
    x = images()
    plain = model(x, output_hidden_states=True)
    with expedite(model, alpha, **settings):
        out = model(x, output_hidden_states=True)
        last = run(model, x)
        model.config.output_hidden_states = True
        by_config = model(x).hidden_states
    assert len(out.hidden_states) == len(by_config) == 5
    for index, (actual, again, expected) in enumerate(
        zip(out.hidden_states, by_config, plain.hidden_states, strict=True)
    ):
        assert torch.equal(again, actual)
        if index <= alpha:  # the model's own code until then
            assert torch.equal(actual, expected)
        else:
            assert error(actual, expected) > 1e-4
    assert torch.equal(out.last_hidden_state, last)  # whatever is recorded besides


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"grid": (SIDE, SIDE), **IDENTITY}, {"keep": 1.0}], ids=str)
def test_keeping_all_tokens_keeps_every_hidden_state(model, settings):
    x = images()
    plain = model(x, output_hidden_states=True).hidden_states
    with expedite(model, (0, 2), method="merge" if "keep" in settings else None, **settings):
        ours = model(x, output_hidden_states=True).hidden_states
    for actual, expected in zip(ours, plain, strict=True):
        assert error(actual, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", BACKBONES)
def test_feature_maps_of_backbones(kind):
    model = build(kind, "Backbone", out_features=["stem", "stage1", "stage3", "stage4"])
    x = images((6, 9))
    plain = model(x).feature_maps
    with expedite(model, 2, method="merge", keep=0.5):
        fewer = model(x).feature_maps
    with expedite(model, 2, method="merge", keep=1.0):
        same = model(x).feature_maps
    for index, (a, b, c) in enumerate(zip(plain, fewer, same, strict=True)):
        assert a.shape == b.shape == (2, 32, 6, 9)
        assert error(c, a) < 1e-5
        assert torch.equal(a, b) if index < 2 else error(b, a) > 1e-4
    for again, a in zip(model(x).feature_maps, plain, strict=True):
        assert torch.equal(again, a)


@torch.no_grad()
def test_inside_depth_anything():
    backbone = config_of("Dinov2", out_features=["stage1", "stage2", "stage3", "stage4"])
    backbone.reshape_hidden_states = False
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=PATCH,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 16, 16, 16],
        fusion_hidden_size=8,
        head_hidden_size=4,
        depth_estimation_type="metric",
        max_depth=10,
    )
    model, x = transformers.DepthAnythingForDepthEstimation(config).eval(), images((6, 9))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    plain = model(x).predicted_depth
    with expedite(model, budget=0.5):
        fewer = model(x).predicted_depth
    with expedite(model, 1, method="merge", keep=1.0):
        assert error(model(x).predicted_depth, plain) < 1e-4
    assert fewer.shape == plain.shape and not torch.equal(fewer, plain)
    assert torch.equal(model(x).predicted_depth, plain)


# --- it is the model's own code again afterwards -----------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"budget": 0.5}, {"budget": 0.7, "method": "expedit", "fused_attention": True}]
)
def test_remove_restores_everything(model, settings):
    whole, x = nn.ModuleDict({"backbone": model}), images()
    with torch.no_grad():  # the library's own hooks are installed at this call
        states = model(x, output_hidden_states=True).hidden_states
    keys, modules = list(whole.state_dict()), list(whole.modules())
    attributes = [
        {name: copy.copy(value) for name, value in vars(module).items()} for module in modules
    ]
    with expedite(whole, **settings) as handle:
        assert type(model).__name__ in repr(handle)
        assert list(whole.state_dict()) == keys
        assert error(run(model, x), run_plain(model, handle, x)) > 1e-5
    assert list(whole.state_dict()) == keys
    assert list(whole.modules()) == modules
    for module, before in zip(modules, attributes, strict=True):
        assert vars(module).keys() == before.keys()
        for name in ("_modules", "_forward_hooks", "_forward_pre_hooks", "_parameters"):
            assert dict(vars(module)[name]) == dict(before[name])
    with torch.no_grad():
        again = model(x, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, again, states))


def run_plain(model: nn.Module, handle, x: Tensor) -> Tensor:
    """The same weights in a plain model."""
    plain = type(model)(model.config).eval()
    plain.load_state_dict(model.state_dict())
    return run(plain, x)


def test_attention_is_fused_already(model):
    x = images()
    expected = run(model, x)
    with fuse_attention(model):
        assert torch.equal(run(model, x), expected)
    assert find_transformer(model).whole is model


# --- in use ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "DINOv3ViT"])
def test_the_budget_is_met(kind):
    sizes = {"image_size": 256, "patch_size": 16, "hidden_size": 384, "num_hidden_layers": 8}
    changes = {"num_attention_heads": 6, "intermediate_size": 1536}
    if kind == "Dinov2":
        changes["mlp_ratio"] = 4
    model = getattr(transformers, f"{kind}Model")(config_of(kind, **sizes, **changes)).eval()
    x = torch.randn(1, 3, 256, 256)
    plain = count_flops(model, x)
    assert plain.after == 0
    for method in (None, "tome", "expedit", "pool", "hard"):
        with expedite(model, budget=0.5, method=method):
            flops = count_flops(model, x)
        assert 0.46 < flops.blocks / plain.blocks < 0.54, method
        assert flops.clustering > 0, method


@pytest.mark.parametrize("settings", [{"grid": (5, 5)}, {"method": "merge", "keep": 0.8}], ids=str)
def test_bfloat16_stays_near(model, settings):
    x = images()
    with expedite(model, 1, **settings):
        expected = run(model, x)
        model.to(torch.bfloat16)
        actual = run(model, x.to(torch.bfloat16))
    assert actual.dtype == torch.bfloat16 and torch.isfinite(actual).all()
    assert ((actual.float() - expected).norm() / expected.norm()).item() < 0.25


def test_images_of_a_batch_do_not_meet(model):
    x = images(batch=3)
    for settings in ({"grid": (4, 5)}, {"method": "merge", "keep": 0.5}):
        with expedite(model, 1, **settings):
            together = run(model, x)
            alone = torch.cat([run(model, image[None]) for image in x])
        assert error(together, alone) < 1e-5


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    target = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1))
    (model(x).last_hidden_state * target).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_nothing(model):
    """The layers checkpoint themselves, on what tokens are left."""
    x = images()
    for name in ("shift", "jitter", "rescale"):  # DINOv3's in training, at random
        setattr(model.config, f"pos_embed_{name}", None)
    for settings in ({"ratio": 0.6}, {"method": "merge", "keep": 0.5}):
        with expedite(model, (1, 2), **settings):
            expected = gradients(model, x)
            model.train().gradient_checkpointing_enable()
            actual = gradients(model, x)
            model.eval().gradient_checkpointing_disable()
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            if gradient.numel() > 0:  # there may be no register tokens
                assert error(actual[name], gradient) < 1e-4, name


def test_threads_do_not_mix():
    model = build("Dinov2")
    inputs = [images((8, 6)), images((6, 8)), images((5, 9), batch=1)]
    outputs: dict[int, list[tuple[Tensor, ...]]] = {index: [] for index in range(len(inputs))}

    def states(x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return model(x, output_hidden_states=True).hidden_states

    with expedite(model, (1, 2), method="merge", keep=0.5):
        expected = [states(x) for x in inputs]

        def work(index: int) -> None:
            for _ in range(6):
                outputs[index].append(states(inputs[index]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, results in outputs.items():
        assert len(results) == 6  # no thread died
        for result in results:
            for actual, own in zip(result, expected[index], strict=True):
                assert error(actual, own) < 1e-6


def test_copies_and_pickles(model):
    x = images()
    with expedite(model, 1, method="merge", keep=0.5):
        expected = run(model, x)
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for parameter in model.parameters():
            parameter.data.zero_()  # they are their own
    assert torch.equal(run(copied, x), expected)
    assert torch.equal(run(pickled, x), expected)


@pytest.mark.slow
def test_compiles_without_a_break():
    for kind in ("Dinov2", "DINOv3ViT"):
        for settings in ({"grid": (4, 4)}, {"method": "merge", "keep": 0.5}):
            torch._dynamo.reset()
            model, x = build(kind, num_hidden_layers=3), images()
            with expedite(model, 1, **settings), torch.no_grad():
                expected = run(model, x)
                compiled = torch.compile(model, fullgraph=True, backend="eager")
                assert error(compiled(x).last_hidden_state, expected) < 1e-5
    torch._dynamo.reset()


# --- what it refuses -------------------------------------------------------------------------


def test_masks_and_attention_maps_are_refused(model):
    model.set_attn_implementation("eager")
    with expedite(model, 1, grid=(4, 4)):
        with pytest.raises(ValueError, match="output_attentions"):
            model(images(), output_attentions=True)
        if "DINOv3" not in type(model).__name__:
            mask = torch.ones(2, 1 + SIDE * SIDE + getattr(model.config, "num_register_tokens", 0))
            mask[:, 5] = 0
            with pytest.raises(ValueError, match="attention_mask"):
                model(images(), attention_mask=mask)


def test_attention_without_masks_is_refused():
    model = build("Dinov2")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"SIZE_AWARE .* 'flash_attention_2'"):
        expedite(model, 1, grid=(4, 4))


def test_other_parts_are_refused_with_versions_that_fit():
    model = build("Dinov2")
    model.encoder.layer[2].attention.k_proj = None
    del model.encoder.layer[2].attention.k_proj
    with pytest.raises(ValueError, match=r"Dinov2Model of transformers .*; transformers>=5"):
        expedite(model, 1, grid=(4, 4))


def test_layers_by_themselves_are_refused():
    model = build("Dinov2")
    x = model.embeddings(images())
    with expedite(model, 1, grid=(4, 4)) as handle:
        with pytest.raises(ValueError, match="called by itself"):
            handle.blocks[2](x)
    model.encoder.layer[2](x)
