"""Adapters from somebody else's package."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from expedit_d2 import adapters, expedite
from expedit_d2.adapters import (
    ADAPTER_REGISTRY,
    FAMILIES,
    TransformerSpec,
    find_transformer,
    timm_vit,
)
from expedit_d2.adapters.spec import block_costs
from expedit_d2.tokens import Layout, Tokens


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(ADAPTER_REGISTRY, "_objects", dict(ADAPTER_REGISTRY))
    torch.manual_seed(0)


class Encoder(nn.Module):
    """Somebody's ViT on maps (B, H, W, C): layers that mix all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class EncoderLayout(Layout):
    def __init__(self, size_aware: bool) -> None:
        self.size_aware = size_aware

    def split(self, x, tokens=None):
        size = tuple(x.shape[1:3])
        return Tokens(x, size, size) if tokens is None else replace(tokens, features=x)

    def join(self, x, features):
        return features

    def keys(self, block, features):
        return features

    def run(self, block, x, tokens):
        return block(x)


def test_a_registered_adapter_is_used():
    @ADAPTER_REGISTRY.register()
    class EncoderAdapter:
        FAMILY = "somebody's encoder"

        @staticmethod
        def matches(module: nn.Module) -> bool:
            return isinstance(module, Encoder)

        @staticmethod
        def adapt(module: nn.Module) -> TransformerSpec:
            return TransformerSpec(
                owner=module,
                attribute="stages",
                layout=EncoderLayout,
                costs=lambda layer: block_costs(layer, layer, channels=8),
                unstructured=True,
                size=(6, 6),
            )

    model, x = nn.Sequential(Encoder()).eval(), torch.randn(2, 6, 6, 8)
    plain = model(x)
    with expedite(model, 1, method="merge", keep=1.0):
        torch.testing.assert_close(model(x), plain)
    with expedite(model, 1, method="merge", keep=0.5) as handle:
        assert "Encoder" in repr(handle)
        assert model(x).shape == plain.shape and not torch.allclose(model(x), plain)
    assert torch.equal(model(x), plain)
    with expedite(model, budget=0.7) as handle:
        assert handle.settings.method == "merge" and handle.settings.keep < 1
    with pytest.raises(ValueError, match="METHOD tome works inside of the blocks"):
        expedite(model, 1, method="tome", keep=0.5)
    with pytest.raises(ValueError, match="supported: .*, somebody's encoder"):
        find_transformer(nn.Linear(2, 2))


def test_the_families_of_this_package_are_registered():
    assert list(ADAPTER_REGISTRY.values()) == list(FAMILIES)


def test_the_adapter_that_was_registered_last_is_taken():
    class Mine(VisionTransformer):
        pass

    seen = []

    @ADAPTER_REGISTRY.register()
    class MineAdapter:
        FAMILY = "my own"

        @staticmethod
        def matches(module: nn.Module) -> bool:
            return isinstance(module, Mine)

        @staticmethod
        def adapt(module: nn.Module) -> TransformerSpec:
            seen.append(module)
            return timm_vit.adapt(module)

    vit = Mine(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    assert find_transformer(vit).owner is vit and seen == [vit]


def adapter(**parts) -> type:
    whole = {
        "FAMILY": "mine",
        "matches": staticmethod(lambda module: False),
        "adapt": staticmethod(lambda module: None),
    }
    return type("Wrong", (), {k: v for k, v in (whole | parts).items() if v is not None})


@pytest.mark.parametrize(
    "parts,missing",
    [
        ({"FAMILY": None}, "FAMILY"),
        ({"FAMILY": 3}, "FAMILY"),
        ({"matches": None}, r"matches\(module\)"),
        ({"adapt": staticmethod(lambda: None)}, r"adapt\(module\)"),
        ({"adapt": lambda self, module: None}, r"adapt\(module\)"),
    ],
    ids=[
        "no family",
        "family is no text",
        "no matches",
        "adapt takes nothing",
        "adapt is no static method",
    ],
)
def test_incomplete_adapters_are_refused_at_registration(parts, missing):
    with pytest.raises(TypeError, match=f"adapter Wrong needs {missing}"):
        ADAPTER_REGISTRY.register(adapter(**parts))
    assert list(ADAPTER_REGISTRY.values()) == list(FAMILIES)


@pytest.mark.parametrize(
    "old,new", [("Host", adapters.TransformerSpec), ("find_host", adapters.find_transformer)]
)
def test_old_names_work_with_a_warning(old, new):
    with pytest.warns(DeprecationWarning, match="is now"):
        assert getattr(adapters, old) is new
