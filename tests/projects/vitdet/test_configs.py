"""The YAML files are the models they claim to be, and ``MODEL.EXPEDIT`` does what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, instantiate
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Instances
from torch import nn

from expedit_d2.api import is_expedited
from expedit_d2.backbones import add_vit_config
from expedit_d2.config import add_expedit_config
from expedit_d2.data import register_collage
from expedit_d2.projects import get_cfg
from expedit_d2.settings import Settings
from support.repository import ROOT

CONFIGS = ROOT / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
# Under expedit/ are keys to be merged over a model's file, not models.
PUBLISHED = "expedit/published.yaml"
MODELS = [file for file in FILES if not file.startswith("expedit/")]
VITDET = [file for file in MODELS if file.startswith("vitdet/")]
EXPEDIT_NAME = re.compile(r"_(?:expedit|published)_a(\d+)_(\d+)x(\d+)\.yaml$")

# From ViTDet's configs: width, depth, heads, drop path, blocks with global attention.
SIZES = {
    "b": (768, 12, 12, 0.1, [2, 5, 8, 11]),
    "l": (1024, 24, 16, 0.4, [5, 11, 17, 23]),
    "h": (1280, 32, 16, 0.5, [7, 15, 23, 31]),
}
HEADS = ["mask_rcnn", "cascade_mask_rcnn"]


@contextmanager
def on_meta() -> Iterator[None]:
    """Build models without memory. Detectron2's ViT reads values of a linspace, which has some."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
        yield


def load(file: str, *overrides: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / file))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *overrides])
    return cfg


def meta_model(cfg: CfgNode) -> nn.Module:
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    with on_meta():
        return build_model(cfg)


def lazy_config(heads: str, size: str) -> Any:
    """Detectron2's own model, changed where ViTDet's configs of this size change it."""
    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    width, depth, num_heads, drop_path, global_blocks = SIZES[size]
    model.backbone.net.update(
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        drop_path_rate=drop_path,
        window_block_indexes=[i for i in range(depth) if i not in global_blocks],
    )
    if heads == "cascade_mask_rcnn":
        cascade = model_zoo.get_config("common/models/cascade_rcnn.py").model.roi_heads
        cascade.mask_head.conv_norm = "LN"
        for head in cascade.box_heads:
            head.update(conv_dims=[256] * 4, fc_dims=[1024], conv_norm="LN")
        model.roi_heads = cascade
    return model


