"""Comparisons: ratios and fronts, their JSON form, and the tables, recomputed by hand."""

import csv
import io
import json
from dataclasses import replace

import pytest

from expedit_d2.analysis.flops import Flops
from expedit_d2.analysis.timing import Timing
from expedit_d2.comparison import (
    Comparison,
    Conditions,
    Row,
    describe,
    pareto,
    parse_setting,
    save_tables,
    to_csv,
    to_markdown,
    to_terminal,
)
from expedit_d2.predictions import Metric
from expedit_d2.predictions.depth import DepthPrediction
from expedit_d2.settings import Settings

CONDITIONS = Conditions("a CPU", 1, "float32", "2.1", "2024-01-01", 5, 4, "python compare.py")


def row(name, ap, after, seconds, settings=None, agreement=97.0):
    flops = Flops(embed=1e9, before=2e9, clustering=0.0, after=after, reconstruction=0.0, head=4e9)
    return Row(
        name=name,
        settings=settings,
        metrics={"box AP": ap},
        agreement={"instances": agreement},
        flops=flops,
        parameters=3_000_000,
        latency=Timing(seconds, 0.9 * seconds, 1.1 * seconds),
        baseline=Timing(0.6, 0.5, 0.7),
        throughput=4.0,
        baseline_throughput=2.0,
        peak_memory=5 * 2**20,
        launches=300,
    )


@pytest.fixture
def comparison():
    ours = Settings(alpha=(0, 1, 2), method="merge", keep=0.5)
    rows = [row("plain", 50.0, 3e9, 0.6), row("ours", 49.0, 1.5e9, 0.4, ours)]
    return Comparison("vitdet", "collage_val", 7, CONDITIONS, rows)


def test_ratios_to_the_plain_model(comparison):
    plain, ours = comparison.rows
    assert comparison.retained(ours, "box AP") == pytest.approx(98.0)
    assert comparison.saved(ours) == pytest.approx(15.0)  # 8.5 of 10
    assert comparison.saved(ours, "transformer") == pytest.approx(25.0)  # 4.5 of 6
    assert comparison.saved(ours, "clustering") == 0.0  # the plain model has none
    assert comparison.flops_ratio(ours) == pytest.approx(10 / 8.5)
    assert comparison.speedup(ours) == pytest.approx(1.5)
    assert comparison.batched_speedup(ours) == 2.0
    assert (comparison.fps(ours), ours.lowest_agreement) == (pytest.approx(2.5), 97.0)
    untimed = replace(ours, latency=None, throughput=None)
    assert comparison.speedup(untimed) is comparison.batched_speedup(untimed) is None


def test_of_errors_the_inverse_is_retained(comparison, monkeypatch):
    error = Metric("depth", "RMSE", "RMSE", lower_is_better=True)
    monkeypatch.setattr(DepthPrediction, "metrics", (error,))
    plain = replace(comparison.plain, metrics={"RMSE": 2.0})
    worse = replace(comparison.plain, metrics={"RMSE": 2.5})
    both = replace(comparison, rows=[plain, worse])
    assert both.retained(worse, "RMSE") == pytest.approx(80.0)


def test_retained_of_nothing_is_unknown(comparison):
    plain, ours = (replace(r, metrics={"PQ": 0.0}) for r in comparison.rows)
    nothing = replace(comparison, rows=[plain, ours])
    assert nothing.retained(ours, "PQ") is nothing.lowest_retained(ours) is None
    assert "-" in to_terminal(nothing).splitlines()[3].split()


def test_json_round_trip(comparison):
    text = replace(comparison, unfinished=["more"]).to_json()
    assert Comparison.from_json(text) == replace(comparison, unfinished=["more"])
    assert json.loads(text)["rows"][1]["settings"]["keep"] == 0.5


def test_pareto_front_is_what_nothing_dominates():
    points = [(1, 5), (2, 5), (2, 4), (3, 3), (3, 3), (0, 6), (4, None), (2.5, 2)]
    front = pareto(points, lambda p: p[0], lambda p: p[1])

    def dominated(p):
        return any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points if q[1] is not None)

    assert front == [(3, 3), (2, 5), (0, 6)]
    assert set(front) == {p for p in points if p[1] is not None and not dominated(p)}


def test_terminal_table_has_the_essentials(comparison):
    head, _, first, second = to_terminal(comparison).splitlines()[:4]
    assert head.split() == (
        "setting box AP kept agree GFLOPs saved speed-up by GFLOPs FPS memory".split()
    )
    # The plain model against itself, whatever it took in the others' turns.
    assert first.split() == (
        "plain 50.00 100.0 % 97.0 % 10.00 0.0 % 1.00× 1.00× 1.67 5.0 MiB".split()
    )
    assert second.split() == (
        "ours 49.00 98.0 % 97.0 % 8.50 15.0 % 1.50× 1.18× 2.50 5.0 MiB".split()
    )


def test_terminal_table_of_several_tasks_shows_the_lowest_agreement(comparison):
    two = [replace(r, agreement={"instances": 97.0, "panoptic": 91.0}) for r in comparison.rows]
    text = to_terminal(replace(comparison, rows=two))
    assert "the lowest of instances, panoptic" in text
    assert "91.0 %" in text and "97.0 %" not in text
    assert "97.00 %" in to_markdown(replace(comparison, rows=two))


