"""Shared fixtures: a tiny detector, a tiny data set, and the tools as modules."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = str(ROOT / "configs" / "embedded" / "vitdet.yaml")

#: The embedded ViTDet, shrunken to 64 x 64 pixels and 8 x 8 tokens.
TINY = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.VIT.IMG_SIZE", "64"),
    *("MODEL.VIT.PRETRAIN_IMG_SIZE", "64"),
    *("MODEL.VIT.EMBED_DIM", "32"),
    *("MODEL.VIT.DEPTH", "3"),
    *("MODEL.VIT.NUM_HEADS", "2"),
    *("MODEL.VIT.WINDOW_SIZE", "4"),
    *("MODEL.VIT.WINDOW_BLOCK_INDEXES", "(0, 1)"),
    *("MODEL.VIT.OUT_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("INPUT.MIN_SIZE_TEST", "64"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)"),
    *("DATALOADER.NUM_WORKERS", "0"),
    *("TEST.DETECTIONS_PER_IMAGE", "10"),
]


def load_tool(name: str):
    """A script of tools/ as a module; its name is not importable."""
    path = ROOT / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"expedit_tool_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def loggers_of_earlier_tests(monkeypatch):
    """Detectron2's loggers keep writing to the stdout of an earlier test, which is closed."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture
def tiny_data(tmp_path):
    """Names of a train and a val set with four 64 x 64 scenes each."""
    from expedit_d2.data import register_collage

    register_collage(
        root=tmp_path, counts={"train": 4, "val": 4}, size=(64, 64), name=tmp_path.name
    )
    names = [f"{tmp_path.name}_{split}" for split in ("train", "val")]
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def tiny_opts(tiny_data, tmp_path):
    """Config overrides for the tiny detector, with random weights on disk."""
    from detectron2.modeling import build_model

    from projects import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(EMBEDDED)
    cfg.merge_from_list(TINY)
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    train, val = tiny_data
    return [
        *TINY,
        *("MODEL.WEIGHTS", str(weights)),
        *("DATASETS.TRAIN", f"('{train}',)"),
        *("DATASETS.TEST", f"('{val}',)"),
        *("OUTPUT_DIR", str(tmp_path / "output")),
    ]


def make_confident(weights: Path) -> None:
    """Sharpen the classifier of a detector with random weights, so that it finds something."""
    saved = torch.load(weights)
    saved["model"]["roi_heads.box_predictor.cls_score.weight"] *= 1000
    torch.save(saved, weights)


@pytest.fixture
def confident_opts(tiny_opts):
    """`tiny_opts` with a detector whose instances have scores above 0.5."""
    make_confident(Path(tiny_opts[tiny_opts.index("MODEL.WEIGHTS") + 1]))
    return tiny_opts
