"""Weights by address: downloads, interrupted and repeated."""

from __future__ import annotations

import http.server
import pickle
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import Detectron2Handler

from expedit_d2.backbones.timm_vit import create_timm_vit
from expedit_d2.engine import (
    load_lazy_config,
    load_lazy_model,
    load_weights,
)
from expedit_d2.files import download as downloading
from expedit_d2.files import read_weights
from expedit_d2.projects import load_cfg
from support.detector import LAZY, evaluate, fails, predictions
from support.repository import VITDET, load_tool
from support.segmenter import tiny_model, write_official


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

    model = build_model(load_cfg(VITDET, tiny_opts))
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


@pytest.mark.slow
def test_downloads_that_fail_are_one_sentence(tiny_opts, tmp_path, server):
    with socket.socket() as free:  # nobody listens there
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/a.pth"
    for path, reason in (
        (f"{server.url}/none.pth", "HTTP Error 404"),
        ("detectron2://none.pth", "HTTP Error 404"),
        (closed, "Connection refused"),
        ("http://nowhere.invalid/a.pth", ""),
        (f"{server.url}/folder/", "a URL must end in a file name"),
        (server.url, "a URL must end in a file name"),
        ("catalog://none", "not present in the catalog"),
    ):
        message = fails([*tiny_opts, "MODEL.WEIGHTS", path])
        assert message.startswith(f"train_net.py: MODEL.WEIGHTS {path!r} cannot be downloaded: ")
        assert reason in message, message
    message = fails([*tiny_opts, "MODEL.WEIGHTS", "s4://bucket/a.pth"])
    assert "'s4://bucket/a.pth' has an unknown scheme" in message


@pytest.mark.parametrize("way", ["torn", "chunked"])
@pytest.mark.slow
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
