"""The benchmark for GPUs, on a CPU with small models."""

from __future__ import annotations

import json

import pytest
import torch

from expedit_d2.analysis import gpu_benchmark as benchmark
from expedit_d2.analysis import gpu_models
from expedit_d2.analysis.gpu_models import SMALL_MODELS
from expedit_d2.analysis.launches import count_launches
from expedit_d2.cuda_graph import capture
from support.repository import load_tool

SMALL = ["--device", "cpu", "--small", "--batch", "1", "--dtype", "float32"]


@pytest.fixture
def tool():
    return load_tool("benchmark_gpu")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(benchmark, "_ROUNDS", (1, 1))


def test_the_most_important_comes_first():
    units = benchmark.plan(["a", "b"], names=["x", "y"])
    first = units[0]
    assert (first.model, first.batch, first.dtype, first.mode) == ("a", 1, "bfloat16", "eager")
    assert first.names == ("x", "y")
    assert len(set(units)) == len(units) == 2 * 3 * 3 * (1 + 1 + 2)
    place = {str(unit): index for index, unit in enumerate(units)}
    assert place["a, batch 1, bfloat16, compiled, x"] < place["a, batch 1, float32, eager"]
    assert place["a, batch 1, bfloat16, compiled, x"] < place["a, batch 1, bfloat16, compiled, y"]


def test_every_method_is_compared():
    named = benchmark.settings()
    assert {"merge 0.5", "merge 0.7", "tome 0.5", "expedit 0.7", "published 0.5"} <= set(named)
    assert named["published 0.5"]["temperature"] == 0.02


def test_rows(tool, tmp_path, capsys):
    names = ["--settings", "merge 0.5", "pool 0.7"]
    options = ["--models", "Segmenter", "--mode", "eager", "--output", str(tmp_path)]
    assert tool.main([*SMALL, *names, *options]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert [*rows] == ["plain", "merge 0.5", "pool 0.7"]
    assert rows["plain"]["speed_up"] == rows["plain"]["gflops_ratio"] == 1
    assert 1.2 < rows["pool 0.7"]["gflops_ratio"] < rows["merge 0.5"]["gflops_ratio"] < 2.2
    assert rows["plain"]["launches"] < rows["pool 0.7"]["launches"] < rows["merge 0.5"]["launches"]
    assert all(row["seconds"]["median"] > 0 and row["memory"] > 0 for row in rows.values())
    # A 10 x 10 map and a class token, 4 blocks, worked out by hand: patches, then linear layers
    # and attention.
    tokens, dim = 101, 64
    expected = 100 * 3 * 256 * dim + 4 * (12 * tokens * dim**2 + 2 * tokens**2 * dim)
    assert rows["plain"]["gflops"] == pytest.approx(expected / 1e9, rel=1e-6)
    # The CPU is compared with itself.
    assert {row["deviation"] for row in result["deviations"]} == {0.0}
    assert result["left_out"] == []
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert lines == result["rows"] + result["deviations"]
    table = (tmp_path / "table.md").read_text()
    assert "| merge 0.5 |" in table and table in capsys.readouterr().out


@pytest.mark.parametrize(
    "mode,owner,name",
    [
        ("compiled", torch, "compile"),
        ("graph", benchmark, "capture"),
    ],
)
def test_models_are_compiled_or_recorded(monkeypatch, mode, owner, name):
    prepared = []

    def prepare(model, *inputs):
        prepared.append(model)
        return model

    monkeypatch.setattr(owner, name, prepare)
    entry = SMALL_MODELS["DINOv2, small"]
    unit = benchmark.Unit("DINOv2, small", 1, "float32", mode, ("merge 0.5",))
    rows = [*benchmark.measure(entry, unit, torch.device("cpu"))]
    assert len(prepared) == len(rows) == 2
    assert all(row["mode"] == mode and "launches" not in row for row in rows)
    assert f"| {mode} | merge 0.5 |" in benchmark.table(rows)


def test_graphs_have_fused_attention(monkeypatch):
    recorded = []
    monkeypatch.setattr(benchmark, "capture", lambda model, *_: recorded.append(model) or model)
    entry = SMALL_MODELS["ViTDet, small"]
    unit = benchmark.Unit("ViTDet, small", 1, "float32", "graph", ("merge 0.5",))
    [*benchmark.measure(entry, unit, torch.device("cpu"))]
    assert len(recorded) == 2
    for model in recorded:
        with torch.no_grad():
            launches = count_launches(model, torch.randn(1, 3, entry.size, entry.size))
        assert launches["_softmax"] == 0  # Detectron2's own attention has one in each block


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="need inputs on a GPU, got one on 'cpu'"):
        capture(torch.abs, torch.ones(1))


def test_graphs_are_not_recorded_inside_of_autocast(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda: True)
    with pytest.raises(ValueError, match="cannot be recorded inside of torch.autocast"):
        capture(torch.abs, torch.ones(1))


def test_what_fails_is_said_and_costs_nothing_else(monkeypatch):
    def out_of_memory(model, x):
        if model.vit.blocks.__class__.__name__ == "ExpeditedBlocks":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory\nmore lines")
        return 1.0

    monkeypatch.setattr(benchmark, "_gflops", out_of_memory)
    unit = benchmark.Unit("DINOv2, small", 1, "float32", "eager", ("merge 0.5",))
    entry = SMALL_MODELS["DINOv2, small"]
    plain, merged = benchmark.measure(entry, unit, torch.device("cpu"))
    assert "error" not in plain and plain["speed_up"] == 1
    assert merged["error"] == "OutOfMemoryError: CUDA out of memory"
    assert "OutOfMemoryError: CUDA out of memory |" in benchmark.table([plain, merged])


def test_time_limit_names_what_is_left(tool, tmp_path, capsys):
    assert tool.main([*SMALL, "--seconds", "0", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["rows"] == [] and len(result["left_out"]) == 3 * (1 + len(benchmark.settings()))
    assert result["left_out"][0] == "Segmenter, small, batch 1, float32, eager"
    assert "No time was left for" in capsys.readouterr().out


def test_an_interruption_keeps_what_is_there(tool, tmp_path, monkeypatch):
    measure = benchmark.measure

    def interrupted(entry, unit, device):
        if "ViTDet" in unit.model:
            raise KeyboardInterrupt
        return measure(entry, unit, device)

    monkeypatch.setattr(benchmark, "measure", interrupted)
    monkeypatch.setattr(benchmark, "check", lambda *_: [])
    options = ["--settings", "pool 0.5", "--mode", "eager", "--output", str(tmp_path)]
    assert tool.main([*SMALL, *options]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert {row["name"] for row in result["rows"]} == {"plain", "pool 0.5"}
    assert len(result["left_out"]) == 2


def test_without_detectron2(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_models, "find_spec", lambda name: None if name == "detectron2" else 1)
    monkeypatch.setattr(benchmark, "check", lambda *_: [])
    options = ["--settings", "pool 0.5", "--mode", "eager", "--output", str(tmp_path)]
    assert tool.main([*SMALL, *options]) == 0
    assert "ViTDet, small is left out: detectron2 is not installed" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"Segmenter, small", "DINOv2, small"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "ResNet"], "--models ResNet names none of Segmenter, small"),
        (["--mode", "graph"], "--mode graph needs a GPU"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--settings", "merge 0.1"], "invalid choice: 'merge 0.1'"),
    ],
)
def test_bad_options(tool, options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--device", "cpu", "--small", *options])
    assert message in capsys.readouterr().err


def test_no_gpu(tool, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        tool.main([])
    assert "torch finds no GPU" in capsys.readouterr().err
