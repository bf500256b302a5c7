"""Configs of DPT: the models and rows they claim to be."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from expedit_d2.projects import load_cfg
from expedit_d2.settings import Settings
from support.dpt import CONFIGS, expedit_cfg, tiny_cfg


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
