"""Weights and configs of others: downloads, damage, other formats, and code that must not run."""

from __future__ import annotations

import argparse
import http.server
import os
import pickle
import socket
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from detectron2.utils.file_io import Detectron2Handler

from expedit_d2.backbones.timm_vit import create_timm_vit
from expedit_d2.engine import (
    load_lazy_config,
    load_lazy_model,
    load_weights,
    load_yaml,
    slim_checkpoint,
)
from expedit_d2.files import code_in_files, read_checkpoint, read_weights, runs_code
from expedit_d2.files import download as downloading
from expedit_d2.projects import get_cfg, load_cfg, load_model
from support.detector import LAZY, evaluate, fails, predictions
from support.repository import EMBEDDED, ROOT, load_tool
from support.segmenter import tiny_model, write_official

train_net = load_tool("train_net")


# --- downloads ---------------------------------------------------------------------------------


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; below ``torn/`` only their first half, once."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, directory=str(self.folder), **kwargs)

    def do_GET(self) -> None:
        name = self.path.split("?")[0].strip("/")
        self.asked.append(name)
        if name == "redirect":
            self.send_response(302)
            self.send_header("Location", "/weights.pth")
            self.end_headers()
        elif name.startswith(("torn/", "chunked/")) and self.asked.count(name) == 1:
            content = (self.folder / name.split("/")[1]).read_bytes()
            self.send_response(200)
            if name.startswith("torn/"):  # else nothing tells how much there should be
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        else:
            self.path = "/" + name.split("/")[-1]
            super().do_GET()

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local host with the files of the test's folder, an empty cache, and what was asked for."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    handler = type("Handler", (_Handler,), {"folder": tmp_path, "asked": []})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    running.url = f"http://127.0.0.1:{running.server_port}"
    running.asked = handler.asked
    monkeypatch.setattr(Detectron2Handler, "S3_DETECTRON2_PREFIX", f"{running.url}/")
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def as_zoo_file(source: Path, target: Path) -> None:
    """A checkpoint in the form of Detectron2's model zoo: arrays, pickled."""
    weights = torch.load(source)["model"]
    arrays = {name: w.numpy() for name, w in weights.items()}
    # Older ones have these beside the weights, and files of BatchNorm count batches.
    arrays["pixel_mean"] = np.zeros((3, 1, 1), np.float32)
    arrays["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((3, 4), np.float32)
    arrays["backbone.net.blocks.0.norm1.num_batches_tracked"] = np.array(7)
    content = {"model": arrays, "__author__": "somebody", "iteration": 9}
    target.write_bytes(pickle.dumps(content, protocol=2))


def test_official_weights_load_from_their_urls(tiny_opts, tmp_path, server):
    as_zoo_file(tmp_path / "weights.pth", tmp_path / "model_final.pkl")
    evaluate([*tiny_opts, "MODEL.WEIGHTS", f"{server.url}/weights.pth"])
    expected = predictions(tmp_path)
    zoo = "detectron2://ViTDet/COCO/model_final.pkl"
    evaluate([*tiny_opts, "MODEL.WEIGHTS", zoo])
    assert predictions(tmp_path) == expected and expected

    model = build_model(load_cfg(EMBEDDED, tiny_opts))
    good = torch.load(tmp_path / "weights.pth")["model"]
    asked = len(server.asked)
    for path in (
        f"{server.url}/weights.pth?dl=1",
        f"{server.url}/weights.pth?matching_heuristics=True",
        f"{server.url}/zoo/model_final.pkl",
        zoo,
        str(tmp_path / "model_final.pkl"),
    ):
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 7.0)
        load_weights(model, path)
        assert all(torch.equal(w, good[name]) for name, w in model.state_dict().items()), path
    assert len(server.asked) == asked + 2  # the others are cached
    cached = {str(p.relative_to(tmp_path / "cache")) for p in (tmp_path / "cache").rglob("*.pkl")}
    # What Detectron2 names itself lies where Detectron2 looks for it.
    host = server.url.removeprefix("http://").replace(":", "_")
    assert cached == {"ViTDet/COCO/model_final.pkl", f"{host}/zoo/model_final.pkl"}


