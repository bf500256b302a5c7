"""The documentation's adapter of a made-up ViT does what the page says."""

from __future__ import annotations

import re
import runpy

import pytest
import torch

from expedit_d2 import expedite
from expedit_d2.adapters import ADAPTER_REGISTRY
from expedit_d2.analysis.flops import count_flops
from support.repository import ROOT

PAGE = ROOT / "docs" / "adapters.md"


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def page(blocks, tmp_path_factory):
    """What the code of the page defines; its adapter is registered for these tests alone."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("docs") / "made_up.py"
    path.write_text("\n\n".join(blocks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ADAPTER_REGISTRY, "_objects", dict(ADAPTER_REGISTRY.items()))
        yield runpy.run_path(str(path), run_name="made_up")


def test_the_adapter_is_short(blocks):
    (adapter,) = [block for block in blocks if "ADAPTER_REGISTRY.register" in block]
    assert len(adapter.splitlines()) < 60


@torch.no_grad()
def test_the_adapter_of_the_page(page):
    model, x = page["MadeUpViT"]().eval(), torch.randn(2, 3, 48, 64)
    plain, flops = model(x), count_flops(model, x)
    assert page["features"].shape == (2, 192, 16, 16)
    for settings in (
        {"alpha": 0, "grid": (12, 16), "temperature": 1e6, "neighbors": 1},
        {"alpha": (0, 3), "method": "merge", "keep": 1.0},
    ):
        with expedite(model, **settings):
            assert ((model(x) - plain).abs().max() / plain.abs().max()).item() < 1e-5
    with expedite(model, budget=0.5):
        assert not torch.allclose(model(x), plain, rtol=1e-2)
        assert 0.4 < count_flops(model, x).blocks / flops.blocks < 0.55
    assert torch.equal(model(x), plain)
