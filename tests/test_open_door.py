"""A method and a family from somebody else's package, each in one file, and their entry points."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expedit_d2 import expedite
from expedit_d2.adapters import ADAPTER_REGISTRY, find_transformer
from expedit_d2.methods import METHOD_REGISTRY, GridMethod, Method
from expedit_d2.settings import Settings
from support.tensors import error
from support.vits import images, run_timm, timm_vit

METHOD = '''
"""The first token of each cell stands for it."""

import torch.nn.functional as F

from expedit_d2.methods import METHOD_REGISTRY, GridMethod
from expedit_d2.operators import Clusters, adaptive_pool


@METHOD_REGISTRY.register("corner")
class Corner(GridMethod):
    reads = GridMethod.reads - {"residual"}

    @staticmethod
    def cluster(settings, features, grid, weights, positions):
        step = [side // cells for side, cells in zip(features.shape[1:3], grid)]
        corners = features[:, :: step[0], :: step[1]]
        size = features.new_full(corners.shape[:3], step[0] * step[1])
        return Clusters(corners, size, None)

    @staticmethod
    def restore(settings, features, record):
        size = record.tokens.shape[1:3]
        return F.interpolate(features.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
'''

FAMILY = '''
"""A family of linear layers on maps (B, H, W, C)."""

from dataclasses import replace

from torch import nn

from expedit_d2.adapters import ADAPTER_REGISTRY, TransformerSpec
from expedit_d2.adapters.spec import block_costs
from expedit_d2.tokens import Layout, Tokens


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class MapLayout(Layout):
    def __init__(self, size_aware):
        pass

    def split(self, x, tokens=None):
        size = tuple(x.shape[1:3])
        return Tokens(x, size, size) if tokens is None else replace(tokens, features=x)

    def join(self, x, features):
        return features

    def keys(self, block, features):
        return features

    def run(self, block, x, tokens):
        return block(x)


@ADAPTER_REGISTRY.register()
class MixerAdapter:
    FAMILY = "somebody's mixer"

    @staticmethod
    def matches(module):
        return isinstance(module, Mixer)

    @staticmethod
    def adapt(module):
        return TransformerSpec(
            owner=module,
            attribute="steps",
            layout=MapLayout,
            costs=lambda step: block_costs(step, step, channels=8),
            unstructured=True,
        )
'''


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a test registers is gone after it."""
    for registry in (METHOD_REGISTRY, ADAPTER_REGISTRY):
        monkeypatch.setattr(registry, "_objects", {**registry})
        monkeypatch.setattr(registry, "_problems", None)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a module, and entry points of its package, on the path."""

    def put(name: str, text: str, entry_points: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        monkeypatch.delitem(sys.modules, name, raising=False)

    monkeypatch.syspath_prepend(tmp_path)
    return put


def test_a_method_is_one_file(install):
    install("corner_method", METHOD, "[expedit_d2.methods]\ncorner = corner_method:Corner\n")
    assert "corner_method" not in sys.modules
    vit, x = timm_vit(), images()
    plain = run_timm(vit, x)
    with expedite(vit, 1, method="corner", grid=(8, 12)):  # every token is its own
        assert error(run_timm(vit, x), plain) < 1e-5
    cells = F.interpolate(torch.randn(2, 3, 16, 24), scale_factor=(2, 2))
    with expedite(vit, 1, method="corner", grid=(4, 6)) as handle:
        assert "method=corner" in repr(handle)
        assert run_timm(vit, cells).shape == plain.shape
    with expedite(vit, budget=0.8, method="corner") as handle:
        assert handle.settings.ratio < 1
    with pytest.raises(ValueError, match=r"RESIDUAL True .* nothing with METHOD corner"):
        Settings(alpha=1, ratio=0.5, method="corner", residual=True)
    with pytest.raises(ValueError, match="SCOPE 'window' .*corner, expedit"):
        Settings(alpha=1, keep=0.5, scope="window")


def test_a_family_is_one_file(install):
    install("mixer_family", FAMILY, "[expedit_d2.adapters]\nmixer = mixer_family\n")
    with pytest.raises(ValueError, match="supported: .*, somebody's mixer$"):
        find_transformer(nn.Linear(2, 2))
    model, x = sys.modules["mixer_family"].Mixer().eval(), torch.randn(2, 6, 6, 8)
    plain = model(x)
    with expedite(model, 1, keep=1.0):
        assert error(model(x), plain) < 1e-6
    for settings in ({"alpha": 1, "keep": 0.5}, {"alpha": 1, "grid": (3, 3)}, {"budget": 0.7}):
        with expedite(model, **settings):
            assert model(x).shape == plain.shape and error(model(x), plain) > 1e-3
    assert torch.equal(model(x), plain)


def test_a_broken_entry_point_is_named_and_does_no_harm(install, caplog):
    install(
        "broken",
        "import a_package_that_nobody_has",
        "[expedit_d2.methods]\nnice = broken:Nice\n[expedit_d2.adapters]\nnice = broken\n",
    )
    with pytest.raises(ValueError, match="METHOD must be one of .*'nice' of expedit_d2.methods"):
        Settings(alpha=1, ratio=0.5, method="nice")
    with pytest.raises(ValueError, match="supported: .*'nice' of expedit_d2.adapters, 'broken'"):
        find_transformer(nn.Linear(2, 2))
    with expedite(timm_vit(), 1, keep=0.5):
        pass
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and all("a_package_that_nobody_has" in line for line in lines)


class Half(GridMethod):
    @staticmethod
    def cluster(settings, features, grid, weights, positions):
        return None


class Bare(Method):
    pass


class Odd(Method):
    counts, budget_rule = ("keep",), "never"


@pytest.mark.parametrize(
    "method,message",
    [
        (nn.Linear, "must be a subclass of"),
        (len, "must be a subclass of"),
        (Half, "needs restore"),
        (Bare, "needs counts"),
        (Odd, "budget_rule of method mine must be one of .* got 'never'"),
    ],
)
def test_incomplete_methods_are_refused_when_registered(method, message):
    with pytest.raises(TypeError, match=message):
        METHOD_REGISTRY.register("mine")(method)
    assert "mine" not in METHOD_REGISTRY


def test_a_method_without_its_modules_is_refused_by_expedite():
    METHOD_REGISTRY.register("mine")(type("Mine", (Method,), {"counts": ("keep",)}))
    with pytest.raises(TypeError, match="METHOD mine has no module 'reduce'"):
        expedite(timm_vit(), 1, method="mine", keep=0.5)


def test_a_name_is_taken_once():
    with pytest.raises(KeyError, match="method merge is registered already"):
        METHOD_REGISTRY.register("merge")(METHOD_REGISTRY["pool"])
    assert METHOD_REGISTRY.register("merge")(METHOD_REGISTRY["merge"]) is METHOD_REGISTRY["merge"]