def test_official_weights_of_a_lazy_config(tiny_data, tmp_path, server):
    from detectron2.config import LazyConfig, instantiate

    output = tmp_path / "output" / "inference"
    config = tmp_path / "vitdet.py"
    config.write_text(LAZY.replace("{name}", tiny_data[1]).replace("{output}", str(output)))
    torch.manual_seed(0)
    model = instantiate(LazyConfig.load(str(config)).model)
    torch.save({"model": model.state_dict()}, tmp_path / "lazy.pth")
    as_zoo_file(tmp_path / "lazy.pth", tmp_path / "model_final.pkl")
    opts = ["train.device=cpu", f"train.output_dir={output}"]
    key, url = "train.init_checkpoint", "detectron2://ViTDet/model_final.pkl"
    evaluate([*opts, f"{key}={url}"], config=str(config))
    assert predictions(tmp_path)
    loaded = load_lazy_model(load_lazy_config(str(config), [*opts, f"{key}={url}"])).state_dict()
    assert all(torch.equal(w, loaded[name]) for name, w in model.state_dict().items())
    message = fails([*opts, f"{key}=detectron2://none/such.pkl"], config=str(config))
    assert f"{key} 'detectron2://none/such.pkl' cannot be downloaded: HTTP Error 404" in message


def test_downloads_that_fail_are_one_sentence(tiny_opts, tmp_path, server):
    with socket.socket() as free:  # nobody listens there
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/a.pth"
    for path, reason in (
        (f"{server.url}/none.pth", "HTTP Error 404"),
        ("detectron2://none.pth", "HTTP Error 404"),
        (closed, "Connection refused"),
        ("http://nowhere.invalid/a.pth", ""),
        (f"{server.url}/folder/", "a URL ends in the name of a file"),
        (server.url, "a URL ends in the name of a file"),
        ("catalog://none", "not present in the catalog"),
    ):
        message = fails([*tiny_opts, "MODEL.WEIGHTS", path])
        assert message.startswith(f"train_net.py: MODEL.WEIGHTS {path!r} cannot be downloaded: ")
        assert reason in message, message
    message = fails([*tiny_opts, "MODEL.WEIGHTS", "s4://bucket/a.pth"])
    assert "nothing here opens 's4://bucket/a.pth'" in message


@pytest.mark.parametrize("way", ["torn", "chunked"])
def test_torn_downloads_do_not_stay(way, tiny_opts, server):
    url = f"{server.url}/{way}/weights.pth"
    message = fails([*tiny_opts, "MODEL.WEIGHTS", url])
    assert f"MODEL.WEIGHTS {url!r}" in message
    assert ("cannot be downloaded: " if way == "torn" else "removed from the cache") in message
    evaluate([*tiny_opts, "MODEL.WEIGHTS", url])
    assert server.asked.count(f"{way}/weights.pth") == 2