def plain(value: Any) -> Any:
    """A setting as comparable data; None for what is none: tensors, modules, functions."""
    if isinstance(value, (Matcher, Box2BoxTransform)):
        return {name: plain(item) for name, item in vars(value).items()}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) else None


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Every plain attribute of every module: thresholds, sizes, strides, rates, ..."""
    inner = {*vars(nn.Module()), "_names"}
    settings = {
        f"{name}.{key}": plain(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in inner
    }
    for key, value in settings.items():
        if key.endswith(".loss_weight") and isinstance(value, dict):
            value.setdefault("loss_cls", 1.0)  # what Detectron2 takes where it is absent
    return settings


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


# The model


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("heads", HEADS)
def test_yaml_is_the_official_model(heads: str, size: str) -> None:
    cfg = load(f"vitdet/{heads}_vitdet_{size}.yaml")
    with on_meta():
        official = instantiate(lazy_config(heads, size))
    ours = meta_model(cfg)
    assert shapes(ours) == shapes(official)
    mine = settings_of(ours)
    assert mine.pop("backbone.net.img_size") == cfg.MODEL.VIT.IMG_SIZE  # for BUDGET; ours alone
    assert mine == settings_of(official)
    assert ours.input_format == cfg.INPUT.FORMAT == "RGB"
    # Buffers hold no values here.
    assert cfg.MODEL.PIXEL_MEAN == lazy_config(heads, size).pixel_mean
    assert cfg.MODEL.PIXEL_STD == lazy_config(heads, size).pixel_std
    assert cfg.MODEL.WEIGHTS.startswith(f"detectron2://ViTDet/COCO/{heads}_vitdet_{size}/")
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (1024, 1024)


WIDTH = 32  # channels of the shrunken heads


def small_vit() -> list[Any]:
    """Overrides: 4 blocks of 64 channels; 256 x 256 images give 16 x 16 tokens, 2 x 2 windows."""
    values = {
        "IMG_SIZE": 256,
        "SQUARE_PAD": 256,
        "EMBED_DIM": 64,
        "DEPTH": 4,
        "NUM_HEADS": 4,
        "WINDOW_BLOCK_INDEXES": [0, 2],
        "OUT_CHANNELS": WIDTH,
    }
    return [part for key, value in values.items() for part in (f"MODEL.VIT.{key}", value)]


def small_pair(heads: str) -> tuple[nn.Module, nn.Module]:
    """Shrunken models, ours from YAML and Detectron2's from LazyConfig, with the same weights."""
    torch.manual_seed(0)
    cfg = load(f"vitdet/{heads}_vitdet_b.yaml", *small_vit())
    cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = WIDTH
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    ours = build_model(cfg).eval()

    lazy = lazy_config(heads, "b")
    lazy.backbone.update(out_channels=WIDTH, square_pad=256)
    lazy.backbone.net.update(
        img_size=256, embed_dim=64, depth=4, num_heads=4, window_block_indexes=[0, 2]
    )
    lazy.proposal_generator.head.in_channels = WIDTH
    roi = lazy.roi_heads
    cascade = heads == "cascade_mask_rcnn"
    for head in roi.box_heads if cascade else [roi.box_head]:
        head.input_shape.channels = WIDTH
        head.update(conv_dims=[WIDTH] * 4, fc_dims=[64])
    for predictor in roi.box_predictors if cascade else [roi.box_predictor]:
        predictor.input_shape.channels = 64
    roi.mask_head.input_shape.channels = WIDTH
    roi.mask_head.conv_dims = [WIDTH] * 5
    official = instantiate(lazy).eval()

    # Fresh weights predict nothing above the score threshold.
    with torch.no_grad():
        for name, value in ours.named_parameters():
            if "rel_pos" in name:
                value.normal_(std=0.1)
            if name.endswith("cls_score.weight"):
                value *= 300
    official.load_state_dict(ours.state_dict())
    return ours, official


def assert_same(ours: Instances, official: Instances) -> None:
    assert len(ours) == len(official) > 0
    assert set(ours.get_fields()) == set(official.get_fields())
    for name, value in official.get_fields().items():
        other = ours.get(name)
        assert torch.equal(getattr(other, "tensor", other), getattr(value, "tensor", value)), name


@torch.no_grad()
@pytest.mark.parametrize("heads", HEADS)
def test_same_weights_give_the_same_output(heads: str) -> None:
    ours, official = small_pair(heads)
    generator = torch.Generator().manual_seed(1)
    sizes = [(160, 224), (224, 128)]
    batch = [
        {"image": torch.randint(0, 256, (3, *size), generator=generator).float()} for size in sizes
    ]
    images = official.preprocess_image(batch)
    assert torch.equal(ours.preprocess_image(batch).tensor, images.tensor)
    assert images.tensor.shape[-2:] == (256, 256)

    features = official.backbone(images.tensor)
    own = ours.backbone(images.tensor)
    assert list(own) == list(features) == ["p2", "p3", "p4", "p5", "p6"]
    assert all(torch.equal(own[name], features[name]) for name in features)

    proposals, _ = official.proposal_generator(images, features)
    for a, b in zip(ours.proposal_generator(images, own)[0], proposals, strict=True):
        assert_same(a, b)
    for a, b in zip(ours.inference(batch), official.inference(batch), strict=True):
        assert "pred_masks" in b["instances"].get_fields()
        assert_same(a["instances"], b["instances"])


# The files


def test_there_are_files() -> None:
    assert {f"vitdet/{heads}_vitdet_{size}.yaml" for heads in HEADS for size in SIZES} < set(FILES)
    assert PUBLISHED in FILES
    assert sum(bool(EXPEDIT_NAME.search(file)) for file in VITDET) >= 7


