"""METHOD merge where attention has windows, beside the stock classes.

Where nothing is merged, and where merged tokens are equal, it must be the stock model. Else,
without relative positions, it must be the stock blocks on the map in which every token is its
cluster.
"""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.backbone.swin import SwinTransformer
from torch import Tensor, nn

from expedit_d2 import expedite
from support.tensors import distance
from support.vits import PATCH, detectron2_vit, swin


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([out.flatten(1) for out in model(x).values()], dim=1)


MODELS = {
    "vit": lambda: detectron2_vit(img_size=64),
    "swin": swin,
    "official swin": lambda: swin(SwinTransformer),
}
ALPHAS = {"vit": (0, 1, 2), "swin": (2, 3, 5), "official swin": (2, 3, 5)}


@pytest.mark.parametrize("size", [(60, 40), (52, 76), (36, 64)])  # windows divide only the first
@pytest.mark.parametrize("kind", MODELS)
def test_the_stock_model_where_nothing_is_merged(kind, size):
    model, x = MODELS[kind](), torch.randn(2, 3, *size)
    plain = run(model, x)
    for positions in ("clusters", "grid"):
        settings = {"method": "merge", "keep": 1.0, "positions": positions}
        with expedite(model, ALPHAS[kind], **settings):
            assert distance(run(model, x), plain) < 1e-5
    assert torch.equal(run(model, x), plain)


def pairs(height: int, width: int, batch: int = 2) -> Tensor:
    """Images whose tokens come in equal pairs: columns 0 and 1, 2 and 3, and so on."""
    half = torch.randn(batch, 3, height * PATCH, width // 2, PATCH)
    return half.repeat_interleave(2, dim=3).flatten(3)


def without_positions(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith(("relative_position_bias_table", "pos_embed")):
            nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_equal_tokens_merge_without_loss(kind):
    """Windows of 4, regular and shifted, hold whole pairs; the map is padded to 12 x 16."""
    if kind == "vit":
        model = detectron2_vit(img_size=64, use_rel_pos=False, use_abs_pos=False, window_size=4)
        x, alpha = pairs(11, 14), 1
    else:
        # The second stage sees pairs of pairs: equal tokens of 2 x 2 patches.
        model, alpha = without_positions(MODELS[kind]()), 0
        x = pairs(11, 14)
    plain = run(model, x)
    with expedite(model, alpha, method="merge", keep=0.5, rounds=1):
        assert distance(run(model, x), plain) < 1e-5
    with expedite(model, alpha, method="merge", keep=0.5, rounds=1, size_aware=False):
        assert distance(run(model, x), plain) > 1e-4


@pytest.mark.parametrize("alpha", [0, 1, 2])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("size", [(60, 40), (52, 76)])
@pytest.mark.parametrize("residual", [True, False])
def test_stock_blocks_on_the_map_of_means(alpha, rounds, size, residual):
    """Attention with sizes is that of the stock blocks where members all hold their mean."""
    model, x = detectron2_vit(img_size=64, use_rel_pos=False), torch.randn(2, 3, *size)
    settings = {"method": "merge", "keep": 0.6, "rounds": rounds, "residual": residual}
    with expedite(model, alpha, **settings) as handle:
        reduce = handle.blocks.methods[f"after_{alpha}"].reduce
        found = []
        reduce.register_forward_hook(lambda _, args, out: found.append((args[0], out)))
        ours = run(model, x)
    (before, (reduced, record)) = found[0]
    shape = before.features.shape
    expected = torch.stack([m[i] for m, i in zip(reduced.features, record.index, strict=True)])
    tokens = before.features.flatten(1, 2)
    for image in range(2):  # means of what was merged, all in one window
        for cluster in record.index[image].unique():
            members = record.index[image] == cluster
            mean = tokens[image][members].mean(0)
            torch.testing.assert_close(reduced.features[image, cluster], mean)
            rows, cols = members.nonzero()[:, 0] // shape[2], members.nonzero()[:, 0] % shape[2]
            assert len({*zip((rows // 5).tolist(), (cols // 5).tolist(), strict=True)}) == 1
    expected = expected.view(shape)
    difference = before.features - expected
    with torch.no_grad():
        for block in model.blocks[alpha:]:
            expected = block(expected)
    expected = expected + difference if residual else expected
    assert distance(ours, expected.permute(0, 3, 1, 2).flatten(1)) < 1e-5


def test_relative_positions_follow_the_clusters():
    """Or stay at the places that clusters keep; both are near the plain model, and differ."""
    model, x = detectron2_vit(img_size=64), torch.randn(1, 3, 60, 60)
    outs = []
    for positions in ("clusters", "grid"):
        with expedite(model, (0, 1), method="merge", keep=0.8, positions=positions):
            outs.append(run(model, x))
    assert 1e-4 < distance(outs[0], outs[1])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["merge", "density"])
def test_images_of_a_batch_do_not_matter_to_each_other(kind, method):
    model, x = MODELS[kind](), torch.randn(3, 3, 52, 68)
    with expedite(model, ALPHAS[kind], method=method, keep=0.5):
        assert distance(run(model, x)[1:2], run(model, x[1:2])) < 1e-5


@pytest.mark.parametrize("kind", ["vit", "swin"])  # the official Swin's own mask is fp32
def test_half_precision(kind):
    model, x = MODELS[kind](), torch.randn(2, 3, 52, 68)
    with expedite(model, ALPHAS[kind], method="merge", keep=0.9):
        exact = run(model, x)
        low = run(model.to(torch.bfloat16), x.to(torch.bfloat16))
    assert torch.isfinite(low).all()
    assert distance(low.float(), exact) < 0.4  # some pairs differ


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_and_training(kind):
    model, x = MODELS[kind]().train(), torch.randn(2, 3, 52, 68)
    with expedite(model, ALPHAS[kind], method="merge", keep=0.5):
        sum(out.square().mean() for out in model(x).values()).backward()
    grads = [p.grad for name, p in model.named_parameters() if "qkv" in name]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)


def test_tome_takes_equally_many_from_every_window():
    model, x = detectron2_vit(img_size=64, window_size=4), torch.randn(2, 3, 48, 64)
    with expedite(model, (0, 1, 2, 3), method="tome", keep=0.5) as handle:
        found = []
        for method in handle.blocks.methods.values():
            method.reduce.register_forward_hook(lambda _, args, out: found.append(out[0]))
        out = run(model, x)
    assert torch.isfinite(out).all()
    for tokens in found:
        window = tokens.places // 16 // 4 * 4 + tokens.places % 16 // 4
        counts = [image.bincount(minlength=12).tolist() for image in window]
        assert all(len(set(count)) == 1 for count in counts)
    with (
        expedite(model, (0, 1), method="tome", keep=0.5),
        pytest.raises(ValueError, match="METHOD tome .* must divide the map"),
    ):
        run(model, torch.randn(1, 3, 48, 60))


def test_tome_with_all_tokens_is_the_stock_model():
    model, x = detectron2_vit(img_size=64, window_size=4), torch.randn(2, 3, 48, 64)
    plain = run(model, x)
    with expedite(model, (0, 1, 2, 3), method="tome", keep=1.0):
        assert distance(run(model, x), plain) < 1e-5
