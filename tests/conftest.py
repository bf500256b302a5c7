"""Shared fixtures: a tiny detector and a tiny data set."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from support import gpu
from support.detector import make_confident
from support.repository import VITDET

if "PYTEST_XDIST_WORKER" in os.environ:  # one core each, for the processes that tests start as well
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


gpu.hide()

#: Files with the longest tests.
LONGEST = ("test_readme_table.py", "test_export.py")


def pytest_collection_modifyitems(items):
    """The longest first, so that no process is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def no_gpu_in_other_processes(request, monkeypatch):
    if request.path.name != "test_cuda.py":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def loggers_of_earlier_tests(monkeypatch):
    """Detectron2's loggers keep writing to the stdout of an earlier test, which is closed."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture(scope="session")
def rendered_scenes(tmp_path_factory):
    """The folder of a train and a val set with four 64 x 64 scenes each. Not to be changed."""
    from expedit_d2.data.collage import write_collage

    return write_collage(tmp_path_factory.mktemp("scenes"), {"train": 4, "val": 4}, (64, 64))


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """Random weights of the tiny detector. Not to be changed."""
    from support.random_weights import write_random_weights

    return write_random_weights(VITDET, tmp_path_factory.mktemp("detector") / "weights.pth")


@pytest.fixture
def tiny_data(rendered_scenes, tmp_path):
    """Names of a train and a val set with four 64 x 64 scenes each, in the test's folder."""
    from expedit_d2.data import register_collage

    shutil.copytree(rendered_scenes, tmp_path / rendered_scenes.name)
    register_collage(
        root=tmp_path, counts={"train": 4, "val": 4}, size=(64, 64), name=tmp_path.name
    )
    names = [f"{tmp_path.name}_{split}" for split in ("train", "val")]
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def tiny_opts(tiny_data, tiny_weights, tmp_path):
    """Config overrides for the tiny detector, with random weights on disk."""
    weights = shutil.copy(tiny_weights, tmp_path / "weights.pth")
    train, val = tiny_data
    return [
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


@pytest.fixture(params=["timm", "detectron2"])
def vit(request):
    """A tiny ViT of either library; `support.vits.run` runs both."""
    from support.vits import detectron2_vit, timm_vit_of_any_size

    return timm_vit_of_any_size() if request.param == "timm" else detectron2_vit()


@pytest.fixture
def catalogs(monkeypatch, tmp_path):
    """Forgets what a test registers, and keeps its cache in the test's folder."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "cache"))


@pytest.fixture
def fails(capsys):
    """Runs a tool, which must end with one sentence; returns that."""

    def run(tool, *arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            tool.run([str(argument) for argument in arguments])
        if isinstance(stopped.value.code, str):
            return stopped.value.code
        assert stopped.value.code not in (0, None)
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run