@pytest.mark.parametrize("file", MODELS)
def test_file_builds(file: str) -> None:
    register_collage()  # panoptic models ask it which classes are things
    cfg = load(file)
    model = meta_model(cfg)
    assert is_expedited(model) == cfg.MODEL.EXPEDIT.ENABLED
    if not cfg.MODEL.EXPEDIT.ENABLED:
        return
    settings = Settings.from_node(cfg.MODEL.EXPEDIT)
    alphas = settings.alphas
    assert alphas or settings.budget
    if cfg.MODEL.BACKBONE.NAME == "D2ViT":
        assert all(0 <= alpha < cfg.MODEL.VIT.DEPTH for alpha in alphas)
    cfg.MODEL.EXPEDIT.ENABLED = False
    plain_model = meta_model(cfg)
    assert not is_expedited(plain_model)
    assert list(shapes(model).items()) == list(shapes(plain_model).items())


@pytest.mark.parametrize("file", VITDET)
def test_file_is_what_its_name_says(file: str) -> None:
    cfg = load(file)
    depth = SIZES[file.split("vitdet_")[1][0]][1]
    assert depth == cfg.MODEL.VIT.DEPTH
    cascade = cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads"
    assert cascade == ("cascade" in file)
    named = EXPEDIT_NAME.search(file)
    node = cfg.MODEL.EXPEDIT
    assert node.ENABLED == bool(named)
    if named:
        alpha, *grid = map(int, named.groups())
        assert (node.ALPHA, list(node.GRID)) == (alpha, grid)
        assert node.SCOPE == ("window" if "_published_" in file else "map")
        side = cfg.MODEL.VIT.WINDOW_SIZE if node.SCOPE == "window" else 1024 // 16
        assert max(grid) < side


def test_defaults_of_expedit_are_those_of_the_package() -> None:
    node = load("vitdet/mask_rcnn_vitdet_b_expedit_a4_45x45.yaml").MODEL.EXPEDIT
    assert Settings.from_node(node) == Settings(alpha=4, grid=(45, 45))


def test_published_operator_as_base_and_as_second_file() -> None:
    as_base = load("vitdet/mask_rcnn_vitdet_h_published_a8_10x10.yaml").MODEL.EXPEDIT
    cfg = load("vitdet/mask_rcnn_vitdet_h_expedit_a10_45x45.yaml")
    cfg.merge_from_file(str(CONFIGS / PUBLISHED))
    with pytest.raises(ValueError, match="GRID"):
        meta_model(cfg)  # a grid of the map does not fit a window
    cfg.merge_from_list(["MODEL.EXPEDIT.ALPHA", "8", "MODEL.EXPEDIT.GRID", "(10, 10)"])
    assert Settings.from_node(cfg.MODEL.EXPEDIT) == Settings.from_node(as_base)
    assert Settings.from_node(as_base) == Settings(
        alpha=8,
        grid=(10, 10),
        scope="window",
        method="expedit",
        iterations=5,
        temperature=0.01,
        window=5,
        neighbors=20,
        neighbor_window=0,
        normalize="l2",
        size_aware=False,
        positions="grid",
        residual=False,
    )


# MODEL.EXPEDIT


