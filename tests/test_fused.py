"""Fused attention beside each family's own: outputs, memory, the weights' names, and undoing it."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from detectron2.modeling import SwinTransformer
from detectron2.modeling.backbone.swin import WindowAttention
from detectron2.modeling.backbone.vit import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from expedit_d2 import attention, expedite, fuse_attention
from expedit_d2.adapters.detectron2_vit import attend_layer
from expedit_d2.analysis.memory import peak_memory
from expedit_d2.api import expedite_from_node, is_expedited
from expedit_d2.settings import Settings
from support.tensors import error, perturbed
from support.vits import detectron2_vit, swin

#: Windows of 7 do not divide the tables of 12 x 12, and a block has convolutions.
VIT = {"window_size": 7, "residual_block_indexes": (1,)}
MODELS = {
    "vit": partial(detectron2_vit, **VIT),
    "vit without positions": partial(detectron2_vit, use_rel_pos=False, **VIT),
    "vit, small tables": partial(detectron2_vit, img_size=20, **VIT),
    "vit, global": partial(detectron2_vit, **VIT | {"window_size": 0, "window_block_indexes": ()}),
    "swin": partial(swin, SwinTransformer, embed_dim=24),
    "our swin": partial(swin, embed_dim=24),
}
#: What is expedited where a test asks for it.
SETTINGS = {"vit": {"alpha": 2, "grid": (5, 6)}, "our swin": {"alpha": 3, "grid": (2, 2)}}


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    """A random model with relative positions that are large enough to matter."""
    return perturbed(MODELS[request.param](), relative=0.5)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 48, 60)  # pads every kind of window


def maps(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    if isinstance(out, dict):
        out = tuple(out.values())
    return torch.cat([t.flatten() for t in out])


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
    with fuse_attention(model), torch.no_grad():
        for kind in (Attention, WindowAttention, type(next(iter(_attentions(model))))):
            monkeypatch.setattr(kind, "forward", None)
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
    model, x = MODELS[kind](), images()
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
        held = peak_memory(lambda: attend_layer(layer, x, positions=positions), torch.device("cpu"))
        assert held < 8 * 2**20
        if not clusters:
            assert peak_memory(lambda: layer(x), torch.device("cpu")) > 32 * 2**20
