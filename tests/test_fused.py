"""Fused attention beside each family's own: outputs, memory, the weights' names, and undoing it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from detectron2.modeling import SwinTransformer, ViT
from detectron2.modeling.backbone.swin import WindowAttention
from detectron2.modeling.backbone.vit import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from expedit_d2 import attention, expedite, fuse_attention
from expedit_d2.adapters.detectron2_vit import _attend
from expedit_d2.analysis.memory import peak_memory
from expedit_d2.api import expedite_from_node, is_expedited
from expedit_d2.backbones.swin import D2SwinTransformer
from expedit_d2.settings import Settings


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def detectron2_vit(**changes) -> ViT:
    settings = {
        "img_size": 48,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 4,
        "use_rel_pos": True,
        "window_size": 7,
        "window_block_indexes": (0, 2),
        "residual_block_indexes": (1,),
    }
    return ViT(**(settings | changes))


def swin(kind: type, **changes) -> nn.Module:
    settings = {"embed_dim": 24, "depths": (2, 4), "num_heads": (2, 4), "window_size": 4}
    outputs = {"out_indices": (0, 1)} if kind is SwinTransformer else {"out_features": ["res2"]}
    return kind(**(settings | outputs | changes))


MODELS = {
    "vit": detectron2_vit,
    "vit without positions": lambda: detectron2_vit(use_rel_pos=False),
    "vit, small tables": lambda: detectron2_vit(img_size=20),
    "vit, global": lambda: detectron2_vit(window_size=0, window_block_indexes=()),
    "swin": lambda: swin(SwinTransformer),
    "our swin": lambda: swin(D2SwinTransformer),
}
#: What is expedited where a test asks for it.
SETTINGS = {"vit": {"alpha": 2, "grid": (5, 6)}, "our swin": {"alpha": 3, "grid": (2, 2)}}


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    """A random model, nothing in it zero; names of heads and positions large enough to matter."""
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if "rel" in name else 0.1))
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 48, 60)  # pads every kind of window


def maps(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    if isinstance(out, dict):
        out = tuple(out.values())
    return torch.cat([t.flatten() for t in out])


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def test_outputs_are_those_of_the_models_own_attention(model):
    x = images()
    with torch.no_grad():
        expected = maps(model, x)
        with fuse_attention(model):
            assert error(maps(model, x), expected) < 1e-5


def test_in_parts_the_outputs_are_the_same(model, monkeypatch):
    """Masks cut along windows, heads and queries."""
    x = images()
    with torch.no_grad():
        expected = maps(model, x)
        for entries in (100_000, 20_000, 3_000, 200):
            monkeypatch.setattr(attention, "_PART_CPU", entries)
            with fuse_attention(model):
                assert error(maps(model, x), expected) < 1e-5


def test_gradients_are_those_of_the_models_own_attention(model, monkeypatch):
    monkeypatch.setattr(attention, "_PART_CPU", 20_000)
    x = images()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        maps(model, x).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with fuse_attention(model):
        actual = gradients()
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert error(actual[name], gradient) < 1e-4, name


def test_the_models_own_attention_does_not_run(model, monkeypatch):
    for kind in (Attention, WindowAttention, type(next(iter(_attentions(model))))):
        monkeypatch.setattr(kind, "forward", None)
    with fuse_attention(model), torch.no_grad():
        assert torch.isfinite(maps(model, images())).all()


def _attentions(model: nn.Module) -> list[nn.Module]:
    return [module.attn for module in model.modules() if hasattr(module, "attn")]


def test_names_and_weights_stay_and_off_is_the_model_to_the_bit(model):
    x = images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [dict(vars(layer)) for layer in _attentions(model)]
    with torch.no_grad():
        expected = maps(model, x)
        handle = fuse_attention(model)
        inside = model.state_dict()
        assert list(inside) == list(before)
        assert all(torch.equal(inside[name], value) for name, value in before.items())
        handle.remove()
        handle.remove()
        assert torch.equal(maps(model, x), expected)
    assert [dict(vars(layer)) for layer in _attentions(model)] == attributes


def test_twice_is_once(model):
    with fuse_attention(model):
        with fuse_attention(model):
            pass
        assert all("forward" in vars(layer) for layer in _attentions(model))
    assert not any("forward" in vars(layer) for layer in _attentions(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_fused_with_weights_of_their_own(model, copied):
    x = images()
    with fuse_attention(model), torch.no_grad():
        twin = copied(model)
        expected = maps(model, x)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(maps(twin, x), expected)
        assert all(layer.forward.args[0] is layer for layer in _attentions(twin))


def test_mixed_precision_stays_near(model):
    x = images()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = maps(model, x)
        with fuse_attention(model):
            actual = maps(model, x)
        assert ((actual - expected).norm() / expected.norm()).item() < 0.03


@pytest.mark.parametrize("kind", SETTINGS)
def test_expedited_models_are_fused_before_alpha(kind):
    model, x = MODELS[kind]().eval(), images()
    scope = {"scope": "window"} if "swin" in kind else {}
    with torch.no_grad(), expedite(model, **SETTINGS[kind], **scope):
        expected = maps(model, x)
        with fuse_attention(model):
            assert error(maps(model, x), expected) < 1e-5
    settings = SETTINGS[kind] | scope | {"fused_attention": True}
    with torch.no_grad(), expedite(model, **settings):
        assert all("forward" in vars(layer) for layer in _attentions(model))
        assert error(maps(model, x), expected) < 1e-5
    assert not any("forward" in vars(layer) for layer in _attentions(model))


def test_the_key_is_for_plain_models_too():
    model = detectron2_vit()
    node = {"ENABLED": False, "ALPHA": 2, "GRID": [5, 6], "FUSED_ATTENTION": True}
    handle = expedite_from_node(model, node)
    assert not is_expedited(model)
    assert all("forward" in vars(layer) for layer in _attentions(model))
    handle.remove()
    assert not any("forward" in vars(layer) for layer in _attentions(model))
    assert expedite_from_node(model, node | {"FUSED_ATTENTION": False}) is None


def test_anything_but_true_or_false_is_named():
    with pytest.raises(ValueError, match="FUSED_ATTENTION must be True or False, got 'flash'"):
        Settings(fused_attention="flash")


def test_timm_is_left_as_it_is():
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
    attributes = [dict(vars(module)) for module in vit.modules()]
    with fuse_attention(vit):
        assert [dict(vars(module)) for module in vit.modules()] == attributes


def test_unsupported_models_are_refused():
    with pytest.raises(ValueError, match="no supported transformer in Linear"):
        fuse_attention(nn.Linear(2, 2))


@pytest.mark.parametrize("clusters", [False, True])
def test_no_mask_of_all_pairs_is_held(monkeypatch, clusters):
    """4 heads of 1024 tokens have 16 MiB of logits; parts of them are 1 MiB."""
    layer = Attention(32, num_heads=4, use_rel_pos=True, input_size=(32, 32))
    x = torch.randn(1, 32, 32, 32)
    positions = 31 * torch.rand(1, 32, 32, 2) if clusters else None
    monkeypatch.setattr(attention, "_PART_CPU", 2**18)
    with torch.no_grad():
        held = peak_memory(lambda: _attend(layer, x, positions=positions), torch.device("cpu"))
        assert held < 8 * 2**20
        if not clusters:
            assert peak_memory(lambda: layer(x), torch.device("cpu")) > 32 * 2**20
