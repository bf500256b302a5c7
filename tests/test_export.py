"""torch.export and ONNX Runtime give what PyTorch gives, at sizes other than the example's."""

from importlib.util import find_spec

import pytest
import timm
import torch
from torch import nn

from expedit_d2 import expedite
from expedit_d2.backbones.timm_vit import TimmNet
from expedit_d2.export import ImageModel, export_onnx, export_program, onnx_session
from expedit_d2.operators import adaptive_pool
from support.random_weights import write_random_weights
from support.repository import SEGMENTER, load_tool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(torch.compiler, "is_exporting"), reason="export needs torch >= 2.7"
    ),
]

SETTINGS = {
    "plain": None,
    "grid": {"alpha": 0, "grid": (4, 5), "iterations": 2},
    "ratio": {"alpha": 0, "ratio": 0.6, "iterations": 1},
    "pool": {"alpha": 0, "ratio": 0.6, "method": "pool"},
    "pool, grid": {"alpha": 0, "grid": (4, 5), "method": "pool"},
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    return SETTINGS[request.param]


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        patch_size=8,
        embed_dim=24,
        depth=1,
        num_heads=2,
        num_classes=0,
        dynamic_img_size=True,
    )
    return TimmNet(vit).eval()


def images(height, width, batch=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))


@torch.no_grad()
def assert_same(run, model, x):
    expected = torch.utils._pytree.tree_leaves(model(x))
    found = torch.utils._pytree.tree_leaves(run(x))
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


def test_any_size(backbone, setting, tmp_path):
    if setting:
        expedite(backbone, **setting)
    example, path = images(64, 80), tmp_path / "vit.onnx"
    # Translating what RATIO makes of free sizes takes half a minute; docs/export.md has the result.
    if setting != SETTINGS["ratio"] and find_spec("onnxscript") and find_spec("onnxruntime"):
        program = export_onnx(backbone, example, path)
        runs = [program.module(), onnx_session(path, threads=1)]
    else:
        runs = [export_program(backbone, example).module()]
    for run in runs:
        for size in ((64, 80), (80, 64), (72, 200), (61, 90)):
            assert_same(run, backbone, images(*size))


def test_merging_at_one_size(backbone, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    expedite(backbone, alpha=0, keep=0.5, method="merge")
    export_onnx(backbone, images(64, 72), tmp_path / "vit.onnx", dynamic=False)
    run = onnx_session(tmp_path / "vit.onnx", threads=1)
    assert_same(run, backbone, images(64, 72) + 1)


def test_fixed_size_of_a_batch(backbone):
    expedite(backbone, alpha=0, grid=(4, 4), iterations=2)
    program = export_program(backbone, images(64, 72, batch=2), dynamic=False).module()
    assert_same(program, backbone, images(64, 72, batch=2) + 1)
    with pytest.raises(Exception, match="64"):
        program(images(80, 72, batch=2))


def test_a_program_can_be_saved_and_loaded(backbone, tmp_path):
    expedite(backbone, alpha=0, grid=(4, 4), iterations=2)
    torch.export.save(export_program(backbone, images(64, 72), dynamic=False), tmp_path / "vit.pt2")
    program = torch.export.load(tmp_path / "vit.pt2").module()
    assert_same(program, backbone, images(64, 72) + 1)


def test_pooling_in_a_program_is_adaptive_pooling():
    class Pool(nn.Module):
        def forward(self, x):
            return adaptive_pool(x, (3, 5))

    x = torch.randn(2, 7, 11, 4)
    program = torch.export.export(Pool(), (x,), strict=False)
    operators = {str(node.target) for node in program.graph.nodes}
    assert not any("adaptive" in name for name in operators)
    torch.testing.assert_close(program.module()(x), Pool()(x))


def test_what_needs_one_size_says_so_at_once(backbone):
    expedite(backbone, alpha=0, keep=0.5, method="merge")
    with pytest.raises(ValueError, match="METHOD merge.*any size.*dynamic=False"):
        export_program(backbone, images(64, 72))


def test_bad_arguments(backbone):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        export_program(backbone, torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match="training mode"):
        export_program(backbone.train(), images(64, 64))
    with pytest.raises(ValueError, match="TimmNet"):
        ImageModel(backbone)


def test_tool_exports_a_whole_model(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    tool = load_tool("export")
    path = tmp_path / "segmenter.onnx"
    options = ["--size", "128x160", "--fixed", "--check", "--benchmark", "1"]
    config = tmp_path / "segmenter.yaml"  # three of eight blocks: translating them takes long
    base = SEGMENTER.replace(".yaml", "_budget_50.yaml")
    config.write_text(f"_BASE_: {base}\nMODEL:\n  TIMM:\n    KWARGS:\n      depth: 3\n")
    weights = write_random_weights(str(config), tmp_path / "weights.pth")
    options += ["--", "MODEL.WEIGHTS", str(weights)]
    tool.run(["--config-file", str(config), "--output", str(path), *options])
    out = capsys.readouterr().out
    assert float(out.split("largest difference from PyTorch")[1].split()[0]) < 1e-3
    rows = [line for line in out.splitlines() if line.startswith(("PyTorch ", "ONNX Runtime "))]
    assert len(rows) == 2 and all(float(row.split()[-1].rstrip("x")) > 0 for row in rows)
    session = onnx_session(path, threads=1)
    expedited = session(images(128, 160))[0]
    assert expedited.shape == (1, 10, 128, 160)
    # For the benchmark the plain model is exported as well, and the other one not again.
    files = {file.name for file in tmp_path.glob("*.onnx")}
    assert files == {"segmenter.onnx", "segmenter_plain.onnx"}
    plain = onnx_session(tmp_path / "segmenter_plain.onnx", threads=1)
    assert (plain(images(128, 160))[0] - expedited).abs().max() > 1e-3


def test_tool_names_what_is_missing(tmp_path):
    tool = load_tool("export")
    config = SEGMENTER
    with pytest.raises(SystemExit, match="neither MODEL.EXPEDIT.ALPHA nor BUDGET"):
        tool.run(
            ["--config-file", config, "--output", str(tmp_path / "x.onnx"), "--benchmark", "1"]
        )
