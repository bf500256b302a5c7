"""timm's plain ViTs as a Detectron2 backbone: maps, images of any size, weights, Mask2Former."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_backbone, build_model
from torch import Tensor, nn

from expedit_d2 import expedite
from expedit_d2.analysis.flops import count_flops
from expedit_d2.api import is_expedited
from expedit_d2.backbones import add_timm_config
from expedit_d2.backbones.timm_vit import TimmNet, create_timm_vit
from expedit_d2.projects import Mask2Former, get_cfg
from support.repository import MASK2FORMER
from support.tensors import IDENTITY, error, perturbed

CONFIGS = Path(Mask2Former.__file__).parent / "configs"
TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2}
# name: side of a patch, and of the token it makes
NAMES = {
    "vit_small_patch16_224": (16, 16),
    "vit_small_patch8_224": (8, 8),
    "vit_base_patch16_224.mae": (16, 16),
    "vit_small_patch14_dinov2": (14, 16),
    "vit_small_patch14_reg4_dinov2": (14, 16),
    "vit_base_patch16_clip_224": (16, 16),  # a norm before the blocks
    "vit_base_patch16_siglip_224": (16, 16),  # attention pooling, no class token
    "vit_medium_patch16_reg4_gap_256": (16, 16),  # a norm behind the pooling, not before
    "vit_small_patch16_dinov3": (16, 16),
    "eva02_tiny_patch14_224": (14, 16),
    "vit_pe_core_small_patch16_384": (16, 16),
    "vit_small_patch16_rope_mixed_224": (16, 16),
}


def config(name: str = "vit_small_patch16_dinov3", expedit: dict | None = None, **keys) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_timm_vit_backbone"
    cfg.MODEL.TIMM.NAME = name
    cfg.MODEL.TIMM.KWARGS.update(TINY)
    cfg.MODEL.TIMM.OUT_CHANNELS = 16
    cfg.MODEL.TIMM.update(keys)
    cfg.MODEL.EXPEDIT.update({"ENABLED": bool(expedit)} | (expedit or {}))
    return cfg


def build(*args, **kwargs) -> nn.Module:
    return perturbed(build_backbone(config(*args, **kwargs)))


def images(height: int = 96, width: int = 128, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width)


@torch.no_grad()
def run(backbone, x: Tensor) -> dict[str, Tensor]:
    return backbone(x)


def token_map(backbone, x: Tensor) -> Tensor:
    return run(backbone.net, x)["last_feat"]


# --- the plain backbone ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_token_map_is_timms(name):
    patch, stride = NAMES[name]
    backbone = build(name)
    plain = timm.create_model(name, num_classes=0, dynamic_img_size=True, **TINY).eval()
    prefix = "net.model."
    weights = {
        key.removeprefix(prefix): value
        for key, value in backbone.state_dict().items()
        if key.startswith(prefix)
    }
    # timm's keys; what only pools the tokens is not there.
    pooling = {k for k in plain.state_dict() if k.startswith(("attn_pool.", "fc_norm."))}
    assert set(weights) == set(plain.state_dict()) - pooling
    assert {key.split(".")[0] for key in backbone.state_dict()} == {"net"} | {
        f"simfp_{level + int(stride > 8)}" for level in range(1, 5)
    }
    plain.load_state_dict(weights, strict=False)

    x = images(6 * stride, 7 * stride)
    resized = x if patch == stride else F.interpolate(x, scale_factor=14 / 16, mode="bilinear")
    assert resized.shape[2:] == (6 * patch, 7 * patch)
    (expected,) = plain.forward_intermediates(
        resized, indices=[2], norm=True, intermediates_only=True
    )
    assert torch.equal(token_map(backbone, x), expected)
    features = plain.forward_features(resized)[:, plain.num_prefix_tokens :]
    assert torch.equal(expected.flatten(2).transpose(1, 2), features)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch8_224"])
@pytest.mark.parametrize("size", [(64, 64), (150, 203), (97, 33), (40, 300)])
def test_images_of_any_size(name, size):
    backbone = build(name)
    stride = NAMES[name][1]
    shapes = backbone.output_shape()
    assert [shape.stride for shape in shapes.values()] == [
        stride * s // 4 for s in (1, 2, 4, 8, 16)
    ]
    features = run(backbone, images(*size))
    assert list(features) == list(shapes) == ["p2", "p3", "p4", "p5", "p6"]
    rows, cols = (-(-side // stride) for side in size)
    for name, scale in (("p2", 4), ("p3", 2), ("p4", 1)):
        assert features[name].shape == (2, 16, rows * scale, cols * scale)
    assert features["p5"].shape == (2, 16, rows // 2, cols // 2)
    # A padded image is the same as one with zeros.
    x = images(*size)
    padded = F.pad(x, (0, cols * stride - size[1], 0, rows * stride - size[0]))
    assert torch.equal(token_map(backbone, x), token_map(backbone, padded))


@pytest.mark.parametrize(
    ("patch", "stride", "name"),
    [
        (16, None, "vit_small_patch16_224"),
        (14, None, "vit_small_patch14_dinov2"),
        (8, 16, "vit_small_patch8_224"),
    ],
)
def test_a_token_shows_its_own_pixels(patch, stride, name):
    model = create_timm_vit(name, **TINY)
    net, seen = TimmNet(model, stride), []
    model.patch_embed.register_forward_hook(lambda m, args, out: seen.append(out))
    x = images(64, 80, batch=1).requires_grad_()
    assert net(x)["last_feat"].shape == (1, 32, 4, 5)
    (embedded,) = seen  # (1, 4, 5, 32)
    (gradient,) = torch.autograd.grad(embedded[0, 1, 3].sum(), x)
    rows, cols = gradient[0].abs().sum(0).nonzero().unbind(1)
    # Token (1, 3) of 16 x 16 pixels, and no further than a bilinear filter reaches.
    reach = 0 if patch == 16 else 1
    assert 16 <= rows.min() + reach and rows.max() - reach <= 31
    assert 48 <= cols.min() + reach and cols.max() - reach <= 63
    assert len(rows.unique()) >= 16 and len(cols.unique()) >= 16


def test_every_weight_is_trained():
    for name in NAMES:
        backbone = build(name).train()
        loss = sum((f * torch.randn_like(f)).sum() for f in backbone(images()).values())
        loss.backward()
        for key, parameter in backbone.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (name, key)


def test_frozen_trains_the_pyramid_alone():
    backbone = build(FREEZE=True).train()
    sum(f.sum() for f in backbone(images()).values()).backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.requires_grad == key.startswith("simfp_"), key
        assert (parameter.grad is None) == key.startswith("net."), key


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_small_patch16_dinov3"])
def test_checkpointing_gradients_changes_nothing(name):
    expedit = {"ALPHA": 1, "RATIO": 0.6}
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        backbone = build(name, expedit, GRAD_CHECKPOINTING=on).train()
        sum(f.square().mean() for f in backbone(images()).values()).backward()
        grads.append({key: p.grad for key, p in backbone.named_parameters()})
    for key, grad in grads[0].items():
        assert error(grads[1][key], grad) < 1e-5, key


def test_output_names():
    names = ["res2", "res3", "res4", "res5"]
    backbone = build(OUT_FEATURES=names, SQUARE_PAD=256)
    assert {n: s.stride for n, s in backbone.output_shape().items()} == dict(
        zip(names, (4, 8, 16, 32), strict=True)
    )
    assert list(run(backbone, images())) == names
    assert backbone.padding_constraints == {"size_divisiblity": 32, "square_size": 256}


# --- with Expedit ----------------------------------------------------------------------------

EXPEDIT = {"ALPHA": 1, "GRID": (3, 5)}


@pytest.mark.parametrize("name", NAMES)
def test_expedit_from_the_config(name):
    backbone, plain = build(name, EXPEDIT), build(name)
    assert is_expedited(backbone) and not is_expedited(plain)
    assert list(backbone.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(backbone.state_dict())
    x, tokens = images(), []
    backbone.net.model.blocks[2].register_forward_hook(lambda m, args, out: tokens.append(out))
    rebuilt = []
    rebuild = backbone.net.model.blocks.methods["after_1"].rebuild
    rebuild.register_forward_hook(lambda *_: rebuilt.append(1))
    expedited = token_map(backbone, x)
    assert tokens[0].shape[1] == 15 + plain.net.model.num_prefix_tokens
    assert len(rebuilt) == 1  # behind the last block alone, whatever loop timm has
    expected = token_map(plain, x)
    assert error(expedited, expected) > 1e-4
    # The same from Python, and off again to the last bit.
    with expedite(plain, 1, grid=(3, 5)):
        assert torch.equal(token_map(plain, x), expedited)
    assert torch.equal(token_map(plain, x), expected)
    size = tuple(expected.shape[2:])
    with expedite(plain, 1, grid=size, **IDENTITY):
        assert error(token_map(plain, x), expected) < 1e-5


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_bf16_stays_near(name):
    backbone, x = build(name, EXPEDIT), images()
    expected = token_map(backbone, x)
    actual = token_map(backbone.bfloat16(), x.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert ((actual.float() - expected).norm() / expected.norm()).item() < 0.1


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
@pytest.mark.slow
def test_compiles_without_a_break(name):
    torch._dynamo.reset()
    net, x = build(name, EXPEDIT).net, images(90, 122)
    expected = run(net, x)["last_feat"]
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert error(run(compiled, x)["last_feat"], expected) < 1e-6
    torch._dynamo.reset()


def test_flops():
    def block(tokens: int) -> int:
        # Linear layers 12 d^2, attention 2 keys d, two norms of 5 d each.
        return tokens * (12 * 32**2 + 2 * tokens * 32 + 10 * 32)

    for name, size, prefix, embed in (
        ("vit_small_patch16_dinov3", (96, 128), 5, 48 * 32 * 3 * 16**2 + 5 * 53 * 32),
        # Its own size: resampling learned positions is no operator that fvcore knows.
        ("vit_small_patch16_224", (224, 224), 1, 196 * 32 * 3 * 16**2 + 5 * 197 * 32),
    ):
        backbone, x = build(name), images(*size, batch=1)
        tokens = size[0] * size[1] // 16**2
        plain = count_flops(backbone, x)
        assert plain.before == 3 * block(tokens + prefix) and plain.embed == embed
        assert plain.head > 0 and plain.uncounted == {}
        with expedite(backbone, 1, grid=(3, 5)):
            flops = count_flops(backbone, x)
        assert flops.before == block(tokens + prefix)
        assert flops.after == 2 * block(15 + prefix)
        assert flops.clustering > 0 and flops.reconstruction > 0
        assert (flops.embed, flops.head, flops.uncounted) == (plain.embed, plain.head, {})
    # Resized images.
    backbone = build("vit_small_patch14_dinov2", EXPEDIT)
    assert count_flops(backbone, images(592, 592, batch=1)).uncounted == {}


# --- weights ---------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A file of timm's with a head for classification, and its model."""
    model = perturbed(timm.create_model("vit_small_patch16_224", num_classes=10, **TINY))
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    return str(tmp_path / "vit.pth"), model


