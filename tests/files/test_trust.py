"""Weights and configs of others: code in them must not run."""

from __future__ import annotations

import argparse
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from expedit_d2.backbones.timm_vit import create_timm_vit
from expedit_d2.engine import (
    load_lazy_config,
    load_weights,
    load_yaml,
)
from expedit_d2.files import code_in_files, read_checkpoint, read_weights, runs_code
from expedit_d2.projects import load_cfg
from support.detector import LAZY, evaluate, fails, train_net
from support.repository import DPT, VITDET, load_tool
from support.segmenter import write_official


class Runs:
    """Writes a file when it is unpickled in the usual way."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "code ran"


def hostile(folder: Path, marker: Path, model: dict | None = None) -> list[Path]:
    """One file of each format."""
    content = {"model": {} if model is None else model, "extra": Runs(marker)}
    paths = [folder / name for name in ("zip.pth", "old.pth", "zoo.pkl", "zip.pkl", "c.pyth")]
    torch.save(content, paths[0])
    torch.save(content, paths[1], _use_new_zipfile_serialization=False)
    paths[2].write_bytes(pickle.dumps(content | {"__author__": "x"}))
    torch.save(content, paths[3])
    torch.save(content, paths[4])
    return paths


def test_weights_run_no_code(tiny_opts, tmp_path, marker):
    for path in hostile(tmp_path, marker):
        message = fails([*tiny_opts, "MODEL.WEIGHTS", str(path)])
        assert f"MODEL.WEIGHTS {str(path)!r} contains" in message and "mkdir, and" in message
        assert "EXPEDIT_RUN_CODE_IN_FILES=1" in message


def test_weights_to_start_training_from_run_no_code(tiny_opts, tmp_path, marker):
    (path, *_) = hostile(tmp_path, marker)
    opts = [*tiny_opts, "SOLVER.IMS_PER_BATCH", "2", "MODEL.WEIGHTS", str(path)]
    with pytest.raises(SystemExit, match="MODEL.WEIGHTS .*mkdir, and loading that"):
        train_net.run(["--config-file", VITDET, *opts])


def test_resuming_runs_no_code(tiny_opts, tmp_path, marker):
    output = tmp_path / "output"
    output.mkdir()
    hostile(output, marker)[0].rename(output / "model_0000001.pth")
    (output / "last_checkpoint").write_text("model_0000001.pth")
    train = ["--resume", "--config-file", VITDET, *tiny_opts, "SOLVER.IMS_PER_BATCH", "2"]
    with pytest.raises(SystemExit, match="--resume .*mkdir, and loading that"):
        train_net.run(train)
    (output / "model_0000001.pth").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(SystemExit, match="--resume .*damaged.*write its name to .*last_check"):
        train_net.run(train)
    (output / "last_checkpoint").write_text("")
    with pytest.raises(SystemExit, match="--resume: there is no file .*last_checkpoint"):
        train_net.run(train)


def test_lazy_weights_run_no_code(tiny_data, tmp_path, marker):
    config = tmp_path / "vitdet.py"
    config.write_text(LAZY.replace("{name}", tiny_data[1]).replace("{output}", str(tmp_path)))
    opts = ["train.device=cpu", f"train.output_dir={tmp_path}"]
    for path in hostile(tmp_path, marker):
        message = fails([*opts, f"train.init_checkpoint={path}"], config=str(config))
        assert f"train.init_checkpoint {str(path)!r} contains" in message


def test_timm_checkpoints_run_no_code(tmp_path, marker):
    for path in hostile(tmp_path, marker):
        with pytest.raises(ValueError, match="MODEL.TIMM.CHECKPOINT .*mkdir, and loading that"):
            create_timm_vit("vit_tiny_patch16_224", checkpoint=str(path))


def test_tools_for_checkpoints_run_no_code(tmp_path, marker):
    target = tmp_path / "target.pth"
    dpt = ["--config-file", DPT]
    for path in hostile(tmp_path, marker):
        for tool, options in (("slim_checkpoint", []), ("convert_dpt", dpt)):
            with pytest.raises(SystemExit, match=f"{tool}.py: .*mkdir, and loading that"):
                load_tool(tool).run([*options, str(path), str(target)])
    source = write_official(tmp_path, {})
    hostile(tmp_path, marker)[0].rename(source)
    convert = load_tool("convert_segmenter")
    with pytest.raises(SystemExit, match="mkdir, and loading that"):
        convert.run([str(source), str(target)])
    (tmp_path / "variant.yml").write_text(f"net_kwargs: !!python/object/apply:os.mkdir [{marker}]")
    with pytest.raises(SystemExit, match="not a variant.yml of Segmenter: .*object/apply:os.mkdir"):
        convert.run([str(source), str(target)])
    assert not target.exists()


def test_configs_run_no_code(tiny_opts, tmp_path, marker):
    config = tmp_path / "bad.yaml"
    config.write_text(f"_BASE_: {VITDET}\nOUTPUT_DIR: !!python/object/apply:os.mkdir [{marker}]")
    above = tmp_path / "above.yaml"
    above.write_text("_BASE_: bad.yaml\n")
    for path in (config, above):
        message = fails(tiny_opts, config=str(path))
        assert "bad.yaml', line 2: the tag !!python/object/apply:os.mkdir is refused" in message
        assert "EXPEDIT_RUN_CODE_IN_FILES=1" in message
        with pytest.raises(ValueError, match="the tag !!python"):
            load_yaml(str(path))
    with pytest.raises(ValueError, match="a LazyConfig must be a .py file, got '.*bad.yaml'"):
        load_lazy_config(str(config), [])


def test_the_flag_brings_the_old_way_back(tiny_opts, tmp_path, monkeypatch):
    monkeypatch.delenv("EXPEDIT_RUN_CODE_IN_FILES", raising=False)
    weights = torch.load(tmp_path / "weights.pth")["model"]
    model = build_model(load_cfg(VITDET, tiny_opts))
    files = hostile(tmp_path, tmp_path / "ran", weights)
    for path in files:
        with code_in_files(True):
            load_weights(model, str(path))
        (tmp_path / "ran").rmdir()
        assert not runs_code()
    evaluate([*tiny_opts, "MODEL.WEIGHTS", str(files[0])], "--run-code-in-files")
    (tmp_path / "ran").rmdir()
    assert "and loading that can run" in fails([*tiny_opts, "MODEL.WEIGHTS", str(files[0])])
    slim, target = load_tool("slim_checkpoint"), str(tmp_path / "slim.pth")
    slim.run(["--run-code-in-files", str(files[0]), target])
    assert (tmp_path / "ran").is_dir()
    read_weights(target, "key")
    config = tmp_path / "eval.yaml"
    config.write_text(f'_BASE_: {VITDET}\nTEST:\n  EVAL_PERIOD: !!python/object/apply:eval ["7"]')
    monkeypatch.setenv("EXPEDIT_RUN_CODE_IN_FILES", "1")
    assert load_cfg(config).TEST.EVAL_PERIOD == 7


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("benchmark_backbone", []),
        ("compare", ["--setting", "alpha=1 ratio=0.5", "--output", "{d}/out"]),
        ("convert_dpt", ["source.pth", "target.pth"]),
        ("demo", ["--expedit", "{d}/bad.yaml", "--output", "{d}/out"]),
        ("draw", ["--output", "{d}/out"]),
        ("export", ["--output", "{d}/out.pt2"]),
        ("train_net", ["--eval-only"]),
        ("tune", ["--agreement", "90", "--output", "{d}/out"]),
    ],
)
def test_every_tool_with_a_config_has_the_flag(tmp_path, tool, arguments, monkeypatch):
    monkeypatch.delenv("EXPEDIT_RUN_CODE_IN_FILES", raising=False)
    ran, config = tmp_path / "ran", tmp_path / "bad.yaml"
    # It makes a folder, and nothing of the output folder: the tool ends there.
    tag = f"!!python/object/apply:os.makedirs [{ran}, 511, true]"
    config.write_text(f"_BASE_: {VITDET}\nOUTPUT_DIR: {tag}\n")
    given = [word.replace("{d}", str(tmp_path)) for word in arguments]
    # Options that take several values must not take what follows.
    command = [*given[:2], "--config-file", str(config), *given[2:]]
    with pytest.raises(SystemExit, match="the tag !!python/object/apply:os.makedirs is refused"):
        load_tool(tool).run(command)
    assert not ran.exists()
    with pytest.raises(SystemExit, match="OUTPUT_DIR must be text"):
        load_tool(tool).run([*command, "--run-code-in-files"])
    assert ran.is_dir() and not runs_code()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy", "load"),
        ("numpy", "ndarray.tofile"),
        ("numpy.core.multiarray", "fromfile"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch.storage", "_load_from_bytes"),
        ("collections", "namedtuple"),
        ("_codecs", "lookup"),
    ],
)
def test_no_other_name_is_found_in_a_pickle(module, name, tmp_path):
    path = tmp_path / "a.pkl"
    stack_global = b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, name))
    path.write_bytes(b"\x80\x04" + stack_global + b"\x93.")
    with pytest.raises(ValueError, match=rf"'.*a.pkl' contains {module}\.{name}, and"):
        read_checkpoint(str(path), "key")


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_any_protocol_are_read(protocol, tmp_path):
    content = OrderedDict(
        a=np.arange(6, dtype=np.float32).reshape(2, 3),
        b=np.asfortranarray(np.ones((2, 3), np.int64)),
        c=np.float64(1.5),
        d=["text", ("x", 1, None, True, b"bytes")],
        e=np.array(3),
    )
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_checkpoint(str(path), "key")
    assert list(found) == list(content) and found["c"] == 1.5 and found["d"] == content["d"]
    for name in "abe":
        assert found[name].dtype == content[name].dtype
        assert np.array_equal(found[name], content[name])


def test_caffe2_pickles_are_matched_by_name(tmp_path):
    """ImageNet's ``R-50.pkl`` is one: no 'model', other names, momenta beside the weights."""
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(3, 2)})
    arrays = {
        "weight": np.ones((2, 3), np.float32),
        "bias": np.ones(2, np.float32),
        "weight_momentum": np.zeros((2, 3), np.float32),
    }
    for content in (arrays, {"blobs": arrays, "cfg": "text"}):
        torch.nn.init.zeros_(model["backbone"].weight)
        (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol=2))
        load_weights(model, str(tmp_path / "R-50.pkl"))
        assert model["backbone"].weight.eq(1).all()


def test_checkpoints_of_training_load(tmp_path):
    """They have scalars of numpy, and others' the command line."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best": np.float64(0.5),
        "counts": np.arange(3),
        "args": argparse.Namespace(lr=1),
    }
    torch.save(content, tmp_path / "model.pth")
    found = read_checkpoint(str(tmp_path / "model.pth"), "key")
    assert found["best"] == 0.5 and found["args"].lr == 1 and found["counts"].tolist() == [0, 1, 2]
    load_weights(torch.nn.Linear(2, 2), str(tmp_path / "model.pth"))
