"""DPT against explicit formulas: any input, Expedit level by level."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from expedit_d2 import expedite
from expedit_d2.analysis.flops import count_flops
from expedit_d2.operators import cluster_tokens, reconstruct_tokens
from expedit_d2.projects.DPT.modeling.resize import network_size
from support.dpt import TINY, expedit_cfg, randomized, tiny_cfg
from support.tensors import IDENTITY, error

PUBLISHED = {
    "temperature": 1.0,
    "iterations": 2,
    "neighbors": 3,
    "neighbor_window": 0,
    "normalize": "l2",
    "size_aware": False,
    "residual": False,
}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {kind: randomized(build_model(tiny_cfg(kind))) for kind in TINY}


# --- an explicit implementation ----------------------------------------------------------------


def tent(t: float) -> float:
    return max(0.0, 1 - abs(t))


def keys_cubic(t: float, a: float = -0.75) -> float:
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def sampling(size: int, places: list[float], kernel=tent) -> Tensor:
    """Matrix (len(places), size) that reads a row at places between its values."""
    matrix = torch.zeros(len(places), size, dtype=torch.float64)
    for row, place in enumerate(places):
        for source in range(int(place // 1) - 1, int(place // 1) + 3):
            matrix[row, min(max(source, 0), size - 1)] += kernel(place - source)
    return matrix


def corners(size: int, to: int) -> list[float]:
    """First and last value stay where they are."""
    return [i * (size - 1) / max(to - 1, 1) for i in range(to)]


def resampled(x: Tensor, places: list[list[float]], kernel=tent) -> Tensor:
    rows, cols = (sampling(n, p, kernel).to(x) for n, p in zip(x.shape[-2:], places, strict=True))
    return rows @ x @ cols.T


def enlarged(x: Tensor, size) -> Tensor:
    return resampled(x, [corners(n, to) for n, to in zip(x.shape[-2:], size, strict=True)])


def positions(table: Tensor, own: int, size: tuple[int, int], kind: str) -> Tensor:
    """(1, 1 + own^2, C) to (1, 1 + h * w, C)."""
    if size == (own, own):
        return table
    tokens = table[:, 1:].transpose(1, 2).unflatten(2, (own, own))
    offset, kernel = (0.1, keys_cubic) if kind == "bicubic" else (0.0, tent)
    places = [[(i + 0.5) * own / (n + offset) - 0.5 for i in range(n)] for n in size]
    if kernel is tent:
        places = [[min(max(p, 0.0), own - 1.0) for p in row] for row in places]
    tokens = resampled(tokens, places, kernel)
    return torch.cat([table[:, :1], tokens.flatten(2).transpose(1, 2)], dim=1)


def norm(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def block(x: Tensor, p: dict[str, Tensor], name: str, heads: int) -> Tensor:
    """A transformer block, with LayerScale where there is one."""
    scale = [p.get(f"{name}.ls{i}.gamma", 1.0) for i in (1, 2)]
    qkv = linear(norm(x, p, f"{name}.norm1"), p, f"{name}.attn.qkv")
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
    x = x + scale[0] * linear((weights @ v).transpose(1, 2).flatten(2), p, f"{name}.attn.proj")
    hidden = gelu(linear(norm(x, p, f"{name}.norm2"), p, f"{name}.mlp.fc1"))
    return x + scale[1] * linear(hidden, p, f"{name}.mlp.fc2")


def explicit_levels(images: Tensor, p: dict[str, Tensor], cfg: CfgNode) -> list[Tensor]:
    """Tokens (B, 1 + h * w, C) of the four blocks of a plain ViT."""
    vit, node, heads = "backbone.vit.", cfg.MODEL.DPT, cfg.MODEL.TIMM.KWARGS.num_heads
    patch = cfg.MODEL.TIMM.KWARGS.patch_size
    size = tuple(side // patch for side in images.shape[-2:])
    patches = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B, 3, h, u, w, v
    weight = p[vit + "patch_embed.proj.weight"]
    x = torch.einsum("bchuwv,ocuv->bhwo", patches, weight) + p[vit + "patch_embed.proj.bias"]
    x = torch.cat([p[vit + "cls_token"].expand(len(x), 1, -1), x.flatten(1, 2)], dim=1)
    own = cfg.MODEL.TIMM.KWARGS.img_size // patch
    x = x + positions(p[vit + "pos_embed"], own, size, node.POSITIONS)
    levels = []
    for index in range(cfg.MODEL.TIMM.KWARGS.depth):
        x = block(x, p, f"{vit}blocks.{index}", heads)
        levels.append(norm(x, p, vit + "norm") if node.NORM else x)
    return levels


def explicit_head(levels, size, p: dict[str, Tensor], readout: str) -> Tensor:
    """Tokens (B, 1 + h * w, C), or a map, of each level to (B, H, W)."""
    head = "head."
    conv = lambda x, name: F.conv2d(  # noqa: E731
        x,
        p[f"{head}{name}.weight"],
        p.get(f"{head}{name}.bias"),
        padding=p[f"{head}{name}.weight"].shape[-1] // 2,
    )
    unit = lambda x, name: (  # noqa: E731
        x + conv(conv(x.clamp_min(0), f"{name}.conv1").clamp_min(0), f"{name}.conv2")
    )
    maps = []
    for index, x in enumerate(levels):
        if x.dim() == 3:
            token, x = x[:, :1], x[:, 1:]
            name = f"reassemble.{index}"
            if readout == "project":
                x = gelu(
                    linear(torch.cat([x, token.expand_as(x)], -1), p, head + f"{name}.readout")
                )
            elif readout == "add":
                x = x + token
            x = conv(x.transpose(1, 2).unflatten(2, size), f"{name}.project")
            if index < 2:
                weight = p[f"{head}{name}.resize.weight"]
                x = torch.einsum("bchw,couv->bohuwv", x, weight).flatten(4).flatten(2, 3)
                x = x + p[f"{head}{name}.resize.bias"][:, None, None]
            elif index == 3:
                x = conv(x, f"{name}.resize")[..., ::2, ::2]
        maps.append(conv(x, f"layers.{index}"))
    x = None
    for index in (3, 2, 1, 0):
        y = maps[index] if x is None else x + unit(maps[index], f"fusions.{index}.level")
        larger = maps[index - 1].shape[-2:] if index else [2 * n for n in maps[0].shape[-2:]]
        x = conv(
            enlarged(unit(y, f"fusions.{index}.refine"), larger),
            f"fusions.{index}.out",
        )
    return conv(x, "reduce")


def explicit_output(x: Tensor, size, p: dict[str, Tensor]) -> Tensor:
    x = enlarged(x, size)
    x = F.conv2d(x, p["head.predict.0.weight"], p["head.predict.0.bias"], padding=1).clamp_min(0)
    x = F.conv2d(x, p["head.predict.2.weight"], p["head.predict.2.bias"])
    return x.clamp_min(0)[:, 0]


@pytest.mark.parametrize("size", [(48, 48), (32, 72)])
@pytest.mark.parametrize(
    "kind,readout", [("DPT", "project"), ("DPT", "add"), ("DepthAnything", "ignore")]
)
def test_plain_models_are_their_formulas(kind, readout, size):
    cfg = tiny_cfg(kind, READOUT=readout)
    model = randomized(build_model(cfg)).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    p = {name: value.detach() for name, value in model.state_dict().items()}
    levels = explicit_levels(images, p, cfg)
    grid = tuple(side // 8 for side in size)
    expected = explicit_output(explicit_head(levels, grid, p, readout), size, p)
    with torch.no_grad():
        for level, tokens in zip(model.backbone(images), levels, strict=True):
            assert error(level.class_token, tokens[:, 0]) < 1e-9
            assert error(level.features, tokens[:, 1:].transpose(1, 2).unflatten(2, grid)) < 1e-9
        actual = model.predict(images)
    assert expected.std() > 1e-3
    assert error(actual, expected.float()) < 1e-5


def test_hybrid_reads_two_stages_of_its_resnet(models):
    model = models["hybrid"]
    vit, images = model.backbone.vit, torch.randn(2, 3, 64, 64)
    seen = []
    stages = vit.patch_embed.backbone.stages
    hooks = [s.register_forward_hook(lambda m, a, out: seen.append(out)) for s in stages[:2]]
    with torch.no_grad():
        # At the size of its table, timm's own way is the same.
        tokens = vit.forward_intermediates(
            images, [1, 2], return_prefix_tokens=True, intermediates_only=True
        )
        for hook in hooks:
            hook.remove()
        levels = model.backbone(images)
        assert [tuple(level.features.shape[1:]) for level in levels[:2]] == [
            (256, 16, 16),
            (512, 8, 8),
        ]
        for level, stage in zip(levels[:2], seen, strict=True):
            assert torch.equal(level.features, stage) and level.class_token is None
        for level, (features, prefix) in zip(levels[2:], tokens, strict=True):
            assert error(level.features, features) < 1e-5
            assert error(level.class_token, prefix[:, 0]) < 1e-5
        p = model.state_dict()
        sequences = [level.features for level in levels[:2]]
        sequences += [torch.cat([t.transpose(1, 2), f.flatten(2)], 2).mT for f, t in tokens]
        expected = explicit_output(explicit_head(sequences, (4, 4), p, "project"), (64, 64), p)
        assert error(model.predict(images), expected) < 1e-4


@pytest.mark.parametrize("size", [(64, 96), (32, 160)])
def test_hybrid_at_other_sizes(models, size):
    assert models["hybrid"].predict(torch.randn(1, 3, *size)).shape == (1, *size)


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size,target,multiple,method,expected",
    [
        ((384, 384), (384, 384), 32, "minimal", (384, 384)),
        ((480, 640), (384, 384), 32, "minimal", (384, 512)),
        ((375, 1242), (384, 384), 32, "minimal", (384, 1280)),
        ((352, 1216), (352, 1216), 32, "minimal", (352, 1216)),
        ((480, 640), (518, 518), 14, "lower_bound", (518, 686)),
        ((1000, 500), (518, 518), 14, "lower_bound", (1036, 518)),
        ((480, 640), (518, 518), 14, "upper_bound", (392, 518)),
        ((500, 741), None, 32, "minimal", (512, 736)),
        ((3, 500), None, 16, "minimal", (16, 496)),
    ],
)
def test_network_size(size, target, multiple, method, expected):
    assert network_size(size, target, multiple, method) == expected


def test_images_of_any_size_in_one_batch(models):
    model = models["DPT"]
    inputs = [
        {"image": torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)},
        {"image": torch.rand(3, 61, 33) * 255, "height": 122, "width": 67},
        {"image": torch.rand(3, 40, 56) * 255, "height": 40, "width": 56},
    ]
    with torch.no_grad():
        together = model(inputs)
        alone = [model([item])[0] for item in inputs]
    assert [tuple(o["depth"].shape) for o in together] == [(40, 56), (122, 67), (40, 56)]
    for a, b in zip(together, alone, strict=True):
        assert error(a["depth"], b["depth"]) < 1e-5


def test_network_sees_the_size_of_the_config():
    cfg = tiny_cfg(SIZE=[32, 48], SIZE_METHOD="lower_bound")
    model = randomized(build_model(cfg))
    image = torch.rand(3, 100, 100) * 255
    small = F.interpolate((image[None] - 127.5) / 127.5, (48, 48), mode="bicubic")
    with torch.no_grad():
        expected = F.interpolate(model.predict(small)[None], (100, 100), mode="bicubic")[0, 0]
        assert error(model([{"image": image}])[0]["depth"], expected) < 1e-5


def test_kernels_of_the_hybrid_are_standardised_by_std_and_epsilon(models):
    """(w - mean) / (std + 1e-5) of each output channel, as timm 0.4.5 had it; in float64."""
    resnet = models["hybrid"].backbone.vit.patch_embed.backbone
    convs = [m for m in resnet.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) > 40
    with torch.no_grad():
        for conv, size in zip((convs[0], convs[-1]), ((21, 34), (6, 9)), strict=True):
            conv = copy.deepcopy(conv).double()
            conv.weight.mul_(0.01)  # where the epsilon counts
            w = conv.weight.numpy()
            flat = w.reshape(len(w), -1)
            kernels = [(k - k.mean()) / (np.std(k) + 1e-5) for k in flat]
            x = torch.randn(2, w.shape[1], *size, dtype=torch.float64)
            # TensorFlow's padding: as many outputs as strides, the odd pixel at the end.
            pads = []
            for n, k, s in zip(size[::-1], conv.kernel_size, conv.stride, strict=True):
                total = max((-(-n // s) - 1) * s + k - n, 0)
                pads += [total // 2, total - total // 2]
            weight = torch.from_numpy(np.stack(kernels).reshape(w.shape))
            expected = F.conv2d(F.pad(x, pads), weight, stride=conv.stride)
            torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["DPT", "hybrid"])
def test_autocast_puts_out_fp32(models, kind):
    image = {"image": torch.rand(3, 64, 64) * 255}
    with torch.no_grad():
        expected = models[kind]([image])[0]["depth"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = models[kind]([image])[0]["depth"]
    assert actual.dtype == torch.float32
    assert error(actual, expected) < 0.1


def test_output_is_scaled_shifted_and_inverted():
    torch.manual_seed(1)
    plain = randomized(build_model(tiny_cfg(ACTIVATION="sigmoid")))
    metric = build_model(
        tiny_cfg(ACTIVATION="sigmoid", SCALE=0.5, SHIFT=0.25, INVERT=True, OUTPUT="metric")
    ).eval()
    metric.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        y = plain.predict(images)
        assert ((y > 0) & (y < 1)).all()
        assert torch.allclose(metric.predict(images), 1 / (0.5 * y + 0.25))


# --- Expedit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TINY)
def test_switched_off_is_bit_for_bit_the_plain_model(models, kind):
    model, image = models[kind], [{"image": torch.rand(3, 64, 64) * 255}]
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = model(image)[0]["depth"]
        handle = expedite(model, 1, ratio=0.5)
        assert list(model.state_dict()) == keys
        assert error(model(image)[0]["depth"], expected) > 1e-4
        handle.remove()
        assert torch.equal(model(image)[0]["depth"], expected)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("kind", TINY)
def test_one_cluster_a_token_is_the_plain_model(models, kind, residual):
    model, image = models[kind], [{"image": torch.rand(3, 64, 96) * 255}]
    with torch.no_grad():
        expected = model(image)[0]["depth"]
        with expedite(model, 1, ratio=1.0, residual=residual, **IDENTITY):
            assert error(model(image)[0]["depth"], expected) < 1e-4


@pytest.mark.parametrize("kind", TINY)
def test_each_level_is_rebuilt(models, kind):
    """The levels behind alpha, by hand with the operators."""
    encoder, images, alpha, grid = models[kind].backbone, torch.randn(2, 3, 64, 96), 1, (2, 3)
    size = tuple(side // encoder.stride for side in (64, 96))
    seen: dict[int, Tensor] = {}
    hooks = [
        b.register_forward_hook(lambda m, args, out, i=i: seen.setdefault(i, out))
        for i, b in enumerate(encoder.vit.blocks)
    ]
    with torch.no_grad():
        plain = encoder(images)
        for hook in hooks:
            hook.remove()
        x = seen[alpha - 1]
        tokens = x[:, 1:].unflatten(1, size)
        clusters = cluster_tokens(tokens, grid, iterations=2, temperature=1.0).features
        x = torch.cat([x[:, :1], clusters.flatten(1, 2)], dim=1)
        expected = {}
        for index in range(alpha, len(encoder.vit.blocks)):
            x = encoder.vit.blocks[index](x)
            rebuilt = reconstruct_tokens(
                x[:, 1:].unflatten(1, grid), tokens, clusters, 3, 1.0, "l2", None
            )
            level = torch.cat([x[:, :1], rebuilt.flatten(1, 2)], dim=1)
            expected[index] = encoder.vit.norm(level)
        with expedite(encoder, alpha, grid=grid, **PUBLISHED) as handle:
            runs = []
            (method,) = handle.blocks.methods.values()
            method.rebuild.register_forward_hook(lambda *args: runs.append(1))
            levels = encoder(images)
    assert len(runs) == sum(b >= alpha for b in encoder.blocks)
    first = len(levels) - len(encoder.blocks)
    for index, (level, before) in enumerate(zip(levels, plain, strict=True)):
        block_index = encoder.blocks[index - first] if index >= first else -1
        if block_index < alpha:
            assert torch.equal(level.features, before.features)
            continue
        tokens = expected[block_index]
        assert error(level.class_token, tokens[:, 0]) < 1e-5
        assert error(level.features, tokens[:, 1:].transpose(1, 2).unflatten(2, size)) < 1e-5
        assert error(level.features, before.features) > 1e-3


def test_config_expedites_and_rebuilds_only_what_is_read():
    cfg = expedit_cfg(tiny_cfg(), alpha=1, grid=[3, 3])
    model = build_model(cfg)
    assert model.backbone.vit.blocks.outputs == (0, 1, 2, 3)
    plain = build_model(tiny_cfg())
    assert list(plain.state_dict()) == list(model.state_dict())


@pytest.mark.slow
def test_flops_count_everything(models):
    image = [{"image": torch.rand(3, 64, 96) * 255}]
    for kind, model in models.items():
        plain = count_flops(model, image)
        with expedite(model, 1, grid=(2, 3)):
            ours = count_flops(model, image)
        assert not {*plain.uncounted, *ours.uncounted}, kind
        assert ours.head == plain.head and ours.embed == plain.embed
        assert 0 < ours.after < plain.before
        assert min(ours.clustering, ours.reconstruction) > 0
