"""Official checkpoints of DPT and Depth Anything V2: every key of theirs, and every error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from torch import Tensor, nn

from expedit_d2.engine import load_weights
from expedit_d2.projects import DPT, load_cfg
from expedit_d2.projects.DPT.convert import convert_checkpoint, convert_state
from support.repository import VITDET, load_tool

CONFIGS = Path(DPT.__file__).parent / "configs"
Shapes = dict[str, tuple[int, ...]]


# --- the official architectures ----------------------------------------------------------------


def affine(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def vit_keys(prefix: str, dim: int, depth: int, tokens: int, layer_scale: bool) -> Shapes:
    """A ViT but for its patches."""
    keys: Shapes = {f"{prefix}cls_token": (1, 1, dim), f"{prefix}pos_embed": (1, tokens + 1, dim)}
    for index in range(depth):
        name = f"{prefix}blocks.{index}"
        keys |= affine(f"{name}.norm1", dim) | affine(f"{name}.norm2", dim)
        keys |= affine(f"{name}.attn.qkv", 3 * dim, dim) | affine(f"{name}.attn.proj", dim, dim)
        keys |= affine(f"{name}.mlp.fc1", 4 * dim, dim) | affine(f"{name}.mlp.fc2", dim, 4 * dim)
        if layer_scale:
            keys |= {f"{name}.ls{i}.gamma": (dim,) for i in (1, 2)}
    return keys | affine(f"{prefix}norm", dim)


def resnet_keys(prefix: str) -> Shapes:
    """Three stages of a ResNet-50 with group norm and convolutions without bias."""
    keys: Shapes = {f"{prefix}stem.conv.weight": (64, 3, 7, 7), **affine(f"{prefix}stem.norm", 64)}
    inputs = 64
    for stage, depth in enumerate((3, 4, 9)):
        width, outputs = 64 * 2**stage, 256 * 2**stage
        for index in range(depth):
            name = f"{prefix}stages.{stage}.blocks.{index}"
            if index == 0:
                keys[f"{name}.downsample.conv.weight"] = (outputs, inputs, 1, 1)
                keys |= affine(f"{name}.downsample.norm", outputs)
            keys[f"{name}.conv1.weight"] = (width, inputs, 1, 1)
            keys[f"{name}.conv2.weight"] = (width, width, 3, 3)
            keys[f"{name}.conv3.weight"] = (outputs, width, 1, 1)
            for i, channels in enumerate((width, width, outputs)):
                keys |= affine(f"{name}.norm{i + 1}", channels)
            inputs = outputs
    return keys


def scratch_keys(prefix: str, channels: list[int], features: int) -> Shapes:
    keys: Shapes = {}
    for i, width in enumerate(channels, start=1):
        keys[f"{prefix}layer{i}_rn.weight"] = (features, width, 3, 3)
        keys |= affine(f"{prefix}refinenet{i}.out_conv", features, features, 1, 1)
        for unit in (1, 2):
            for conv in (1, 2):
                name = f"{prefix}refinenet{i}.resConfUnit{unit}.conv{conv}"
                keys |= affine(name, features, features, 3, 3)
    return keys


def resize_keys(name: str, level: int, width: int) -> Shapes:
    side = {0: 4, 1: 2, 3: 3}.get(level)
    return affine(name, width, width, side, side) if side else {}


def dpt_keys(
    dim: int, depth: int, channels: list[int], features: int, patch: int, tokens: int, hybrid: bool
) -> Shapes:
    model = "pretrained.model."
    keys = vit_keys(model, dim, depth, tokens, False) | affine(f"{model}head", 1000, dim)
    if hybrid:
        keys |= resnet_keys(f"{model}patch_embed.backbone.")
        keys |= affine(f"{model}patch_embed.proj", dim, 1024, 1, 1)
    else:
        keys |= affine(f"{model}patch_embed.proj", dim, 3, patch, patch)
    for i, width in enumerate(channels):
        if hybrid and i < 2:
            continue
        name = f"pretrained.act_postprocess{i + 1}"
        keys |= affine(f"{name}.0.project.0", dim, 2 * dim) | affine(f"{name}.3", width, dim, 1, 1)
        keys |= resize_keys(f"{name}.4", i, width)
    keys |= scratch_keys("scratch.", channels, features)
    out = "scratch.output_conv."
    keys |= affine(f"{out}0", features // 2, features, 3, 3)
    return keys | affine(f"{out}2", 32, features // 2, 3, 3) | affine(f"{out}4", 1, 32, 1, 1)


def depth_anything_keys(
    dim: int, depth: int, channels: list[int], features: int, patch: int, tokens: int
) -> Shapes:
    keys = vit_keys("pretrained.", dim, depth, tokens, True) | {"pretrained.mask_token": (1, dim)}
    keys |= affine("pretrained.patch_embed.proj", dim, 3, patch, patch)
    for i, width in enumerate(channels):
        keys |= affine(f"depth_head.projects.{i}", width, dim, 1, 1)
        keys |= resize_keys(f"depth_head.resize_layers.{i}", i, width)
    keys |= scratch_keys("depth_head.scratch.", channels, features)
    out = "depth_head.scratch.output_conv"
    keys |= affine(f"{out}1", features // 2, features, 3, 3)
    return keys | affine(f"{out}2.0", 32, features // 2, 3, 3) | affine(f"{out}2.2", 1, 32, 1, 1)


NEVER_RUN = {f"refinenet4.resConfUnit1.conv{c}.{p}" for c in (1, 2) for p in ("weight", "bias")}
DPT_UNUSED = {f"scratch.{key}" for key in NEVER_RUN} | {
    f"pretrained.model.{name}.{p}" for name in ("norm", "head") for p in ("weight", "bias")
}
DA_UNUSED = {f"depth_head.scratch.{key}" for key in NEVER_RUN} | {"pretrained.mask_token"}
LARGE = [256, 512, 1024, 1024]
OFFICIAL = {
    "dpt_large_midas": (dpt_keys(1024, 24, LARGE, 256, 16, 576, False), DPT_UNUSED),
    "dpt_hybrid_midas": (dpt_keys(768, 12, [256, 512, 768, 768], 256, 1, 576, True), DPT_UNUSED),
    "depth_anything_v2_s": (
        depth_anything_keys(384, 12, [48, 96, 192, 384], 64, 14, 1369),
        DA_UNUSED,
    ),
    "depth_anything_v2_b": (
        depth_anything_keys(768, 12, [96, 192, 384, 768], 128, 14, 1369),
        DA_UNUSED,
    ),
    "depth_anything_v2_l": (depth_anything_keys(1024, 24, LARGE, 256, 14, 1369), DA_UNUSED),
}


def build_on_meta(path: Path) -> nn.Module:
    cfg = load_cfg(path)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_key_has_its_place(name):
    shapes, unused = OFFICIAL[name]
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model = build_on_meta(CONFIGS / f"{name}.yaml")
    conversion = convert_state(state, model)
    assert not conversion.missing
    assert set(conversion.unused) == unused
    assert set(conversion.renamed) == set(shapes) - unused
    assert set(conversion.weights) == set(model.state_dict())
    assert len(set(conversion.renamed.values())) == len(conversion.renamed)


# --- small ones --------------------------------------------------------------------------------

TINY = {
    "DPT": dpt_keys(24, 4, [6, 8, 12, 14], 10, 8, 36, False),
    "DepthAnything": depth_anything_keys(24, 4, [6, 8, 12, 14], 10, 8, 36),
}


@pytest.fixture(params=TINY)
def kind(request) -> str:
    return request.param


@pytest.fixture
def config(kind, tmp_path) -> Path:
    """A config file of the small architecture."""
    node = {"BLOCKS": [0, 1, 2, 3], "CHANNELS": [6, 8, 12, 14], "FEATURES": 10, "SIZE": None}
    kwargs = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 48}
    base = "Base-DPT.yaml"
    if kind == "DepthAnything":
        base, kwargs["init_values"] = "Base-DepthAnythingV2.yaml", 1.0
    node["SIZE_DIVISIBILITY"] = 8
    content = {
        "_BASE_": str(CONFIGS / base),
        "MODEL": {"TIMM": {"NAME": "vit_small_patch16_224", "KWARGS": kwargs}, "DPT": node},
    }
    path = tmp_path / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def state(kind) -> dict[str, Tensor]:
    return {key: torch.randn(shape) for key, shape in TINY[kind].items()}


@pytest.fixture
def source(state, tmp_path) -> Path:
    path = tmp_path / "official.pth"
    torch.save(state, path)
    return path


def test_tool_converts_and_the_model_loads(kind, config, state, source, tmp_path, capsys):
    target = tmp_path / "converted.pth"
    load_tool("convert_dpt").run(["--config-file", str(config), str(source), str(target)])
    said = capsys.readouterr().out
    unused = DPT_UNUSED if kind == "DPT" else DA_UNUSED
    assert f"{len(state) - len(unused)} keys renamed, {len(unused)} not used, 0 missing" in said
    assert all(f"not used: {key} (" in said for key in unused)
    model = build_model(load_cfg(config)).eval()
    load_weights(model, str(target))
    own = model.state_dict()
    for key, target_key in convert_state(state, model).renamed.items():
        assert torch.equal(own[target_key], state[key])
    # A few, by what they do: readout, enlarging, skip unit, last convolution.
    out = "scratch.output_conv.4" if kind == "DPT" else "depth_head.scratch.output_conv2.2"
    scratch = "scratch" if kind == "DPT" else "depth_head.scratch"
    resize = "pretrained.act_postprocess1.4" if kind == "DPT" else "depth_head.resize_layers.0"
    head = model.head
    assert torch.equal(head.predict[2].weight, state[f"{out}.weight"])
    assert torch.equal(head.reassemble[0].resize.weight, state[f"{resize}.weight"])
    skip = state[f"{scratch}.refinenet2.resConfUnit1.conv2.bias"]
    assert torch.equal(head.fusions[1].level.conv2.bias, skip)
    if kind == "DPT":
        readout = state["pretrained.act_postprocess3.0.project.0.weight"]
        assert torch.equal(head.reassemble[2].readout.weight, readout)


def test_weights_beside_an_optimizer(config, state, tmp_path):
    path = tmp_path / "training.pt"
    torch.save({"model": state, "optimizer": {"lr": 0.1}}, path)
    conversion = convert_checkpoint(str(path), str(tmp_path / "out.pth"), build_on_meta(config))
    assert {*conversion.renamed, *conversion.unused} == set(state)


def test_unknown_keys_are_reported(config, state):
    state["pretrained.model.extra" if "scratch.layer1_rn.weight" in state else "strange"] = (
        torch.ones(1)
    )
    conversion = convert_state(state, build_on_meta(config))
    (key,) = (k for k, why in conversion.unused.items() if why == "not known here")
    assert key in ("pretrained.model.extra", "strange")
    assert f"not used: {key} (not known here)" in conversion.summary()


def test_missing_keys_write_nothing(config, state, tmp_path):
    lost = next(k for k in state if k.endswith("layer2_rn.weight"))
    del state[lost]
    source, target = tmp_path / "lost.pth", tmp_path / "out.pth"
    torch.save(state, source)
    with pytest.raises(ValueError, match="has nothing for head.layers.1.weight of the model; is"):
        convert_checkpoint(str(source), str(target), build_on_meta(config))
    assert not target.exists()


def test_another_architecture_is_named(config, state):
    key = next(k for k in state if k.endswith("layer2_rn.weight"))
    state[key] = torch.zeros(10, 9, 3, 3)
    with pytest.raises(ValueError, match=r"layer2_rn.weight is \(10, 9, 3, 3\) .* \(10, 8, 3, 3\)"):
        convert_state(state, build_on_meta(config))
    positions = next(k for k in state if k.endswith("pos_embed"))
    state[positions] = torch.zeros(1, 50, 24)
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 50, 24\) .* \(1, 37, 24\).* 1 more"):
        convert_state(state, build_on_meta(config))


def test_weights_of_the_encoder_are_not_fetched(config, source, tmp_path):
    """Shapes are all that the config is needed for."""
    target = tmp_path / "out.pth"
    opts = ["MODEL.TIMM.CHECKPOINT", "pypi://none", "MODEL.TIMM.PRETRAINED", "True"]
    load_tool("convert_dpt").run(["--config-file", str(config), str(source), str(target), *opts])
    assert target.is_file()


def test_another_model_is_refused(config, state, source, tmp_path):
    tool, target = load_tool("convert_dpt"), tmp_path / "out.pth"
    with pytest.raises(SystemExit, match="META_ARCHITECTURE is 'GeneralizedRCNN', not 'DPT'"):
        tool.run(["--config-file", VITDET, str(source), str(target)])
    deeper = next(key for key in state if ".blocks.0." in key).replace(".blocks.0.", ".blocks.9.")
    torch.save(state | {deeper: torch.ones(1)}, source)
    with pytest.raises(SystemExit, match=f"{deeper} is not in the model; is this the right"):
        tool.run(["--config-file", str(config), str(source), str(target)])
    key = next(key for key in state if key.endswith("blocks.1.attn.qkv.weight"))
    torch.save(state | {key: state[key] / 0}, source)
    with pytest.raises(SystemExit, match=r"blocks.1.attn.qkv.weight is not finite"):
        tool.run(["--config-file", str(config), str(source), str(target)])
    assert not target.exists()


class _Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_files_that_are_refused(config, source, tmp_path):
    tool, target = load_tool("convert_dpt"), tmp_path / "target.pth"

    def refused(file: Path, message: str) -> None:
        with pytest.raises(SystemExit, match=message):
            tool.run(["--config-file", str(config), str(file), str(target)])
        assert not target.exists()

    refused(tmp_path / "none.pth", "the checkpoint: there is no file '.*none.pth'")
    other = tmp_path / "other.pth"
    torch.save({"layer.weight": torch.ones(1)}, other)
    refused(other, "not a checkpoint of DPT or Depth Anything V2.*'layer.weight'")
    torch.save([1, 2], other)
    refused(other, "must contain weights by name, got a list")
    torch.save({"scratch.x": _Harmful()}, other)
    refused(other, "contains .*exec, and loading that can run any code")
    other.write_bytes(b"nothing")
    refused(other, "is not a checkpoint, or is damaged")
    target.write_text("mine")
    with pytest.raises(SystemExit, match="already exists"):
        tool.run(["--config-file", str(config), str(source), str(target)])
    assert target.read_text() == "mine"
    with pytest.raises(SystemExit, match="there is no folder '.*nowhere' to write to"):
        tool.run(["--config-file", str(config), str(source), str(tmp_path / "nowhere" / "x.pth")])
    with pytest.raises(SystemExit, match="there is no config file"):
        tool.run(["--config-file", "none.yaml", str(source), str(tmp_path / "x.pth")])
