"""EoMT, expedited: the blocks before its queries join in reduce their tokens, the others do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from expedit_d2 import expedite
from expedit_d2.analysis.flops import count_flops
from support.tensors import maps_error as error

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install .[transformers]"
)
SIDE = 8  # tokens along the sides of the map
QUERIES = 6
# Every token its own cluster: nothing is lost.
IDENTITY = {"grid": (SIDE, SIDE), "temperature": 1e6, "neighbors": 1}


def build(name: str, **changes) -> nn.Module:
    """Of 5 blocks the last two run on the queries too; nothing in it is zero."""
    torch.manual_seed(0)
    settings = {
        "image_size": 4 * SIDE,
        "patch_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_blocks": 2,
        "num_queries": QUERIES,
        "num_labels": 3,
        "num_upscale_blocks": 1,
    }
    config = getattr(transformers, f"{name}Config")(**(settings | changes))
    model = getattr(transformers, f"{name}ForUniversalSegmentation")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(params=["Eomt", "EomtDinov3"])
def model(request) -> nn.Module:
    return build(request.param)


def images() -> Tensor:
    return torch.randn(2, 3, 4 * SIDE, 4 * SIDE)


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    out = model(x)
    return out.masks_queries_logits, out.class_queries_logits


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "annealed"])
def test_keeping_all_tokens_is_the_plain_model(model, masked):
    """Masked attention of the queries, as in training, or none, as in published weights."""
    model.attn_mask_probs.fill_(float(masked))
    x = images()
    expected = run(model, x)
    for settings in (IDENTITY, {"method": "merge", "keep": 1.0}):
        for alpha in (0, 2, (0, 1, 2)):
            with expedite(model, alpha, **settings):
                assert error(run(model, x), expected) < 1e-5
    with expedite(model, 1, method="merge", keep=0.5):
        assert error(run(model, x), expected) > 1e-3
    assert all(map(torch.equal, run(model, x), expected))


@torch.no_grad()
def test_hidden_states_are_whole_maps(model):
    x = images()
    plain = model(x, output_hidden_states=True).hidden_states
    with expedite(model, 1, method="merge", keep=0.5):
        ours = model(x, output_hidden_states=True).hidden_states
    assert [state.shape for state in ours] == [state.shape for state in plain]
    assert [torch.equal(a, b) for a, b in zip(ours, plain, strict=True)][:2] == [True, True]


def test_the_budget_counts_the_blocks_that_stay_whole():
    sizes = {"image_size": 128, "patch_size": 8, "hidden_size": 192, "num_attention_heads": 3}
    model = build("Eomt", **sizes, num_hidden_layers=8)
    x = torch.randn(1, 3, 128, 128)
    plain = count_flops(model, x)
    with expedite(model, budget=0.7):
        assert 0.66 < count_flops(model, x).blocks / plain.blocks < 0.74
    with pytest.raises(ValueError, match=r"BUDGET must be above 0\.2"):
        expedite(model, budget=0.1)


def test_blocks_with_queries_are_refused_at_once(model):
    with pytest.raises(ValueError, match=r"ALPHA must be in 0 to 2 .*, got 3"):
        expedite(model, 3, grid=(4, 4))
    with pytest.raises(ValueError, match="all 2 blocks of this .* queries"):
        expedite(build("Eomt", num_hidden_layers=2), 0, grid=(4, 4))
