"""Swin as a backbone of Detectron2: against a plain implementation, and its configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.swin import SwinTransformer
from torch import nn

from expedit_d2 import expedite
from expedit_d2.analysis.flops import count_flops
from expedit_d2.backbones.swin import D2SwinTransformer
from expedit_d2.projects import Mask2Former, get_cfg
from expedit_d2.projects.Mask2Former import add_maskformer2_config
from expedit_d2.windows import partition, shifted_mask
from support.swin import TINY, explicit_swin, images, maps, tiny
from support.tensors import maps_error as error

CONFIGS = Path(Mask2Former.__file__).parent / "configs"


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (29, 46)])
def test_plain_model_is_an_explicit_one(size):
    levels = ("res2", "res3", "res4")
    swin, x = tiny(depths=(2, 2, 2), num_heads=(2, 2, 4), out_features=levels), images(size)
    assert error(maps(swin, x), explicit_swin(swin, x)) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"window_size": 7}, {"qkv_bias": False}], ids=str)
@pytest.mark.parametrize("size", [(64, 64), (150, 70), (33, 200)])
def test_same_weights_as_detectron2_give_the_same_output(size, changes):
    reference, ours = tiny(SwinTransformer, **changes), D2SwinTransformer(**TINY | changes).eval()
    ours.load_state_dict(reference.state_dict())
    x = images(size)
    assert error(maps(ours, x), maps(reference, x)) < 1e-5


@pytest.mark.parametrize("changes", [{"ape": True}, {"patch_norm": False}], ids=str)
def test_options_of_the_patches_as_detectron2_has_them(changes):
    settings = changes | ({"pretrain_img_size": 32} if "ape" in changes else {})
    reference, ours = tiny(SwinTransformer, **settings), D2SwinTransformer(**TINY | settings).eval()
    ours.load_state_dict(reference.state_dict())
    x = images((64, 48))
    assert error(maps(ours, x), maps(reference, x)) < 1e-5


SIZES = {  # channels, blocks, heads, window
    "T": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "S": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "B": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "L": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}


def official_keys(dim, depths, heads, window) -> dict[str, tuple[int, ...]]:
    keys = {}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        keys[f"{name}.weight"] = shape
        if bias:
            keys[f"{name}.bias"] = shape[:1]

    add("patch_embed.proj", dim, 3, 4, 4)
    add("patch_embed.norm", dim)
    for n, depth in enumerate(depths):
        width = dim << n
        for m in range(depth):
            block = f"layers.{n}.blocks.{m}"
            keys[f"{block}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads[n])
            keys[f"{block}.attn.relative_position_index"] = (window**2, window**2)
            add(f"{block}.norm1", width)
            add(f"{block}.norm2", width)
            add(f"{block}.attn.qkv", 3 * width, width)
            add(f"{block}.attn.proj", width, width)
            add(f"{block}.mlp.fc1", 4 * width, width)
            add(f"{block}.mlp.fc2", width, 4 * width)
        add(f"norm{n}", width)
        if n < 3:
            add(f"layers.{n}.downsample.norm", 4 * width)
            add(f"layers.{n}.downsample.reduction", 2 * width, 4 * width, bias=False)
    return keys


def swin_config(expedit: dict | None = None, **changes):
    cfg = get_cfg()
    add_maskformer2_config(cfg)
    for key, value in changes.items():
        cfg.MODEL.SWIN[key] = value
    for key, value in (expedit or {}).items():
        cfg.MODEL.EXPEDIT[key] = value
    return cfg


def build(cfg) -> nn.Module:
    return BACKBONE_REGISTRY.get("D2SwinTransformer")(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize("size", SIZES)
def test_state_dict_is_the_official_one(size):
    dim, depths, heads, window = SIZES[size]
    cfg = swin_config(EMBED_DIM=dim, DEPTHS=depths, NUM_HEADS=heads, WINDOW_SIZE=window)
    with torch.device("meta"):
        swin = build(cfg)
    assert {k: tuple(v.shape) for k, v in swin.state_dict().items()} == official_keys(*SIZES[size])
    shapes = swin.output_shape()
    assert {k: (v.channels, v.stride) for k, v in shapes.items()} == {
        f"res{n + 2}": (dim << n, 4 << n) for n in range(4)
    }
    assert swin.size_divisibility == 32


def test_config_reaches_every_setting():
    swin = build(
        swin_config(
            EMBED_DIM=16,
            DEPTHS=[1, 2],
            NUM_HEADS=[2, 4],
            WINDOW_SIZE=5,
            MLP_RATIO=2.0,
            QKV_BIAS=False,
            QK_SCALE=0.3,
            DROP_RATE=0.1,
            ATTN_DROP_RATE=0.2,
            DROP_PATH_RATE=0.4,
            APE=True,
            PRETRAIN_IMG_SIZE=64,
            PATCH_NORM=False,
            OUT_FEATURES=["res3"],
            USE_CHECKPOINT=True,
        )
    )
    block = swin.layers[1].blocks[1]
    assert (block.window_size, block.shift_size) == (5, 2)
    assert block.mlp.fc1.out_features == 64 and block.attn.qkv.bias is None
    assert (block.attn.scale, block.attn.num_heads) == (0.3, 4)
    assert (block.attn.attn_drop.p, block.attn.proj_drop.p, swin.pos_drop.p) == (0.2, 0.1, 0.1)
    assert block.mlp.drop1.p == 0.1 and block.drop_path.drop_prob == pytest.approx(0.4)
    assert swin.absolute_pos_embed.shape == (1, 16, 16, 16) and swin.patch_embed.norm is None
    assert swin.layers[0].use_checkpoint
    assert list(swin(images((32, 32)))) == list(swin.output_shape()) == ["res3"]


def test_unknown_output_is_an_error():
    with pytest.raises(ValueError, match="OUT_FEATURES .*'res6'"):
        D2SwinTransformer(**TINY, out_features=["res2", "res6"])


def test_mask_keeps_both_sides_of_the_seam_apart():
    """Tokens meet where windows that begin at -shift hold both."""
    size, window, shift = (6, 8), (3, 4), (1, 2)
    mask = shifted_mask(size, window, shift)
    place = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), -1)[None]
    rolled = partition(place.roll((-1, -2), dims=(1, 2)), window).flatten(1, 2)
    group = (rolled - torch.tensor(shift)).div(torch.tensor(window), rounding_mode="floor")
    apart = (group[:, :, None] != group[:, None]).any(-1)
    assert torch.equal(mask, apart * -100.0) and apart.any()


PUBLISHED = {  # ALPHA, ITERATIONS, TEMPERATURE, WINDOW, NEIGHBORS
    "coco/panoptic-segmentation": (9, 5, 0.05, 7, 10),
    "coco/instance-segmentation": (11, 5, 0.01, 11, 60),
    "ade20k/panoptic-segmentation": (14, 4, 0.01, 7, 49),
    "ade20k/semantic-segmentation": (7, 5, 0.01, 5, 10),
}


#: Swin-L at 1152 x 1152, the backbone alone; None is the plain model.
PUBLISHED_GFLOPS = {
    None: 937,
    "coco/panoptic-segmentation": 663,
}


@pytest.mark.slow
@pytest.mark.parametrize("task", PUBLISHED_GFLOPS)
def test_published_flops(task):
    """Whole windows in every stage at 384 x 384 as at 1152 x 1152, and a ninth of them.

    ``tests/paper`` has the other tasks, and the test below their configs.
    """
    pattern = "*expedit*.yaml" if task else "*.yaml"
    path = sorted((CONFIGS / (task or "coco/panoptic-segmentation") / "swin").glob(pattern))[0]
    cfg = swin_config()
    cfg.merge_from_file(str(path))
    flops = count_flops(build(cfg).eval(), torch.zeros(1, 3, 384, 384))
    assert flops.uncounted == {}
    assert 9 * flops.total / 1e9 == pytest.approx(PUBLISHED_GFLOPS[task], rel=0.002)


@pytest.mark.parametrize("task", PUBLISHED)
def test_configs_hold_the_published_settings(task):
    (path,) = (CONFIGS / task / "swin").glob("*expedit*.yaml")
    cfg = swin_config()
    cfg.merge_from_file(str(path))
    node = cfg.MODEL.EXPEDIT
    values = (node.ALPHA, node.ITERATIONS, node.TEMPERATURE, node.WINDOW, node.NEIGHBORS)
    assert values == PUBLISHED[task]
    assert list(node.GRID) == [8, 8] and node.SCOPE == "window" and node.ENABLED
    assert path.stem.split("_expedit")[0] + ".yaml" in {p.name for p in path.parent.iterdir()}
    with torch.device("meta"):
        swin = build(cfg)
    assert (swin.patch_embed.proj.out_channels, swin.layers[2].window_size) == (192, 12)
    blocks = swin.layers[2].blocks
    assert blocks.first_alpha == node.ALPHA - 4 and len(blocks) == 18


def test_config_expedites_the_backbone():
    changes = {
        "EMBED_DIM": 16,
        "DEPTHS": [2, 2],
        "NUM_HEADS": [2, 2],
        "WINDOW_SIZE": 4,
        "OUT_FEATURES": ["res2", "res3"],
    }
    node = {"ENABLED": True, "ALPHA": 1, "GRID": (2, 2), "SCOPE": "window"}
    plain = build(swin_config(**changes)).eval()
    swin = build(swin_config(node, **changes)).eval()
    swin.load_state_dict(plain.state_dict())
    x = images((32, 48))
    with expedite(plain, 1, grid=(2, 2), scope="window"):
        expected = maps(plain, x)
    assert all(map(torch.equal, maps(swin, x), expected))
    assert error(maps(plain, x), expected) > 1e-3
