"""DPT: the parts against explicit formulas, any input, Expedit level by level, losses, configs."""

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
from expedit_d2.projects import load_cfg
from expedit_d2.projects.DPT.modeling.losses import (
    gradient_loss,
    normalized,
    silog_loss,
    trimmed_loss,
)
from expedit_d2.projects.DPT.modeling.resize import network_size
from expedit_d2.settings import Settings
from support.dpt import CONFIGS, TINY, randomized, tiny_cfg
from support.vits import error

# Every token its own cluster: nothing is lost.
IDENTITY = {"temperature": 1e6, "neighbors": 1}
# The operator as published, in fewer steps.
PUBLISHED = {
    "temperature": 1.0,
    "iterations": 2,
    "neighbors": 3,
    "neighbor_window": 0,
    "normalize": "l2",
    "size_aware": False,
    "residual": False,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


def expedit_cfg(cfg: CfgNode, **settings) -> CfgNode:
    cfg.MODEL.EXPEDIT.ENABLED = True
    for key, value in settings.items():
        cfg.MODEL.EXPEDIT[key.upper()] = value
    return cfg


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


# --- losses ------------------------------------------------------------------------------------


def test_silog_is_its_formula_and_ignores_a_scale():
    target = torch.rand(5, 7) * 9 + 1
    prediction = target * torch.rand(5, 7).exp()
    valid = torch.rand(5, 7) > 0.3
    d = [
        (prediction[i, j].log() - target[i, j].log()).item()
        for i in range(5)
        for j in range(7)
        if valid[i, j]
    ]
    mean, square = sum(d) / len(d), sum(x * x for x in d) / len(d)
    expected = (square - 0.5 * mean**2) ** 0.5
    assert silog_loss(prediction, target, valid).item() == pytest.approx(expected, rel=1e-5)
    assert silog_loss(3 * target, target, valid, variance=1.0).item() < 1e-3
    nothing = torch.zeros_like(valid)
    assert silog_loss(prediction.requires_grad_(), target, nothing).item() == 0.0


def test_affine_invariant_loss():
    x = torch.rand(9, 11)
    valid = torch.rand(9, 11) > 0.2
    values = sorted(x[valid].tolist())
    median = values[(len(values) - 1) // 2]
    deviation = sum(abs(v - median) for v in values) / len(values)
    assert error(normalized(x, valid), (x - median) / deviation) < 1e-5
    residual = normalized(3 * x + 7, valid) - normalized(x, valid)
    assert trimmed_loss(residual, valid).item() < 1e-5
    assert gradient_loss(residual, valid).item() < 1e-3
    residual = torch.randn(9, 11)
    largest = sorted(residual[valid].abs().tolist())[: int(0.8 * valid.sum())]
    expected = sum(largest) / (2 * valid.sum().item())
    assert trimmed_loss(residual, valid).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_loss_is_its_loops():
    residual, valid = torch.randn(9, 11), torch.rand(9, 11) > 0.2
    expected = 0.0
    for step in (1, 2, 4, 8):
        r, v = residual[::step, ::step], valid[::step, ::step]
        total = 0.0
        for i in range(r.shape[0]):
            for j in range(r.shape[1]):
                for down, right in ((1, 0), (0, 1)):
                    if i + down < r.shape[0] and j + right < r.shape[1]:
                        if v[i, j] and v[i + down, j + right]:
                            total += abs(r[i + down, j + right] - r[i, j]).item()
        expected += total / max(1, v.sum().item())
    assert gradient_loss(residual, valid).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("output", ["metric", "inverse"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_few_steps_lower_the_loss(output, frozen):
    cfg = tiny_cfg(OUTPUT=output, ACTIVATION="sigmoid", INVERT=output == "metric")
    cfg.MODEL.DPT.SHIFT = 0.05
    cfg.MODEL.TIMM.FREEZE = frozen
    model = build_model(cfg).train()
    depth = torch.linspace(1, 9, 48)[:, None].expand(48, 48).clone()
    depth[:, :5] = 0  # unknown
    image = torch.rand(3, 48, 48) * 50 + depth * 20
    inputs = [{"image": image, "depth": depth}, {"image": image.flip(2), "depth": depth.flip(1)}]
    before = {name: value.clone() for name, value in model.backbone.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    totals = []
    for _ in range(8):
        losses = model(inputs)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    # Every parameter is used: what is not would stop distributed training.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert totals[-1] < 0.9 * totals[0]
    same = [torch.equal(before[n], p) for n, p in model.backbone.named_parameters()]
    assert all(same) if frozen else not any(same)
    inputs[0]["depth"] = torch.zeros(48, 48)
    assert all(torch.isfinite(loss) for loss in model(inputs).values())


# --- configs -----------------------------------------------------------------------------------


def models_of_configs() -> list[str]:
    bases = ("Base-", "Published-")
    files = [f for f in CONFIGS.rglob("*.yaml") if not f.name.startswith(bases)]
    return sorted(str(f.relative_to(CONFIGS)) for f in files)


@pytest.mark.parametrize("name", models_of_configs())
def test_every_config_builds(name):
    cfg = load_cfg(CONFIGS / name)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    settings = Settings.from_node(cfg.MODEL.EXPEDIT)
    assert (settings is None) == ("expedit" not in name)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    # Of the papers' tables; without classifiers and what is never run, 1 to 2 million.
    for kind, size in {
        "dpt_large": 343,
        "dpt_hybrid": 123,
        "v2_s": 24.8,
        "v2_b": 97.5,
        "v2_l": 335.3,
    }.items():
        if kind in name:
            assert size - 3 < millions < size + 0.5


#: Published: alpha, clusters, GFLOPs without and with Expedit (two a multiply-add).
PUBLISHED_ROWS = {
    "kitti_expedit_a7_14x56": (6, 28 * 28, 810.0, 723.4),
    "kitti_expedit_a5_20x20": (4, 20 * 20, 810.0, 631.8),
    "kitti_expedit_a5_16x16": (4, 16 * 16, 810.0, 613.6),
    "nyu_expedit_a7_24x24": (6, 24 * 24, 560.2, 504.2),
    "nyu_expedit_a5_16x16": (4, 16 * 16, 560.2, 439.2),
    "nyu_expedit_a3_14x14": (2, 14 * 14, 560.2, 395.0),
}


@pytest.mark.parametrize("name", PUBLISHED_ROWS)
def test_published_savings_say_how_many_blocks_run_before(name):
    """The published code clusters behind block alpha, counted from 0; ours counts blocks."""
    alpha, clusters, plain, with_expedit = PUBLISHED_ROWS[name]
    cfg = load_cfg(CONFIGS / f"dpt_hybrid_{name}.yaml")
    s = Settings.from_node(cfg.MODEL.EXPEDIT)
    assert s.alpha == alpha + 1 and s.grid[0] * s.grid[1] == clusters
    assert (s.temperature, s.iterations, s.window, s.neighbors) == (1.0, 5, 5, 20)
    assert (s.normalize, s.size_aware, s.residual, s.neighbor_window) == ("l2", False, False, 0)
    tokens = cfg.MODEL.DPT.SIZE[0] * cfg.MODEL.DPT.SIZE[1] // 256
    c = 768

    def block_cost(n: int) -> float:
        products, norms, scaled_logits = 12 * n * c**2 + 2 * n**2 * c, 2 * n * c, 12 * n**2
        return products + norms + scaled_logits

    saved = (12 - s.alpha) * (block_cost(tokens + 1) - block_cost(clusters + 1))
    saved -= 5 * clusters * tokens * c  # what the published counter sees of the clustering
    assert 2 * saved / 1e9 == pytest.approx(plain - with_expedit, abs=0.25)


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("BLOCKS", [0, 1, 2], r"BLOCKS must be 4 ascending indices from 0 to 3, got \[0, 1, 2\]"),
        ("BLOCKS", [0, 1, 2, 4], r"from 0 to 3, got \[0, 1, 2, 4\]"),
        ("BLOCKS", [0, 2, 1, 3], "ascending"),
        ("POSITIONS", "cubic", r"POSITIONS must be one of .*, got 'cubic'"),
        ("READOUT", "drop", r"READOUT must be one of .*, got 'drop'"),
        ("ACTIVATION", "tanh", r"ACTIVATION must be one of .*, got 'tanh'"),
        ("CHANNELS", [1, 2], r"CHANNELS must be 4 numbers, got \[1, 2\]"),
        ("OUTPUT", "disparity", r"OUTPUT must be one of .*, got 'disparity'"),
        ("SIZE_METHOD", "max", r"SIZE_METHOD must be one of .*, got 'max'"),
        ("SIZE_DIVISIBILITY", 12, "SIZE_DIVISIBILITY must be a multiple of 8, .* got 12"),
        ("SIZE", [384], r"SIZE must be \(height, width\) or None, got \[384\]"),
        ("INTERPOLATION", "nearest", r"INTERPOLATION must be one of .*, got 'nearest'"),
    ],
)
def test_errors_name_key_and_value(key, value, message):
    with pytest.raises(ValueError, match=message):
        build_model(tiny_cfg(**{key: value}))


def test_encoders_that_do_not_fit():
    for changes in ({"reg_tokens": 4}, {"no_embed_class": True}, {"pos_embed": "none"}):
        cfg = tiny_cfg()
        cfg.MODEL.TIMM.KWARGS.update(changes)
        with pytest.raises(ValueError, match="TIMM.NAME: DPT needs .* one class token"):
            build_model(cfg)
    cfg = tiny_cfg()
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.KWARGS = "eva02_tiny_patch14_224", CfgNode({"depth": 4})
    with pytest.raises(ValueError, match="TIMM.NAME: DPT needs a VisionTransformer"):
        build_model(cfg)
    cfg = tiny_cfg("hybrid")
    cfg.MODEL.TIMM.NAME = "vit_tiny_r_s16_p8_224"
    with pytest.raises(ValueError, match="stages of a ResNetV2"):
        build_model(cfg)
    with pytest.raises(ValueError, match=r"CHANNELS must be 4 numbers, the first \[256, 512\]"):
        build_model(tiny_cfg("hybrid", CHANNELS=[6, 8, 12, 14]))


def test_expedit_errors_name_the_key():
    with pytest.raises(ValueError, match="ALPHA must be in 0 to 3"):
        build_model(expedit_cfg(tiny_cfg(), alpha=4, grid=[2, 2]))
    model = build_model(expedit_cfg(tiny_cfg(), alpha=1, grid=[2, 2], reconstruct_at="head"))
    with pytest.raises(ValueError, match="RECONSTRUCT_AT"):
        model.eval()([{"image": torch.rand(3, 48, 48)}])
