"""Expediting and undoing it: off leaves no trace, copies, which models there are settings for."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from expedit_d2 import expedite
from expedit_d2.adapters import FAMILIES, find_transformer
from expedit_d2.api import Expedited, expedite_from_node, is_expedited
from support.tensors import error, perturbed
from support.vits import PATCH, detectron2_vit, images, run, timm_vit_of_any_size

# --- off leaves no trace ---------------------------------------------------------------------


def snapshot(vit: nn.Module) -> list:
    """What must be the same before and after: modules, hooks and modes, by identity."""
    return [
        (
            name,
            id(module),
            list(module._modules),
            list(module._parameters),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            sorted(vars(module)),
        )
        for name, module in vit.named_modules()
    ]


def test_settings_that_reduce_nothing_are_refused(vit):
    before = snapshot(vit)
    for settings in ({}, {"alpha": None}, {"residual": False}):
        with pytest.raises(ValueError, match="neither ALPHA nor BUDGET is set.*RATIO and KEEP"):
            expedite(vit, **settings)
    with pytest.raises(ValueError, match="neither ALPHA nor BUDGET"):
        expedite_from_node(vit, {"ENABLED": True})
    assert snapshot(vit) == before


def test_remove_puts_everything_back(vit):
    x, before = images(), snapshot(vit)
    expected, container = run(vit, x), vit.blocks
    handle = expedite(vit, 1, grid=(4, 6))
    assert is_expedited(vit) and handle.blocks is vit.blocks is not container
    assert error(run(vit, x), expected) > 1e-4
    for _ in range(2):
        handle.remove()
        assert vit.blocks is container and snapshot(vit) == before
        assert torch.equal(run(vit, x), expected)
    assert not is_expedited(vit)


def test_an_old_handle_does_not_undo_a_newer_one(vit):
    old = expedite(vit, 1, grid=(4, 6))
    old.remove()
    with expedite(vit, 2, grid=(4, 6)) as new:
        old.remove()
        assert vit.blocks is new.blocks


def test_leaving_the_context_puts_everything_back(vit):
    x, before = images(), snapshot(vit)
    expected = run(vit, x)
    with expedite(vit, 1, grid=(4, 6)) as handle:
        assert isinstance(handle, Expedited)
        assert error(run(vit, x), expected) > 1e-4
    assert snapshot(vit) == before
    assert torch.equal(run(vit, x), expected)


def test_leaving_the_context_by_an_exception_too(vit):
    x, before = images(), snapshot(vit)
    expected = run(vit, x)
    with pytest.raises(RuntimeError, match="within"), expedite(vit, 1, grid=(4, 6)):
        raise RuntimeError("within")
    with pytest.raises(ValueError, match="GRID"), expedite(vit, 1, grid=(9, 13)):
        run(vit, x)  # from inside a block
    assert snapshot(vit) == before
    assert torch.equal(run(vit, x), expected)


@pytest.mark.parametrize("settings", [{"alpha": 4}, {"alpha": 1, "method": "x"}], ids=str)
def test_a_refusal_leaves_no_trace(vit, settings):
    before = snapshot(vit)
    with pytest.raises(ValueError):
        expedite(vit, grid=(4, 6), **settings)
    assert snapshot(vit) == before


def test_mode_set_meanwhile_is_kept(vit):
    vit.train()
    handle = expedite(vit, 1, grid=(4, 6))
    assert all(module.training for module in vit.modules())
    vit.eval()
    assert not any(module.training for module in vit.modules())
    handle.remove()
    assert not any(module.training for module in vit.modules())


def same_state(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_state_dict_and_parameters_are_the_same_throughout(vit):
    def state() -> dict:
        return {key: value.clone() for key, value in vit.state_dict().items()}

    before = state()
    parameters = [(name, id(p)) for name, p in vit.named_parameters()]
    with expedite(vit, (1, 2), grid=(4, 6)):
        assert same_state(state(), before)
        assert [(name, id(p)) for name, p in vit.named_parameters()] == parameters
        run(vit, images())
        assert same_state(state(), before)
    assert same_state(state(), before)


def test_weights_can_be_loaded_while_expedited(vit):
    other = copy.deepcopy(vit)
    perturbed(other)
    x = images()
    with expedite(other, 1, grid=(4, 6)):
        expected = run(other, x)
        saved = {key: value.clone() for key, value in other.state_dict().items()}
    with expedite(vit, 1, grid=(4, 6)):
        assert error(run(vit, x), expected) > 1e-4
        result = vit.load_state_dict(saved, strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        assert torch.equal(run(vit, x), expected)
    assert torch.equal(run(vit, x), run(other, x))


def test_an_expedited_model_can_be_copied(vit):
    x = images()
    plain = run(vit, x)
    with expedite(vit, 1, grid=(4, 6)):
        expected = run(vit, x)
        twin = copy.deepcopy(vit)
        assert is_expedited(twin) and torch.equal(run(twin, x), expected)
    # They share nothing: the first one is off now, the twin is not.
    assert torch.equal(run(vit, x), plain)
    assert torch.equal(run(twin, x), expected)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    assert torch.equal(run(twin, x), expected)


def test_a_copy_of_an_expedited_model_follows_its_own_patch_size():
    vit = timm_vit_of_any_size()
    with expedite(vit, 1, ratio=0.5):
        twin = copy.deepcopy(vit)
        twin.set_input_size(patch_size=(2 * PATCH, 2 * PATCH))
        assert run(twin, images()).shape == (2, 7)


def test_an_expedited_model_can_be_pickled(vit):
    x, file = images(), io.BytesIO()
    with expedite(vit, 1, grid=(4, 6)):
        expected = run(vit, x)
        torch.save(vit, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert is_expedited(loaded)
    assert torch.equal(run(loaded, x), expected)


def test_unsupported_models_are_refused_by_name():
    with pytest.raises(ValueError) as caught:
        find_transformer(nn.Sequential(nn.Linear(2, 2)))
    assert "Sequential" in str(caught.value)
    for family in FAMILIES:
        assert family.FAMILY in str(caught.value)
    with pytest.raises(ValueError, match="supported"):
        expedite(nn.Linear(2, 2), 1, grid=(2, 2))


def test_two_transformers_are_refused_by_name():
    model = nn.ModuleDict({"image": timm_vit_of_any_size(), "teacher": detectron2_vit()})
    with pytest.raises(ValueError, match="image, teacher"):
        expedite(model, 1, grid=(2, 2))
    with expedite(model["teacher"], 1, grid=(2, 2)):
        assert is_expedited(model) and not is_expedited(model["image"])


def test_a_transformer_anywhere_in_the_model_is_found(vit):
    model = nn.ModuleDict({"neck": nn.Linear(2, 2), "backbone": nn.Sequential(vit)})
    x = images()
    plain = run(vit, x)
    with expedite(model, 1, grid=(4, 6)) as handle:
        assert vit.blocks is handle.blocks
        assert error(run(vit, x), plain) > 1e-4
    assert torch.equal(run(vit, x), plain)


def test_one_transformer_under_two_names_is_one(vit):
    model = nn.ModuleDict({"a": vit, "b": vit})
    with expedite(model, 1, grid=(4, 6)) as handle:
        assert vit.blocks is handle.blocks


def test_subclasses_are_supported():
    class Mine(VisionTransformer):
        pass

    vit = Mine(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    with expedite(vit.eval(), 1, grid=(2, 2)):
        assert run(vit, torch.randn(1, 3, 16, 16)).shape == (1, 3)


def test_other_classes_of_that_name_are_not():
    class VisionTransformer(nn.Module):
        blocks = nn.ModuleList()

    with pytest.raises(ValueError, match="supported"):
        find_transformer(VisionTransformer())


def test_expediting_twice_is_refused(vit):
    model = nn.Sequential(vit)
    with expedite(vit, 1, grid=(4, 6)) as handle:
        for target in (vit, model):
            with pytest.raises(ValueError, match="already expedited"):
                expedite(target, 2, grid=(4, 6))
        assert vit.blocks is handle.blocks
    with expedite(vit, 2, grid=(4, 6)):
        assert is_expedited(model)
