"""The table of families: its models are the published ones, its numbers are what they say."""

from __future__ import annotations

import json
import re
import statistics
from functools import partial

import pytest
import torch

from expedit_d2.families import FAMILIES, BudgetRow, Family, budget_table, measuring
from expedit_d2.methods import METHOD_REGISTRY
from support.repository import load_tool
from support.vits import detectron2_vit, swin, timm_vit

#: Parameters in millions, as published with the weights.
PUBLISHED = {
    "SAM's encoder ViT-B": 89.67,
    "DINOv2-L": 304.37,
    "DINOv3-L": 303.1,
    "Depth Anything V2-L": 335.32,
    "Mask2Former Swin-B": 106.9,
    "SWAG ViT-L": 305.17,
}
SMALL = (
    Family("ViT", 32, "timm", "timm", partial(timm_vit, (8, 8))),
    Family("ViTDet", 48, "detectron2", "detectron2", detectron2_vit),
    Family("Swin", 64, "detectron2", "detectron2", swin),
)


@pytest.fixture
def tool(monkeypatch):
    tool = load_tool("benchmark_families")
    monkeypatch.setattr(tool, "FAMILIES", SMALL)
    monkeypatch.setattr(tool, "LARGE", SMALL)
    return tool


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_models_are_the_published_ones(family):
    if not family.available:
        pytest.skip(f"{family.package} is not installed")
    if family.package == "detectron2":
        pytest.skip("cannot be built without memory; its size is that of the official config")
    with torch.device("meta"):
        model = family.build()
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED[family.model], abs=0.05)


@pytest.mark.slow
def test_rows(tool, tmp_path, capsys):
    options = ["--repeats", "3", "--warmup", "0", "--budget", "0.6", "--output", str(tmp_path)]
    tool.run(options)
    kept = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    rows = {row["model"]: row for entry in kept for row in entry["value"]["rows"]}
    assert [*rows] == ["ViT", "ViTDet", "Swin"]
    assert set(rows["ViT"]["methods"]) == set(METHOD_REGISTRY)
    for row in rows.values():
        assert row["restored"] and max(row["errors"].values()) < 1e-5
        plain, fewer = (row["block_gflops"][name] for name in ("plain", "expedited"))
        assert fewer / plain == pytest.approx(0.6, abs=0.08)
        assert plain - fewer == pytest.approx(
            row["gflops"]["plain"] - row["gflops"]["expedited"], rel=1e-6
        )
        assert all(len(times) == 3 and min(times) > 0 for times in row["seconds"].values())
    # An 8 x 8 map and a class token, 4 blocks, worked out by hand: linear layers and attention.
    tokens, dim = 65, 32
    expected = 4 * (8 * tokens * dim**2 + 2 * tokens**2 * dim)
    assert rows["ViT"]["block_gflops"]["plain"] == pytest.approx(expected / 1e9, rel=0.05)
    assert len(rows["ViT"]["seconds"]) == 2 and len(rows["ViTDet"]["seconds"]) == 4

    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    cells = [cell.strip() for cell in table.splitlines()[4].split("|")]
    assert cells[1] == "ViT, 32²" and cells[4] == "bit for bit"
    assert re.fullmatch(r"timm 1\.0\.\d+ to 1\.[\d.]+", cells[2])
    seconds = rows["ViT"]["seconds"]
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["expedited"], strict=True)]
    assert cells[7].startswith(f"{statistics.median(ratios):.2f}×")


@pytest.mark.slow
def test_several_budgets(tool, tmp_path):
    options = ["--repeats", "3", "--budget", "0.7", "0.5", "--output", str(tmp_path)]
    rows = tool.main(tool.parse_arguments(options))
    assert [row.budget for row in rows] == [1.0, 0.7, 0.5] * 3
    for plain, *others in zip(*[iter(rows)] * 3, strict=True):
        assert plain.memory > 0 and len(plain.seconds) == 3
        for row in others:
            assert row.block_gflops / plain.block_gflops == pytest.approx(row.budget, abs=0.08)
            difference = plain.block_gflops - row.block_gflops
            assert plain.gflops - row.gflops == pytest.approx(difference, rel=1e-6)
    line = (tmp_path / "table.md").read_text().splitlines()[6].split("|")
    plain, row = rows[0], rows[2]
    ratio = statistics.median(a / b for a, b in zip(plain.seconds, row.seconds, strict=True))
    assert [cell.strip() for cell in line[1:3]] == ["ViT, 32²", "0.5"]
    assert line[6].strip().startswith(f"{ratio:.2f}×")
    assert line[7].strip() == f"{ratio * row.gflops / plain.gflops:.2f}"


@pytest.mark.slow
def test_finished_rows_are_kept(tool, tmp_path, monkeypatch):
    options = ["--repeats", "1", "--warmup", "0", "--output", str(tmp_path)]
    tool.run([*options, "--models", "vit,"])
    measured = []

    def measure(family, *args):
        measured.append(family.model)
        return measuring.measure(family, *args)

    monkeypatch.setattr(tool, "measure", measure)
    tool.run([*options, "--models", "ViT"])
    assert measured == ["ViTDet"]
    tool.run([*options, "--models", "ViTDet", "--budget", "0.7"])  # is another result
    assert measured == ["ViTDet", "ViTDet"]


def test_seconds_of_two_rounds_are_their_median():
    row = BudgetRow("ViT", 32, 1.0, "", 1.0, 1.0, 0, [1.0, 3.0])
    assert budget_table([row]).splitlines()[2].split("|")[5].strip() == "2.0"


def test_a_model_that_is_not_restored_is_told(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring.torch, "equal", lambda a, b: False)
    tool.run(["--repeats", "1", "--warmup", "0", "--models", "vit,", "--output", str(tmp_path)])
    assert "| **no** |" in (tmp_path / "table.md").read_text()


def test_unknown_names_are_one_sentence(tool, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        tool.run(["--models", "ResNet", "--output", str(tmp_path)])
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "benchmark_families.py: --models ResNet is in no name of: ViT, 32², timm; "
        "ViTDet, 48², detectron2; Swin, 64², detectron2\n"
    )
