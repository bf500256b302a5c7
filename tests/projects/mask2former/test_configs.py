"""Expedit configs of Mask2Former: each is its plain config and a setting, nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_backbone

from expedit_d2.hook import ExpeditedBlocks
from expedit_d2.projects import Mask2Former, get_cfg

CONFIGS = Path(Mask2Former.__file__).parent / "configs"
EXPEDIT = sorted(p.relative_to(CONFIGS) for p in CONFIGS.rglob("*_expedit_*.yaml"))
TASKS = {"panoptic": "PANOPTIC_ON", "instance": "INSTANCE_ON", "semantic": "SEMANTIC_ON"}


def load(path: Path):
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / path))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def test_both_sizes_have_every_task_on_both_data_sets():
    for data in ("coco", "ade20k"):
        for task in TASKS:
            folder = Path(data) / f"{task}-segmentation" / "vit"
            names = [path.name for path in EXPEDIT if path.parent == folder]
            assert any("vit_base" in n for n in names) and any("vit_large" in n for n in names)


@pytest.mark.parametrize("path", EXPEDIT, ids=str)
def test_only_expedit_differs_from_the_plain_config(path, monkeypatch):
    # Detectron2's ViT reads numbers off a linspace, which the meta device does not have.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    cfg = load(path)
    plain = load(path.with_name(path.name.split("_expedit_")[0] + ".yaml"))
    assert cfg.MODEL.EXPEDIT.ENABLED and not plain.MODEL.EXPEDIT.ENABLED
    with torch.device("meta"):
        backbone = build_backbone(cfg)
        keys = list(build_backbone(plain).state_dict())
    assert list(backbone.state_dict()) == keys
    assert any(isinstance(module, ExpeditedBlocks) for module in backbone.modules())
    plain.MODEL.EXPEDIT = cfg.MODEL.EXPEDIT
    assert cfg == plain
    task = path.parts[1].split("-")[0]
    assert cfg.MODEL.MASK_FORMER.TEST[TASKS[task]]
    names = DatasetCatalog.list()
    assert all(name in names for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