def small_backbone(file: str, *overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(load(file, *small_vit(), *overrides)).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "alpha", "grid"),
    [
        ("vitdet/mask_rcnn_vitdet_b_expedit_a4_45x45.yaml", 2, (11, 11)),
        ("vitdet/mask_rcnn_vitdet_h_published_a8_10x10.yaml", 1, (10, 10)),
    ],
)
def test_config_expedites_the_backbone(file: str, alpha: int, grid: tuple[int, int]) -> None:
    keys = ("MODEL.EXPEDIT.ALPHA", alpha, "MODEL.EXPEDIT.GRID", grid)
    expedited = small_backbone(file, *keys)
    full = small_backbone(file, *keys, "MODEL.EXPEDIT.ENABLED", False)
    full.load_state_dict(expedited.state_dict())
    sides: list[tuple[int, ...]] = []
    for block in expedited.net.blocks.children():
        if hasattr(block, "norm1"):
            block.norm1.register_forward_pre_hook(lambda _, args: sides.append(args[0].shape[1:3]))
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    ours, reference = expedited(image), full(image)
    assert {name: x.shape for name, x in ours.items()} == {n: x.shape for n, x in reference.items()}
    assert not torch.equal(ours["p4"], reference["p4"])
    # Two windows of 14 along each side of 16 tokens: two grids.
    reduced = grid if "expedit_a" in file else (2 * grid[0], 2 * grid[1])
    assert sides == [(16, 16)] * alpha + [reduced] * (4 - alpha)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ALPHA": 4}, r"ALPHA .*0 to 3.*got 4"),
        ({"ALPHA": -1}, r"ALPHA .*got -1"),
        ({"ALPHA": (0, 4)}, r"ALPHA .*0 to 3.*got 4"),
        ({"ALPHA": (1, 1)}, r"ALPHA .*twice"),
        ({"GRID": None}, r"exactly one of GRID and RATIO"),
        ({"RATIO": 0.5}, r"exactly one of GRID and RATIO"),
        ({"GRID": (15, 15), "SCOPE": "window"}, r"GRID .*14 x 14 .*window.*got \(15, 15\)"),
        ({"GRID": (0, 4)}, r"GRID.*got \(0, 4\)"),
        ({"GRID": None, "RATIO": 0}, r"RATIO must be in \(0, 1\], got 0"),
        ({"GRID": None, "RATIO": 1.5}, r"RATIO must be in \(0, 1\], got 1.5"),
        ({"ALPHA": None, "GRID": None, "RATIO": 0.7}, r"RATIO 0.7 needs ALPHA"),
        ({"ALPHA": None}, r"GRID \(8, 8\) needs ALPHA"),
        ({"ALPHA": None, "GRID": None}, r"neither ALPHA nor BUDGET is set"),
        ({"ENABLED": "no"}, r"ENABLED must be True or False, got 'no'"),
        ({"RESIDUAL": "no"}, r"RESIDUAL must be True or False, got 'no'"),
        ({"SIZE_AWARE": "off"}, r"SIZE_AWARE must be True or False, got 'off'"),
        ({"METHOD": "none"}, r"METHOD must be one of .*got 'none'"),
        ({"SCOPE": "image"}, r"SCOPE must be one of .*got 'image'"),
        ({"TEMPERATURE": 0.0}, r"TEMPERATURE.*got 0.0"),
        ({"TEMPERATURE": "hot"}, r"TEMPERATURE.*got 'hot'"),
        ({"WINDOW": 4}, r"WINDOW.*odd.*got 4"),
        ({"NEIGHBOR_WINDOW": 2}, r"NEIGHBOR_WINDOW.*odd.*got 2"),
        ({"POSITIONS": "mean"}, r"POSITIONS must be one of .*clusters.*grid.*got 'mean'"),
        ({"NORMALIZE": "max"}, r"NORMALIZE must be one of .*got 'max'"),
        ({"ITERATIONS": 0}, r"ITERATIONS .*got 0"),
        ({"NEIGHBORS": 0}, r"NEIGHBORS .*got 0"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if type(value) is dict else "",
)
def test_bad_values_name_their_key(overrides: dict[str, Any], message: str) -> None:
    cfg = load("vitdet/mask_rcnn_vitdet_b.yaml", *small_vit())
    cfg.MODEL.EXPEDIT.update({"ENABLED": True, "ALPHA": 1, "GRID": (8, 8), **overrides})
    with pytest.raises(ValueError, match=message), on_meta():
        build_backbone(cfg)


@pytest.mark.parametrize("enabled", [True, False])
def test_enabled_is_the_switch(enabled: bool) -> None:
    cfg = load("vitdet/mask_rcnn_vitdet_b.yaml", *small_vit())
    cfg.MODEL.EXPEDIT.update({"ENABLED": enabled, "ALPHA": 1, "GRID": (8, 8)})
    with on_meta():
        assert is_expedited(build_backbone(cfg)) == enabled


def test_unknown_key() -> None:
    with pytest.raises(ValueError, match="unknown EXPEDIT key 'clusters'.*alpha.*grid"):
        Settings.from_node({"ENABLED": True, "ALPHA": 1, "CLUSTERS": 8})


def test_keys_are_the_fields_of_the_settings() -> None:
    node = get_cfg().MODEL.EXPEDIT
    assert {key.lower() for key in node} - {"enabled"} == {field.name for field in fields(Settings)}
    # An untouched node is off; enabled without ALPHA it changes nothing either.
    assert Settings.from_node(node) is None
    node.ENABLED = True
    assert Settings.from_node(node) == Settings()