def test_a_checkpoint_is_loaded(saved):
    path, model = saved
    cfg = config("vit_small_patch16_224", CHECKPOINT=path, PRETRAINED=True)
    backbone = build_backbone(cfg).eval()
    x = images(224, 224)
    features = run(model.forward_features, x)[:, 1:]
    assert torch.equal(token_map(backbone, x).flatten(2).transpose(1, 2), features)


def test_the_authors_files_are_converted(tmp_path):
    """DINOv3's own names: storage_tokens, and gammas in modules."""
    model = perturbed(timm.create_model("vit_small_patch16_dinov3", **TINY))
    theirs = {"rope_embed.periods": torch.ones(4), "mask_token": torch.zeros(1, 32)}
    for key, value in model.state_dict().items():
        key = key.replace("reg_token", "storage_tokens")
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        theirs[key] = value
    torch.save(theirs, tmp_path / "dinov3.pth")
    backbone = build_backbone(config(CHECKPOINT=str(tmp_path / "dinov3.pth")))
    for key, value in model.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(backbone.state_dict()[f"net.model.{key}"], value), key


def test_a_checkpoint_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="MODEL.TIMM.CHECKPOINT: .*'no/file.pth'"):
        build("vit_small_patch16_224", CHECKPOINT="no/file.pth")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"embed_dim": 64}, r"cls_token is \(1, 1, 64\) in the file and \(1, 1, 32\) in the model"),
        ({"depth": 4}, r"blocks.3.norm1.weight is not in the model"),
        ({"depth": 2}, r"blocks.2.norm1.weight is not in the file, and 11 more"),
        ({"patch_size": 8}, r"patches are \(8, 8\) in the file and \(16, 16\) in the model"),
    ],
)
def test_a_checkpoint_that_does_not_fit(change, problem, tmp_path):
    path = str(tmp_path / "other.pth")
    other = timm.create_model("vit_small_patch16_224", **TINY | change)
    torch.save({"model": other.state_dict()}, path)
    with pytest.raises(ValueError, match=f"MODEL.TIMM.CHECKPOINT .*other.pth.*: {problem}"):
        build("vit_small_patch16_224", CHECKPOINT=path)


