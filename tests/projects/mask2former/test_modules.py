"""Mask2Former's decoders against explicit loops: deformable and masked attention, positions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from expedit_d2.projects.Mask2Former.modeling import deformable_attention as da
from expedit_d2.projects.Mask2Former.modeling.pixel_decoder import MSDeformAttnPixelDecoder
from expedit_d2.projects.Mask2Former.modeling.position import sine_embedding
from expedit_d2.projects.Mask2Former.modeling.transformer_decoder import (
    MultiScaleMaskedTransformerDecoder,
    _Attention,
)

SIZES = [(2, 3), (4, 5), (7, 6)]


def randomize(module: nn.Module, std: float = 0.2) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


# ------------------------------------------------------------------------ deformable attention


def bilinear(image: Tensor, x: float, y: float) -> Tensor:
    """Value (C,) of an image (H, W, C) at x, y in [0, 1] from edge to edge, zero outside."""
    height, width, channels = image.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = torch.zeros(channels, dtype=image.dtype)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * image[i, j]
    return total


def slow_sampling(values, sizes, locations, weights) -> Tensor:
    batch, queries, heads, levels, points, _ = locations.shape
    out = torch.zeros(batch, queries, heads, values.shape[-1], dtype=values.dtype)
    for b in range(batch):
        start = 0
        for level in range(levels):
            height, width = sizes[level]
            part = values[b, start : start + height * width].unflatten(0, (height, width))
            start += height * width
            for q in range(queries):
                for m in range(heads):
                    for p in range(points):
                        x, y = locations[b, q, m, level, p].tolist()
                        out[b, q, m] += weights[b, q, m, level, p] * bilinear(part[:, :, m], x, y)
    return out.flatten(2)


def sampling_inputs(queries: int = 5, heads: int = 2, points: int = 3) -> tuple[Tensor, ...]:
    total = sum(h * w for h, w in SIZES)
    values = torch.randn(2, total, heads, 4, dtype=torch.float64)
    shape = (2, queries, heads, len(SIZES), points)
    # Some of them outside of the map.
    locations = torch.rand(*shape, 2, dtype=torch.float64) * 1.6 - 0.3
    return values, locations, torch.rand(shape, dtype=torch.float64)


def test_sampling_is_that_of_explicit_loops():
    values, locations, weights = sampling_inputs()
    ours = da.sample_levels(values, SIZES, locations, weights)
    torch.testing.assert_close(ours, slow_sampling(values, SIZES, locations, weights))


def test_module_places_points_by_offsets_in_cells_of_each_level():
    attention = randomize(da.MSDeformAttn(8, len(SIZES), 2, 3)).double()
    query = torch.randn(2, 5, 8, dtype=torch.float64)
    total = sum(h * w for h, w in SIZES)
    values = torch.randn(2, total, 8, dtype=torch.float64)
    reference = torch.rand(5, 2, dtype=torch.float64)

    offsets = attention.sampling_offsets(query).view(2, 5, 2, 3, 3, 2)
    weights = attention.attention_weights(query).view(2, 5, 2, 9).softmax(-1).view(2, 5, 2, 3, 3)
    locations = torch.empty_like(offsets)
    for level, (height, width) in enumerate(SIZES):
        for q in range(5):
            x, y = reference[q]
            locations[:, q, :, level, :, 0] = x + offsets[:, q, :, level, :, 0] / width
            locations[:, q, :, level, :, 1] = y + offsets[:, q, :, level, :, 1] / height
    projected = attention.value_proj(values).view(2, total, 2, 4)
    expected = attention.output_proj(slow_sampling(projected, SIZES, locations, weights))
    torch.testing.assert_close(attention(query, reference, values, SIZES), expected)


def test_fresh_module_looks_around_the_reference_with_equal_weights():
    heads, points = 8, 4
    attention = da.MSDeformAttn(16, 2, heads, points)
    offsets = attention.sampling_offsets(torch.randn(1, 16)).view(heads, 2, points, 2)
    for m in range(heads):
        angle = 2 * math.pi * m / heads
        reach = max(abs(math.cos(angle)), abs(math.sin(angle)))
        for p in range(points):
            expected = torch.tensor([math.cos(angle), math.sin(angle)]) / reach * (p + 1)
            for level in range(2):
                torch.testing.assert_close(offsets[m, level, p], expected)
    assert attention.attention_weights(torch.randn(1, 16)).abs().max() == 0


def test_compiled_operator_gets_what_it_expects_and_has_gradients(monkeypatch):
    """The CUDA operator itself is not there: a stand-in checks arguments and the backward."""
    seen = []

    def run(values, sizes, starts, locations, weights):
        assert sizes.tolist() == [list(s) for s in SIZES] and starts.tolist() == [0, 6, 26]
        pairs = [tuple(s) for s in sizes.tolist()]
        return da.sample_levels(values, pairs, locations, weights)

    def forward(*arguments):
        seen.append(arguments[-1])
        return run(*arguments[:-1])

    def backward(values, sizes, starts, locations, weights, grad, step):
        inputs = [x.detach().requires_grad_() for x in (values, locations, weights)]
        with torch.enable_grad():
            out = run(inputs[0], sizes, starts, inputs[1], inputs[2])
        return torch.autograd.grad(out, inputs, grad)

    operator = SimpleNamespace(ms_deform_attn_forward=forward, ms_deform_attn_backward=backward)
    monkeypatch.setattr(da, "compiled_op", operator)
    inputs = [x.requires_grad_() for x in sampling_inputs()]
    results = []
    for sample in (da._sample_compiled, da.sample_levels):
        out = sample(inputs[0], SIZES, *inputs[1:])
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(results[0], results[1])
    assert seen == [64]


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="CONVS_DIM 10 must be a multiple"):
        da.MSDeformAttn(10, 1, 4, 1)


# ----------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (6, 2)])
def test_sine_embedding_by_explicit_loop(size):
    channels = 16
    half = channels // 2
    ours = sine_embedding(size, channels, torch.device("cpu")).unflatten(0, size)
    for i in range(size[0]):
        for j in range(size[1]):
            for k in range(half):
                wave = 10000 ** (2 * (k // 2) / half)
                turn = math.sin if k % 2 == 0 else math.cos
                y = 2 * math.pi * (i + 1) / (size[0] + 1e-6)
                x = 2 * math.pi * (j + 1) / (size[1] + 1e-6)
                assert ours[i, j, k].item() == pytest.approx(turn(y / wave), abs=1e-5)
                assert ours[i, j, half + k].item() == pytest.approx(turn(x / wave), abs=1e-5)


# ------------------------------------------------------------------------------- pixel decoder

SHAPES = {f"res{i + 2}": ShapeSpec(channels=8 * (i + 1), stride=4 * 2**i) for i in range(4)}


def pixel_decoder(**changes) -> MSDeformAttnPixelDecoder:
    settings = {
        "transformer_in_features": ["res3", "res4", "res5"],
        "transformer_dropout": 0.0,
        "transformer_nheads": 4,
        "transformer_points": 2,
        "transformer_enc_layers": 1,
        "conv_dim": 32,
        "mask_dim": 12,
        "norm": "GN",
        "common_stride": 4,
    }
    return MSDeformAttnPixelDecoder(SHAPES, **(settings | changes)).eval()


def feature_maps(height: int = 64, width: int = 96) -> dict[str, Tensor]:
    return {
        name: torch.randn(2, shape.channels, height // shape.stride, width // shape.stride)
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("stride", [4, 8])
def test_pixel_decoder_gives_embeddings_at_the_common_stride(stride):
    embeddings, coarsest, levels = pixel_decoder(common_stride=stride).forward_features(
        feature_maps()
    )
    assert embeddings.shape == (2, 12, 64 // stride, 96 // stride)
    assert [tuple(x.shape[1:]) for x in levels] == [(32, 2, 3), (32, 4, 6), (32, 8, 12)]
    assert coarsest is levels[0]


def test_pixel_decoder_computes_in_fp32_under_autocast():
    decoder, maps = pixel_decoder(), feature_maps()
    plain = decoder.forward_features(maps)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decoder.forward_features(maps)[0], plain)


def test_pixel_decoder_treats_both_axes_alike():
    """Transposed maps give transposed embeddings, but for positions and convolutions."""
    decoder = pixel_decoder(transformer_enc_layers=0)
    with torch.no_grad():
        layer = decoder.layer_1.weight
        layer.copy_((layer + layer.transpose(2, 3)) / 2)
    maps = feature_maps()
    there = decoder.forward_features(maps)[0]
    back = decoder.forward_features({k: v.transpose(2, 3) for k, v in maps.items()})[0]
    torch.testing.assert_close(there, back.transpose(2, 3), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes,key",
    [
        ({"transformer_in_features": ["res4", "res5"]}, "ENCODER_IN_FEATURES"),
        ({"transformer_in_features": ["res3", "res4", "p7"]}, "ENCODER_IN_FEATURES"),
        ({"common_stride": 2}, "COMMON_STRIDE"),
        ({"common_stride": 16}, "COMMON_STRIDE"),
    ],
)
def test_pixel_decoder_refuses_features_that_do_not_fit(changes, key):
    with pytest.raises(ValueError, match=key):
        pixel_decoder(**changes)


# ------------------------------------------------------------------------- transformer decoder


@pytest.mark.parametrize("pre_norm", [False, True])
@torch.no_grad()
def test_masked_attention_by_explicit_loop(pre_norm):
    dim, heads, queries, cells = 8, 2, 3, 5
    layer = randomize(_Attention("multihead_attn", dim, heads, pre_norm)).double()
    x, memory = torch.randn(1, queries, dim).double(), torch.randn(1, cells, dim).double()
    position, memory_position = torch.randn(queries, dim).double(), torch.randn(cells, dim).double()
    blocked = torch.rand(queries, cells) < 0.5
    blocked[:, 0] = False
    mask = blocked.expand(heads, -1, -1)

    weight = layer.multihead_attn.in_proj_weight.chunk(3)
    bias = layer.multihead_attn.in_proj_bias.chunk(3)
    y = layer.norm(x) if pre_norm else x
    q = (y + position)[0] @ weight[0].T + bias[0]
    k = (memory + memory_position)[0] @ weight[1].T + bias[1]
    v = memory[0] @ weight[2].T + bias[2]
    out = torch.zeros(queries, dim).double()
    per_head = dim // heads
    for h in range(heads):
        part = slice(h * per_head, (h + 1) * per_head)
        for i in range(queries):
            seen = [j for j in range(cells) if not blocked[i, j]]
            logits = [float(q[i, part] @ k[j, part]) / math.sqrt(per_head) for j in seen]
            total = sum(math.exp(logit) for logit in logits)
            for j, logit in zip(seen, logits, strict=True):
                out[i, part] += math.exp(logit) / total * v[j, part]
    expected = x + layer.multihead_attn.out_proj(out)
    expected = expected if pre_norm else layer.norm(expected)
    actual = layer(x, position, memory, memory_position, mask)
    torch.testing.assert_close(actual, expected)


def transformer_decoder(**changes) -> MultiScaleMaskedTransformerDecoder:
    settings = {
        "num_classes": 4,
        "hidden_dim": 16,
        "num_queries": 5,
        "nheads": 2,
        "dim_feedforward": 24,
        "dec_layers": 4,
        "pre_norm": False,
        "mask_dim": 12,
        "enforce_input_project": False,
    }
    settings = {"in_channels": 16} | settings | changes
    return randomize(MultiScaleMaskedTransformerDecoder(**settings)).eval()


def decoder_inputs() -> tuple[list[Tensor], Tensor]:
    levels = [torch.randn(2, 16, 2 * 2**i, 3 * 2**i) for i in range(3)]
    return levels, torch.randn(2, 12, 16, 24)


def test_decoder_predicts_before_and_after_every_layer():
    out = transformer_decoder()(*decoder_inputs())
    predictions = [*out["aux_outputs"], out]
    assert len(predictions) == 5
    for prediction in predictions:
        assert prediction["pred_logits"].shape == (2, 5, 5)
        assert prediction["pred_masks"].shape == (2, 5, 16, 24)


def test_blocked_cells_are_those_outside_of_the_mask_and_an_empty_mask_blocks_none():
    decoder = transformer_decoder()
    masks = torch.full((1, 3, 4, 6), -5.0)
    masks[0, 1] = 5.0
    masks[0, 2, :, :2] = 5.0
    blocked = decoder._blocked(masks, (2, 3))
    assert blocked.shape == (2, 3, 6)
    for head in blocked:
        assert not head[0].any() and not head[1].any()
        assert head[2].view(2, 3).tolist() == [[False, True, True]] * 2


def test_each_image_of_a_batch_is_decoded_by_itself():
    decoder = transformer_decoder()
    levels, embeddings = decoder_inputs()
    both = decoder(levels, embeddings)["pred_masks"]
    one = decoder([x[1:] for x in levels], embeddings[1:])["pred_masks"]
    torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"in_channels": 20}, {"enforce_input_project": True}])
def test_levels_are_projected_where_they_have_to_be(changes):
    decoder = transformer_decoder(**changes)
    assert "input_proj.2.weight" in decoder.state_dict()
    assert not any(k.startswith("input_proj") for k in transformer_decoder().state_dict())
    levels = [torch.randn(1, changes.get("in_channels", 16), 2, 2) for _ in range(3)]
    assert decoder(levels, torch.randn(1, 12, 4, 4))["pred_masks"].shape == (1, 5, 4, 4)


def test_checkpoints_of_version_1_load():
    decoder = transformer_decoder()
    state = {k.replace("query_feat", "static_query"): v for k, v in decoder.state_dict().items()}
    fresh = transformer_decoder()
    fresh.load_state_dict(state)
    torch.testing.assert_close(dict(fresh.state_dict()), dict(decoder.state_dict()))