@pytest.mark.parametrize(
    ("add", "name", "key", "value"),
    [
        (add_expedit_config, "EXPEDIT", "ALPHA", 3),
        (add_expedit_config, "EXPEDIT", "TEMPERATURE", 0.02),
        (add_vit_config, "VIT", "EMBED_DIM", 384),
    ],
)
def test_adding_keys_keeps_existing_ones(add: Any, name: str, key: str, value: Any) -> None:
    cfg = get_detectron2_cfg()
    add(cfg)
    known = set(cfg.MODEL[name])
    cfg.MODEL[name][key] = value
    node = cfg.MODEL[name]
    add(cfg)
    assert cfg.MODEL[name] is node
    assert cfg.MODEL[name][key] == value
    assert set(cfg.MODEL[name]) == known

    # Another project was there first, with one key that we know and one that we do not.
    cfg = get_detectron2_cfg()
    cfg.MODEL[name] = CfgNode({key: value, "THEIRS": "kept"})
    add(cfg)
    assert cfg.MODEL[name][key] == value
    assert cfg.MODEL[name].THEIRS == "kept"
    assert set(cfg.MODEL[name]) == known | {"THEIRS"}


@pytest.mark.parametrize(
    ("key", "text", "field", "value"),
    [
        ("TEMPERATURE", "0.02", "temperature", 0.02),
        ("TEMPERATURE", "auto", "temperature", None),
        ("TEMPERATURE", "None", "temperature", None),
        ("GRID", "(24,24)", "grid", (24, 24)),
        ("GRID", "[24, 16]", "grid", (24, 16)),
        ("ALPHA", "3", "alpha", 3),
        ("ALPHA", "(0,3)", "alpha", (0, 3)),
        ("RATIO", "0.7", "ratio", 0.7),
        ("SCOPE", "window", "scope", "window"),
        ("SIZE_AWARE", "False", "size_aware", False),
        ("POSITIONS", "grid", "positions", "grid"),
    ],
)
def test_command_line_forms(key: str, text: str, field: str, value: Any) -> None:
    cfg = get_cfg()
    if key == "ALPHA":
        cfg.MODEL.EXPEDIT.GRID = (8, 8)  # each wants the other
    if key in ("GRID", "RATIO"):
        cfg.MODEL.EXPEDIT.ALPHA = 1
    cfg.merge_from_list(["MODEL.EXPEDIT.ENABLED", "True", f"MODEL.EXPEDIT.{key}", text])
    settings = Settings.from_node(cfg.MODEL.EXPEDIT)
    assert getattr(settings, field) == value
    assert type(getattr(settings, field)) is type(value)


def test_command_line_over_a_file() -> None:
    file = "vitdet/mask_rcnn_vitdet_b_expedit_a4_45x45.yaml"
    cfg = load(file, "MODEL.EXPEDIT.GRID", "(24,24)", "MODEL.EXPEDIT.ALPHA", "2")
    assert Settings.from_node(cfg.MODEL.EXPEDIT) == Settings(alpha=2, grid=(24, 24))
    cfg = load(file, "MODEL.EXPEDIT.GRID", "None", "MODEL.EXPEDIT.RATIO", "0.7")
    assert Settings.from_node(cfg.MODEL.EXPEDIT) == Settings(alpha=4, ratio=0.7)
    # yacs keeps the type that a file gave a key; None frees it.
    with pytest.raises(ValueError, match="Type mismatch.*MODEL.EXPEDIT.ALPHA"):
        load(file, "MODEL.EXPEDIT.ALPHA", "(0,3)")
    cfg = load(file, "MODEL.EXPEDIT.ALPHA", "None", "MODEL.EXPEDIT.ALPHA", "(0,3)")
    assert Settings.from_node(cfg.MODEL.EXPEDIT) == Settings(alpha=(0, 3), grid=(45, 45))


def test_keys_survive_a_dump(tmp_path: Path) -> None:
    cfg = load("vitdet/mask_rcnn_vitdet_h_published_a8_10x10.yaml")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = get_cfg()
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert again.MODEL.EXPEDIT == cfg.MODEL.EXPEDIT
    assert again.MODEL.VIT == cfg.MODEL.VIT