def test_a_silent_host_is_not_waited_for_for_ever(tiny_opts, monkeypatch):
    monkeypatch.setattr(downloading, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.pth"
        assert "timed out" in fails([*tiny_opts, "MODEL.WEIGHTS", url])
    assert socket.getdefaulttimeout() is None


def test_two_hosts_do_not_share_a_cached_file(tmp_path, server):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    read_weights(f"{server.url}/a.pth", "key")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    other = server.url.replace("127.0.0.1", "localhost")
    assert read_weights(f"{other}/a.pth", "key")["a"] == 1


def test_other_places_take_urls(tmp_path, server, monkeypatch):
    vit = create_timm_vit("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    again = create_timm_vit(
        "vit_tiny_patch16_224",
        checkpoint=f"{server.url}/vit.pth",
        depth=2,
        embed_dim=24,
        num_heads=2,
    )
    assert torch.equal(again.pos_embed, vit.pos_embed)
    with pytest.raises(OSError, match="MODEL.TIMM.CHECKPOINT 'http.*none.pth' cannot be downl"):
        create_timm_vit("vit_tiny_patch16_224", checkpoint=f"{server.url}/none.pth")

    write_official(tmp_path, tiny_model().state_dict())
    out = tmp_path / "out.pth"
    load_tool("convert_segmenter").run([f"{server.url}/checkpoint.pth", str(out)])
    assert out.is_file()
    load_tool("slim_checkpoint").run([f"{server.url}/vit.pth", str(tmp_path / "slim.pth")])
    assert torch.load(tmp_path / "slim.pth")["model"]["pos_embed"].dtype == torch.float16

    (tmp_path / "base.yaml").write_text("MODEL: {DEVICE: cpu}\nSOLVER: {MAX_ITER: 77}\n")
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {server.url}/base.yaml\n")
    assert load_cfg(tmp_path / "mine.yaml").SOLVER.MAX_ITER == 77
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {server.url}/none.yaml\n")
    with pytest.raises(OSError, match="'http.*/none.yaml' cannot be downloaded: HTTP Error 404"):
        load_cfg(tmp_path / "mine.yaml")


# --- code in files -----------------------------------------------------------------------------


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
        assert f"MODEL.WEIGHTS {str(path)!r} holds" in message and "mkdir beside" in message
        assert "EXPEDIT_RUN_CODE_IN_FILES=1" in message


def test_weights_to_start_training_from_run_no_code(tiny_opts, tmp_path, marker):
    (path, *_) = hostile(tmp_path, marker)
    opts = [*tiny_opts, "SOLVER.IMS_PER_BATCH", "2", "MODEL.WEIGHTS", str(path)]
    with pytest.raises(SystemExit, match="MODEL.WEIGHTS .*mkdir beside tensors"):
        train_net.run(["--config-file", EMBEDDED, *opts])


def test_resuming_runs_no_code(tiny_opts, tmp_path, marker):
    output = tmp_path / "output"
    output.mkdir()
    hostile(output, marker)[0].rename(output / "model_0000001.pth")
    (output / "last_checkpoint").write_text("model_0000001.pth")
    train = ["--resume", "--config-file", EMBEDDED, *tiny_opts, "SOLVER.IMS_PER_BATCH", "2"]
    with pytest.raises(SystemExit, match="--resume .*mkdir beside tensors"):
        train_net.run(train)
    (output / "model_0000001.pth").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(SystemExit, match="--resume .*damaged.*write its name into .*last_check"):
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
        assert f"train.init_checkpoint {str(path)!r} holds" in message


def test_timm_checkpoints_run_no_code(tmp_path, marker):
    for path in hostile(tmp_path, marker):
        with pytest.raises(ValueError, match="MODEL.TIMM.CHECKPOINT .*mkdir beside tensors"):
            create_timm_vit("vit_tiny_patch16_224", checkpoint=str(path))


def test_tools_for_checkpoints_run_no_code(tmp_path, marker):
    target = tmp_path / "target.pth"
    dpt = ["--config-file", str(ROOT / "configs" / "embedded" / "dpt.yaml")]
    for path in hostile(tmp_path, marker):
        for tool, options in (("slim_checkpoint", []), ("convert_dpt", dpt)):
            with pytest.raises(SystemExit, match=f"{tool}.py: .*mkdir beside tensors"):
                load_tool(tool).run([*options, str(path), str(target)])
    source = write_official(tmp_path, {})
    hostile(tmp_path, marker)[0].rename(source)
    convert = load_tool("convert_segmenter")
    with pytest.raises(SystemExit, match="mkdir beside tensors"):
        convert.run([str(source), str(target)])
    (tmp_path / "variant.yml").write_text(f"net_kwargs: !!python/object/apply:os.mkdir [{marker}]")
    with pytest.raises(SystemExit, match="no variant.yml of Segmenter: .*object/apply:os.mkdir"):
        convert.run([str(source), str(target)])
    assert not target.exists()


def test_configs_run_no_code(tiny_opts, tmp_path, marker):
    config = tmp_path / "bad.yaml"
    config.write_text(f"_BASE_: {EMBEDDED}\nOUTPUT_DIR: !!python/object/apply:os.mkdir [{marker}]")
    above = tmp_path / "above.yaml"
    above.write_text("_BASE_: bad.yaml\n")
    for path in (config, above):
        message = fails(tiny_opts, config=str(path))
        assert "bad.yaml', line 2: the tag !!python/object/apply:os.mkdir is not read" in message
        assert "EXPEDIT_RUN_CODE_IN_FILES=1" in message
        with pytest.raises(ValueError, match="the tag !!python"):
            load_yaml(str(path))
    with pytest.raises(ValueError, match="a LazyConfig is a .py file, got '.*bad.yaml'"):
        load_lazy_config(str(config), [])


def test_the_flag_brings_the_old_way_back(tiny_opts, tmp_path, monkeypatch):
    monkeypatch.delenv("EXPEDIT_RUN_CODE_IN_FILES", raising=False)
    weights = torch.load(tmp_path / "weights.pth")["model"]
    model = build_model(load_cfg(EMBEDDED, tiny_opts))
    files = hostile(tmp_path, tmp_path / "ran", weights)
    for path in files:
        with code_in_files(True):
            load_weights(model, str(path))
        (tmp_path / "ran").rmdir()
        assert not runs_code()
    evaluate([*tiny_opts, "MODEL.WEIGHTS", str(files[0])], "--run-code-in-files")
    (tmp_path / "ran").rmdir()
    assert "beside tensors" in fails([*tiny_opts, "MODEL.WEIGHTS", str(files[0])])
    slim, target = load_tool("slim_checkpoint"), str(tmp_path / "slim.pth")
    slim.run(["--run-code-in-files", str(files[0]), target])
    assert (tmp_path / "ran").is_dir()
    read_weights(target, "key")
    config = tmp_path / "eval.yaml"
    config.write_text(f'_BASE_: {EMBEDDED}\nTEST:\n  EVAL_PERIOD: !!python/object/apply:eval ["7"]')
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
    config.write_text(f"_BASE_: {EMBEDDED}\nOUTPUT_DIR: {tag}\n")
    given = [word.replace("{d}", str(tmp_path)) for word in arguments]
    # Options that take several values must not take what follows.
    command = [*given[:2], "--config-file", str(config), *given[2:]]
    with pytest.raises(SystemExit, match="the tag !!python/object/apply:os.makedirs is not read"):
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
    with pytest.raises(ValueError, match=rf"'.*a.pkl' holds {module}\.{name} beside tensors"):
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


# --- damage ------------------------------------------------------------------------------------


def test_files_that_are_no_weights(tiny_opts, tmp_path):
    good = (tmp_path / "weights.pth").read_bytes()
    bad = tmp_path / "bad.pth"
    for content, words in (
        (b"", "is no file of weights, or is damaged (it has 0 bytes)"),
        (b"some text\n", "is no file of weights, or is damaged ("),
        (good[: len(good) // 2], "is no file of weights, or is damaged ("),
        (pickle.dumps({"model": 1}), "is no file of weights, or is damaged ("),
    ):
        bad.write_bytes(content)
        message = fails([*tiny_opts, "MODEL.WEIGHTS", str(bad)])
        assert f"MODEL.WEIGHTS {str(bad)!r} {words}" in message, message
    for content, words in (
        ([torch.zeros(1)], "must hold weights by name, got a list"),
        ({}, "but it is empty"),
        ({"model": {}}, "but it is empty"),
        ({"model": {"a": 1}}, "but 'a' is a int"),
        ({1: torch.zeros(1)}, "but 1 is a Tensor"),
        ({"state_dict": {"a": torch.zeros(1)}, "epoch": 1}, "but 'state_dict' is a dict"),
    ):
        torch.save(content, bad)
        with pytest.raises(ValueError, match=f"^MODEL.WEIGHTS '.*bad.pth' .*{words}"):
            load_weights(torch.nn.Linear(1, 1), str(bad))
    pkl = tmp_path / "bad.pkl"
    for content in (b"", b"text", pickle.dumps({1: 2}), pickle.dumps({"a": "b"})):
        pkl.write_bytes(content)
        with pytest.raises(ValueError, match="^MODEL.WEIGHTS '.*bad.pkl'"):
            load_weights(torch.nn.Linear(1, 1), str(pkl))


def test_flipped_bytes_are_noticed(tiny_opts, tmp_path):
    """Also where every number stays finite: the archive's checksums tell."""
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
    content = bytearray(path.read_bytes())
    content[entry.header_offset + entry.file_size // 2] ^= 1
    path.write_bytes(content)
    assert torch.load(path)  # PyTorch does not mind
    message = fails(tiny_opts)
    assert f"MODEL.WEIGHTS {str(path)!r} is no file of weights, or is damaged" in message


def test_archives_without_checksums_load(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this PyTorch writes checksums always")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "b.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_weights(str(tmp_path / "b.pth"), "key")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value, tiny_opts, tmp_path):
    weights = torch.load(tmp_path / "weights.pth")
    weights["model"]["backbone.net.blocks.1.attn.qkv.bias"][3] = value
    torch.save(weights, tmp_path / "weights.pth")
    words = "weights.pth': backbone.net.blocks.1.attn.qkv.bias is not finite"
    assert words in fails(tiny_opts)
    opts = [*tiny_opts, "SOLVER.IMS_PER_BATCH", "2"]
    with pytest.raises(SystemExit, match=words):  # to start training from, too
        train_net.run(["--config-file", EMBEDDED, *opts])
    vit = create_timm_vit("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2)
    vit.blocks[1].norm1.bias.data[0] = value
    path = str(tmp_path / "vit.pth")
    torch.save(vit.state_dict(), path)
    with pytest.raises(ValueError, match="vit.pth': blocks.1.norm1.bias is not finite"):
        create_timm_vit("vit_tiny_patch16_224", checkpoint=path, depth=2, embed_dim=24, num_heads=2)
    with pytest.raises(ValueError, match="vit.pth': blocks.1.norm1.bias is not finite"):
        slim_checkpoint(path, str(tmp_path / "slim.pth"))
    assert not (tmp_path / "slim.pth").exists()


def test_slim_keeps_what_half_precision_cannot_hold(tmp_path, capsys):
    weights = {
        "small": torch.tensor([1.5]),
        "large": torch.tensor([1e5, 1.0]),
        "n": torch.ones(1, dtype=torch.long),
    }
    torch.save({"model": weights}, tmp_path / "a.pth")
    load_tool("slim_checkpoint").run([str(tmp_path / "a.pth"), str(tmp_path / "b.pth")])
    assert "not in half precision, which has no numbers as large: large" in capsys.readouterr().out
    kept = read_weights(str(tmp_path / "b.pth"), "key")
    assert kept["small"].dtype == torch.float16 and kept["n"].dtype == torch.long
    assert torch.equal(kept["large"], weights["large"])


# --- weights of another model ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "backbone.net.blocks.3.norm1.weight",  # deeper than the model
        "backbone.net.blocks.1.ls1.gamma",  # more in a block than the model's have
    ],
)
def test_surplus_layers_are_refused(name, tiny_opts, tmp_path):
    weights = torch.load(tmp_path / "weights.pth")
    weights["model"][name] = torch.zeros(2)
    torch.save(weights, tmp_path / "weights.pth")
    assert f"the weights do not fit the model: {name} is not in the model" in fails(tiny_opts)


def test_surplus_that_real_checkpoints_have_is_taken(tiny_opts, tmp_path):
    weights = torch.load(tmp_path / "weights.pth")
    nan = torch.full((2,), float("nan"))  # of no use, so of no harm
    weights["model"] |= {
        "pixel_mean": torch.zeros(3, 1, 1),
        "backbone.net.norm.weight": nan,
        "backbone.net.head.weight": nan,
        "backbone.net.cls_token": nan,
        "backbone.net.blocks.0.attn.relative_position_index": torch.zeros(2, dtype=torch.long),
        "backbone.net.blocks.0.attn_mask": torch.full((2,), float("-inf")),
        "roi_heads.keypoint_head.conv_fcn1.weight": nan,
        "criterion.empty_weight": nan,
    }
    weights |= {"optimizer": {}, "ema_state": {"a": torch.zeros(1)}, "iteration": 3}
    torch.save(weights, tmp_path / "weights.pth")
    load_model(load_cfg(EMBEDDED, tiny_opts))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "embedded").glob("[a-z]*[a-z].yaml")), ids=lambda p: p.stem
)
def test_embedded_weights_load(path):
    cfg = load_cfg(path, ["MODEL.DEVICE", "cpu"])
    load_weights(build_model(cfg), cfg.MODEL.WEIGHTS)


def test_every_config_of_the_repository_is_plain_yaml():
    for path in [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("projects/**/*.yaml")]:
        yaml.safe_load(path.read_text(encoding="utf-8"))
        get_cfg().merge_from_file(str(path), allow_unsafe=False)