def test_pretrained_weights_are_asked_of_timm(saved, monkeypatch):
    asked, create = [], timm.create_model

    def record(name, pretrained, **kwargs):
        asked.append((name, pretrained))
        if pretrained:
            raise FileNotFoundError("the hub is far")
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", record)
    name = "vit_small_patch16_224.augreg_in1k"
    with pytest.raises(OSError, match="MODEL.TIMM.PRETRAINED.*CHECKPOINT: the hub is far"):
        build(name, PRETRAINED=True)
    build(name, PRETRAINED=True, CHECKPOINT=saved[0])  # instead
    build(name)
    assert asked == [(name, True), (name, False), (name, False)]


# --- what it refuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("vit_large_patch14_dinov4", "MODEL.TIMM.NAME .* such as .*dinov2.* no 'vit_large_patch14"),
        ("", "MODEL.TIMM.NAME must be a plain ViT of timm, such as .*; there is no ''"),
        ("vit_small_patch16_224.nobody", "MODEL.TIMM.NAME .*'vit_small.* Invalid pretrained tag"),
        ("resnet18", "MODEL.TIMM.NAME 'resnet18' .* does not make a plain ViT .*: "),
        ("samvit_base_patch16", "MODEL.TIMM.NAME 'samvit_base_patch16' .* plain ViT"),
        ("swin_tiny_patch4_window7_224", "MODEL.TIMM.NAME 'swin_tiny.* plain ViT"),
    ],
)
def test_names_that_are_no_plain_vit(name, problem):
    with pytest.raises(ValueError, match=problem):
        build(name)