def test_interruption_is_said_in_the_tables(comparison):
    partial = replace(comparison, unfinished=["b", "c"])
    assert "Not finished: b, c." in to_terminal(partial)
    assert "Not finished" not in to_terminal(comparison)


def test_markdown_has_every_part(comparison):
    text = to_markdown(comparison)
    tables = text.split("**")
    assert [title for title in tables[1::2]] == ["Quality", "GFLOPs", "Cost", "Settings"]
    cells = [cell.strip() for cell in tables[6].splitlines()[5].split("|")[1:-1]]
    assert cells == (
        ["ours", "1.50×", "1.18×", "2.50", "400.0 (360.0-440.0)", "8.00", "2.00×", "5.0 MiB"]
        + ["300", "3.00 M"]
    )
    assert "`alpha=0-2 keep=0.5`" in text
    parts = [cell.strip() for cell in tables[4].splitlines()[5].split("|")[1:-1]]
    assert parts[1:7] == ["1.000", "2.000", "0.000", "1.500", "0.000", "4.000"]
    assert "`python compare.py`" in text


def test_csv_is_unrounded(comparison):
    first, second = csv.DictReader(io.StringIO(to_csv(comparison)))
    assert first["name"] == "plain" and first["settings"] == ""
    assert float(second["flops ratio"]) == 10 / 8.5
    assert float(second["seconds, high"]) == pytest.approx(1.1 * 0.4)
    assert float(second["peak memory"]) == 5 * 2**20


def test_tables_of_what_was_not_timed(comparison):
    bare = [
        replace(r, latency=None, throughput=None, peak_memory=None, metrics={})
        for r in comparison.rows
    ]
    untimed = replace(comparison, rows=bare)
    assert "FPS" not in to_terminal(untimed) and "kept" not in to_terminal(untimed)
    assert "speed-up" not in to_markdown(untimed) and "memory" not in to_markdown(untimed)
    assert next(csv.DictReader(io.StringIO(to_csv(untimed))))["speed-up"] == ""


def test_files(comparison, tmp_path):
    files = save_tables(comparison, tmp_path / "new" / "vitdet_1.5")
    assert [file.name for file in files] == ["vitdet_1.5.md", "vitdet_1.5.csv", "vitdet_1.5.json"]
    assert Comparison.from_json(files[2].read_text()) == comparison


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha=4 ratio=0.7", Settings(alpha=4, ratio=0.7)),
        ("ALPHA=4 GRID=16x12", Settings(alpha=4, grid=(16, 12))),
        ("alpha=4 grid=16,12 residual=False", Settings(alpha=4, grid=(16, 12), residual=False)),
        (
            "method=merge alpha=0-6 keep=0.5",
            Settings(alpha=tuple(range(7)), method="merge", keep=0.5),
        ),
        (
            "method=merge alpha=0-2,5 keep=900,800,700,600",
            Settings(alpha=(0, 1, 2, 5), method="merge", keep=(900, 800, 700, 600)),
        ),
        (
            "alpha=2 ratio=0.5 temperature=1e-2 reconstruct_at=head",
            Settings(alpha=2, ratio=0.5, temperature=0.01, reconstruct_at="head"),
        ),
        ("alpha=2 ratio=0.5 temperature=auto", Settings(alpha=2, ratio=0.5)),
        ("method=tome alpha=0-2 keep=0.5", Settings(alpha=(0, 1, 2), method="tome", keep=0.5)),
        ("alpha=0, keep=7,", Settings(alpha=(0,), keep=(7,))),
        ("budget=0.5", Settings(budget=0.5)),
        ("alpha=2,0 keep=0.3,0.8", Settings(alpha=(0, 2), keep=(0.8, 0.3))),
        ("alpha=5,1-3 ratio=0.5", Settings(alpha=(1, 2, 3, 5), ratio=0.5)),
        (
            "alpha=2 ratio=0.5 residual=no size_aware=off",
            Settings(alpha=2, ratio=0.5, residual=False, size_aware=False),
        ),
        ("alpha=2 ratio=0.5 residual=Yes", Settings(alpha=2, ratio=0.5, residual=True)),
        ("fused_attention=true", Settings(fused_attention=True)),
    ],
)
def test_settings_in_one_line(text, expected):
    name, settings = parse_setting(text)
    assert settings == expected
    assert name == describe(settings) and parse_setting(name) == (name, settings)
    assert parse_setting(f"my name: {text}") == ("my name", settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alpha", ["'alpha'", "keep=0.5"]),
        ("alpha=1 ratio=", ["'ratio='"]),
        ("alpha=1 alpha=2 ratio=0.5", ["alpha is given twice"]),
        ("alpha=1 ratio=2", ["RATIO", "(0, 1]", "2"]),
        ("alpha=1 share=2", ["unknown", "share", "ratio"]),
        ("ratio=0.5", ["RATIO 0.5 needs ALPHA"]),
        ("alpha=1 ratio=0.5 residual=maybe", ["RESIDUAL", "True or False", "'maybe'"]),
        ("", ["no alpha or budget"]),
    ],
)
def test_settings_that_are_wrong(text, words):
    with pytest.raises(ValueError) as error:
        parse_setting(text)
    assert all(word in str(error.value) for word in words), error.value
