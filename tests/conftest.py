"""Shared fixtures: a tiny detector and a tiny data set."""

import logging
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from support.detector import TINY, make_confident
from support.repository import EMBEDDED


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

    from expedit_d2.projects import get_cfg

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


@pytest.fixture
def confident_opts(tiny_opts):
    """`tiny_opts` with a detector whose instances have scores above 0.5."""
    make_confident(Path(tiny_opts[tiny_opts.index("MODEL.WEIGHTS") + 1]))
    return tiny_opts