def test_bad_keys():
    with pytest.raises(ValueError, match="MODEL.TIMM.STRIDE must be a power of two .* 14.* 12"):
        build("vit_small_patch14_dinov2", STRIDE=12)
    with pytest.raises(ValueError, match="MODEL.TIMM.OUT_FEATURES .* MODEL.TIMM.SCALE_FACTORS"):
        build(OUT_FEATURES=["p2", "p3"])
    cfg = config()
    cfg.MODEL.TIMM.KWARGS.colour = "blue"
    with pytest.raises(ValueError, match="KWARGS .*colour"):
        build_backbone(cfg)
    with pytest.raises(ValueError, match="ALPHA must be in 0 to 2"):
        build(expedit={"ALPHA": 3, "RATIO": 0.5})


# --- configs, and Mask2Former on top ---------------------------------------------------------


def test_adding_keys_keeps_existing_ones(tmp_path):
    cfg = get_detectron2_cfg()
    cfg.MODEL.TIMM = CfgNode({"NAME": "mine", "THEIRS": "kept"})
    add_timm_config(cfg)
    add_timm_config(cfg)
    assert (cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.THEIRS) == ("mine", "kept")
    first = config()
    assert first.MODEL.TIMM.KWARGS == TINY and get_cfg().MODEL.TIMM.KWARGS == {}
    # From a file, and back.
    (tmp_path / "c.yaml").write_text("MODEL: {TIMM: {KWARGS: {img_size: [64, 96]}, STRIDE: 16}}")
    first.merge_from_file(str(tmp_path / "c.yaml"))
    assert first.MODEL.TIMM.KWARGS == TINY | {"img_size": [64, 96]}
    (tmp_path / "d.yaml").write_text(first.dump())
    again = get_cfg()
    again.merge_from_file(str(tmp_path / "d.yaml"))
    assert again.MODEL.TIMM == first.MODEL.TIMM


@pytest.mark.parametrize("size", ["dinov2", "dinov3"])
def test_large_configs_fit_the_head(size):
    cfg = get_cfg()
    path = f"coco/panoptic-segmentation/vit/maskformer2_{size}_large_bs16_50ep.yaml"
    cfg.merge_from_file(str(CONFIGS / path))
    assert cfg.MODEL.TIMM.PRETRAINED and "large" in cfg.MODEL.TIMM.NAME
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TIMM.KWARGS.update(TINY)
    backbone = build_backbone(cfg)
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert strides == {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    assert backbone.net.model.num_prefix_tokens == 5


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_mask2former(name):
    cfg = get_cfg()
    cfg.merge_from_file(MASK2FORMER)
    ours = config(name, EXPEDIT, OUT_FEATURES=["res2", "res3", "res4", "res5"])
    cfg.MODEL.TIMM, cfg.MODEL.EXPEDIT = ours.MODEL.TIMM, ours.MODEL.EXPEDIT
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DEVICE = "build_timm_vit_backbone", "cpu"
    MetadataCatalog.get("timm_test").thing_dataset_id_to_contiguous_id = {1: 0, 2: 1}
    cfg.DATASETS.TRAIN = ["timm_test"]
    model = build_model(cfg).eval()
    assert is_expedited(model)
    image = torch.randint(0, 256, (3, 100, 130)).float()
    (result,) = model([{"image": image, "height": 50, "width": 65}])
    assert result["sem_seg"].shape == (10, 50, 65)
    assert torch.isfinite(result["sem_seg"]).all()
    assert result["panoptic_seg"][0].shape == (50, 65)
    assert count_flops(model, [{"image": image}]).after > 0
