"""Kernel launches: what is counted, what each method makes, and attention without a mask."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from expedit_d2 import expedite
from expedit_d2.adapters.timm_vit import PrefixLayout
from expedit_d2.analysis.launches import count_launches
from expedit_d2.attention import MasksAsChannels
from support.vits import timm_eva, timm_vit


class Calls(nn.Module):
    """A network of one function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x, {}),
        (lambda x: x.transpose(0, 1)[1:].unsqueeze(0), {}),
        (lambda x: x.expand(2, 4, 4).reshape(8, 4), {"clone": 1}),
        (lambda x: torch.empty_like(x), {}),
        (lambda x: x @ x, {"mm": 1}),
        (lambda x: (x + 1).add_(1), {"add": 1, "add_": 1}),
        (lambda x: x.softmax(-1), {"_softmax": 1}),
        (lambda x: x.topk(2).values.relu(), {"topk": 1, "relu": 1}),
        (lambda x: F.linear(x, x, x[0]), {"addmm": 1}),
    ],
    ids=["nothing", "views", "copy", "memory", "product", "in-place", "softmax", "two", "linear"],
)
def test_operators_that_launch(function, expected):
    assert dict(count_launches(Calls(function), torch.randn(4, 4))) == expected


def test_layers_are_counted_one_by_one():
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(7)), nn.LayerNorm(4))
    assert count_launches(network, torch.randn(2, 4)) == {"addmm": 7, "native_layer_norm": 1}


def test_what_is_kept_is_not_counted():
    class Keeps(nn.Module):
        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(4)
            return x + self.table

    assert count_launches(Keeps(), torch.randn(4)) == {"add": 1}


@pytest.fixture(scope="module")
def deep():
    """24 blocks, with the tokens of a 384 x 512 image."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(384, 512), depth=24, embed_dim=48, num_classes=0
    )
    return model.eval()


#: Settings, and how many launches they may make.
BOUNDS = {
    "plain": ({}, 250),
    "clustering": ({"alpha": 10, "grid": (16, 20)}, 380),
    "clustering, published": (
        {
            "alpha": 10,
            "grid": (16, 20),
            "temperature": 0.02,
            "normalize": "l2",
            "size_aware": False,
            "residual": False,
            "neighbor_window": 0,
        },
        335,
    ),
    "clustering twice": ({"alpha": (6, 12), "grid": (16, 20)}, 560),
    "budget": ({"budget": 0.5}, 480),
    # Merges in every block, by its definition.
    "tome": ({"budget": 0.5, "method": "tome"}, 1100),
    "density": ({"budget": 0.5, "method": "density"}, 300),
    "pool": ({"budget": 0.5, "method": "pool"}, 270),
    "hard": ({"budget": 0.5, "method": "hard"}, 350),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_launches_of_each_method(deep, name):
    settings, most = BOUNDS[name]
    with expedite(deep, outputs=(23,), **settings) if settings else nullcontext():
        counts = count_launches(deep, torch.randn(1, 3, 384, 512))
    assert counts.total() <= most, counts
    assert counts["native_layer_norm"] >= 48  # all blocks ran


class MasksOfAttention(TorchFunctionMode):
    """Whether attention is handed a mask, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.masked: list[bool] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            self.masked.append(mask is not None)
        return func(*args, **kwargs)


def test_launches_with_sizes_as_channels(monkeypatch, deep):
    """On a GPU: one more for queries, keys, values, sizes and the result of each block."""
    monkeypatch.setattr(PrefixLayout, "_masks", staticmethod(lambda x: MasksAsChannels()))
    with expedite(deep, outputs=(23,), budget=0.5):
        counts = count_launches(deep, torch.randn(1, 3, 384, 512))
    assert counts.total() <= BOUNDS["budget"][1] + 5 * 24


@pytest.mark.parametrize("settings", [{"alpha": 1, "grid": (4, 5)}, {"budget": 0.5}], ids=str)
def test_launches_do_not_grow_with_the_batch(settings):
    model = timm_vit((6, 8))
    with expedite(model, **settings):
        counts = [count_launches(model, torch.randn(n, 3, 24, 32)) for n in (2, 5)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("build", [timm_vit, partial(timm_eva, use_rot_pos_emb=True)])
@pytest.mark.parametrize(
    "settings",
    [{"alpha": 1, "grid": (4, 5)}, {"alpha": (0, 2), "keep": 0.6, "method": "merge"}],
    ids=["expedit", "merge"],
)
def test_sizes_are_a_channel_on_a_gpu(monkeypatch, build, settings):
    """What is done for CUDA, done here: no mask reaches attention, and the result is the same."""
    model, x = build((6, 8)), torch.randn(2, 3, 24, 32)
    with expedite(model, **settings), torch.no_grad():
        with MasksOfAttention() as before:
            expected = model.forward_features(x)
        assert any(before.masked)
        monkeypatch.setattr(PrefixLayout, "_masks", staticmethod(lambda x: MasksAsChannels()))
        # Modes are asked from the inside out: the one that looks is outside.
        with MasksOfAttention() as after:
            found = model.forward_features(x)
    assert len(after.masked) == len(before.masked) and not any(after.masked)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
