"""Weights that are damaged, or of another model."""

from __future__ import annotations

import pickle
import zipfile

import pytest
import torch
import yaml
from detectron2.modeling import build_model

from expedit_d2.backbones.timm_vit import create_timm_vit
from expedit_d2.data import register_collage
from expedit_d2.engine import frozen_weights, load_weights, slim_checkpoint
from expedit_d2.files import read_weights
from expedit_d2.projects import get_cfg, load_cfg, load_model
from support.detector import fails, train_net
from support.repository import ROOT, VITDET, load_tool


def test_files_that_are_no_weights(tiny_opts, tmp_path):
    good = (tmp_path / "weights.pth").read_bytes()
    bad = tmp_path / "bad.pth"
    for content, words in (
        (b"", "is not a checkpoint, or is damaged (it has 0 bytes)"),
        (b"some text\n", "is not a checkpoint, or is damaged ("),
        (good[: len(good) // 2], "is not a checkpoint, or is damaged ("),
        (pickle.dumps({"model": 1}), "is not a checkpoint, or is damaged ("),
    ):
        bad.write_bytes(content)
        message = fails([*tiny_opts, "MODEL.WEIGHTS", str(bad)])
        assert f"MODEL.WEIGHTS {str(bad)!r} {words}" in message, message
    for content, words in (
        ([torch.zeros(1)], "must contain weights by name, got a list"),
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
    assert f"MODEL.WEIGHTS {str(path)!r} is not a checkpoint, or is damaged" in message


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
        train_net.run(["--config-file", VITDET, *opts])
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
    load_model(load_cfg(VITDET, tiny_opts))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "embedded").glob("[a-z]*[a-z].yaml")), ids=lambda p: p.stem
)
def test_embedded_weights_load(path):
    """Those of heads alone too, without fetching the backbone's."""
    register_collage()
    nowhere = ["MODEL.TIMM.CHECKPOINT", "", "MODEL.VIT.CHECKPOINT", ""]
    cfg = load_cfg(path, ["MODEL.DEVICE", "cpu", *nowhere])
    model = build_model(cfg)
    load_weights(model, cfg.MODEL.WEIGHTS, elsewhere=frozen_weights(model))


def test_every_config_of_the_repository_is_plain_yaml():
    for path in [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("projects/**/*.yaml")]:
        yaml.safe_load(path.read_text(encoding="utf-8"))
        get_cfg().merge_from_file(str(path), allow_unsafe=False)
