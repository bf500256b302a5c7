"""The published tables: figures, both ways of counting them, speed-ups, and the tool."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from expedit_d2 import expedite
from expedit_d2.analysis.meta import traceable
from expedit_d2.backbones.timm_vit import create_timm_vit
from expedit_d2.paper import (
    RULES,
    Result,
    count_published,
    count_row,
    load_tables,
    select_tables,
    time_table,
    to_text,
)
from support.repository import load_tool

pytestmark = pytest.mark.slow

TABLES = load_tables()
CASES = [
    pytest.param(table, row, id=f"{table.model}-{table.dataset}-{row.alpha}-{row.grid}")
    for table in TABLES
    for row in table.rows
]
HOOKED = [case for case in CASES if case.values[0].model in RULES]
# The plain Swin-L is the same in all of its tables.
SWIN = [case for case in CASES if case.values[0].model not in RULES]
SWIN = SWIN[:1] + [case for case in SWIN if case.values[1].alpha is not None]
FIELDS = [
    *("model", "dataset", "alpha", "grid", "gflops_published", "gflops_published_rule"),
    *("gflops_fvcore", "speedup_published", "speedup_measured"),
]


@pytest.fixture(scope="module")
def tool():
    return load_tool("paper_tables")


# --- figures -------------------------------------------------------------------------------------


def test_tables_that_are_ours_to_make():
    assert [(table.model, table.dataset, len(table.rows)) for table in TABLES] == [
        ("Segmenter", "ADE20K", 4),
        ("Segmenter", "Cityscapes", 4),
        ("Segmenter", "Pascal Context", 4),
        ("DPT", "KITTI", 4),
        ("DPT", "NYUv2", 4),
        ("Mask2Former", "COCO panoptic", 2),
        ("Mask2Former", "COCO instance", 2),
        ("Mask2Former", "ADE20K panoptic", 2),
        ("Mask2Former", "ADE20K semantic", 2),
        ("SWAG ViT-L", "ImageNet", 4),
        ("SWAG ViT-H", "ImageNet", 4),
    ]


@pytest.mark.parametrize("table,row", CASES)
def test_configs_are_those_of_the_rows(table, row):
    settings = table.settings(row, "cpu")
    if row.alpha is None:
        assert settings is None and row is table.plain
        return
    # Blocks run before clustering: the published codes count them in three ways.
    offsets = {"DPT": {1}, "Mask2Former": {-1, 0}}.get(table.model, {0})
    assert settings.alpha - row.alpha in offsets
    assert settings.grid[0] * settings.grid[1] == row.grid[0] * row.grid[1]
    assert settings.grid == row.grid or (table.dataset, row.alpha) == ("KITTI", 6)
    assert settings.scope == ("window" if table.model == "Mask2Former" else "map")


def test_tables_by_name():
    assert len(select_tables()) == 11
    assert [t.dataset for t in select_tables(["DPT"], ["NYUv2"])] == ["NYUv2"]
    assert [t.model for t in select_tables(datasets=["ADE20K", "KITTI"])] == ["Segmenter", "DPT"]


@pytest.mark.parametrize(
    "names,message",
    [
        ({"models": ["SAM"]}, r"--models must be among \['Segmenter', .*\], got 'SAM'"),
        ({"datasets": ["CamVid"]}, r"--datasets must be among \['ADE20K', .*\], got 'CamVid'"),
        (
            {"models": ["DPT"], "datasets": ["ADE20K"]},
            "no table has --models .*DPT.* .*ADE20K",
        ),
    ],
)
def test_unknown_names(names, message):
    with pytest.raises(ValueError, match=message.replace(" ADE20K", ".*ADE20K")):
        select_tables(**names)


# --- the published rule --------------------------------------------------------------------------


@pytest.mark.parametrize("table,row", HOOKED)
def test_published_rule_meets_the_published_figure(table, row):
    model, inputs = table.build(row, "meta")
    gflops = count_published(model, inputs, RULES[table.model]) / 1e9
    assert gflops == pytest.approx(row.gflops, rel=0.001)


@pytest.mark.parametrize("table,row", SWIN)
def test_swin_meets_the_published_figure(table, row):
    result = count_row(table, row)
    assert result.gflops_published_rule == result.gflops_fvcore
    assert result.gflops_fvcore == pytest.approx(row.gflops, rel=0.001)


def vit_l_block(n: int, attends: bool = True) -> int:
    """A block of a ViT-L on n tokens, by hand; without the products of attention on request."""
    c, heads = 1024, 16
    layers = n * c * 3 * c + n * c * c + 2 * n * c * 4 * c
    norms_and_gelu = 2 * 2 * n * c + 2 * n * 4 * c
    attention = n * c + 2 * n * n * c + 2 * heads * n * n
    return layers + norms_and_gelu + attends * attention


def segmenter_by_hand(side: int, classes: int, layers: int, alpha: int = 24, side_to: int = 0):
    """Segmenter ViT-L/16 with a mask transformer, as it was published, in FLOPs."""
    c, n = 1024, side * side
    m = side_to * side_to if side_to else n
    total = n * (3 * 16 * 16 * c + c)  # patches, with a bias
    total += alpha * vit_l_block(n + 1) + (24 - alpha) * vit_l_block(m + 1) + 2 * (m + 1) * c
    if side_to:
        total += 5 * (50 * n * c + 75 * n + m * n * c + m * c) + n * c + 2 * (n + m)
        total += 20 * n * c + 60 * n
    decoder = m * c * c + layers * vit_l_block(m + classes, attends=False)
    return total + decoder + 2 * (m + classes) * c + 2 * m * classes


@pytest.mark.parametrize(
    "dataset,index,shape",
    [
        ("ADE20K", 0, (40, 150, 2)),
        ("ADE20K", 2, (40, 150, 2, 10, 28)),
        ("Cityscapes", 1, (48, 19, 1, 18, 32)),
        ("Pascal Context", 3, (30, 60, 2, 8, 15)),
    ],
)
def test_segmenter_by_hand(dataset, index, shape):
    (table,) = select_tables(["Segmenter"], [dataset])
    model, inputs = table.build(table.rows[index], "meta")
    assert count_published(model, inputs, RULES["Segmenter"]) == segmenter_by_hand(*shape)


def tiny_vit(**settings) -> nn.Module:
    vit = create_timm_vit("vit_tiny_patch16_224", depth=3, embed_dim=16, num_heads=2)
    if settings:
        expedite(vit, **settings)
    return vit.eval()


def test_two_flops_a_multiply_add_by_hand():
    """By the rule of DPT, with several images."""
    c, n, m, heads = 16, 24, 6, 2

    def block(tokens: int) -> int:
        products = 12 * tokens * c * c + 2 * tokens * tokens * c
        return products + tokens * c + heads * tokens * tokens + 2 * tokens * c + 4 * tokens * c

    vit = tiny_vit(alpha=1, grid=(2, 3), iterations=4, neighbors=2)
    x = torch.randn(2, 3, 64, 96)
    expected = n * (3 * 256 * c + c) + block(n + 1) + 2 * block(m + 1) + 4 * m * n * c
    expected += (n + 1) * c  # the last norm sees the rebuilt tokens
    assert count_published(vit, x, RULES["DPT"]) == 2 * 2 * expected
    # No hook stays, and an error leaves none either.
    with pytest.raises(AttributeError):
        count_published(vit, None, RULES["DPT"])
    assert not any(
        "count_published" in repr(hook)
        for module in vit.modules()
        for hook in module._forward_hooks.values()
    )


def test_models_without_a_transformer_are_refused():
    with pytest.raises(ValueError, match="transformer"):
        count_published(nn.Linear(2, 2), torch.zeros(1, 2), RULES["DPT"])


# --- fvcore on the meta device -------------------------------------------------------------------


def test_fvcore_and_the_rule_of_a_row():
    (table,) = select_tables(["Segmenter"], ["Pascal Context"])
    result = count_row(table, table.rows[3])
    assert (result.model, result.dataset, result.alpha) == ("Segmenter", "Pascal Context", 8)
    assert result.grid == [15, 15] and result.speedup_measured is None
    assert result.speedup_published == pytest.approx(25.0 / 14.7)
    # As tests/projects/segmenter/test_model.py has it.
    assert result.gflops_fvcore == pytest.approx(161.1, abs=0.1)
    assert abs(result.deviation) < 0.001


@pytest.mark.parametrize("stride,padding", [(1, 0), (2, 1), ((2, 3), (1, 0))])
def test_convolutions_as_products(stride, padding):
    layer = nn.Conv2d(3, 5, 3, stride, padding, bias=False)
    x = torch.randn(2, 3, 11, 13)
    plain, flops = layer(x), FlopCountAnalysis(layer, x).total()
    with traceable():
        torch.testing.assert_close(layer(x), plain)
        assert FlopCountAnalysis(layer, x).total() == flops
        with pytest.raises(ValueError, match="dilation"):
            nn.Conv2d(3, 5, 3, dilation=2)(x)
    assert torch.autocast("cpu", enabled=False).device == "cpu"  # as it was


# --- speed ---------------------------------------------------------------------------------------


def tiny_table():
    """The table of ADE20K with a tiny model and two rows."""
    (table,) = select_tables(["Segmenter"], ["ADE20K"])
    opts = [
        *("MODEL.TIMM.NAME", "vit_tiny_patch16_224"),
        *("MODEL.SEGMENTER.WINDOW_SIZE", 64, "MODEL.SEGMENTER.WINDOW_STRIDE", 64),
        *("MODEL.EXPEDIT.GRID", (2, 2), "MODEL.EXPEDIT.NEIGHBORS", 4),
    ]
    return replace(table, size=(64, 64), opts=tuple(opts), rows=table.rows[::3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_time_table(dtype):
    timings = time_table(tiny_table(), repeats=2, dtype=dtype, progress=False)
    assert len(timings) == 2 and all(timing.median > 0 for timing in timings)


# --- the tool ------------------------------------------------------------------------------------


@pytest.fixture
def fast(tool, monkeypatch):
    """The tool without arithmetic; tables take 1 and then 1 / rows seconds."""

    def count(table, row):
        grid = row.grid and list(row.grid)
        name = (table.model, table.dataset, row.alpha, grid)
        return Result(*name, row.gflops, row.gflops, row.gflops, row.fps / table.plain.fps)

    def timings(table, *_):
        plain, expedited = (torch.tensor(s) for s in (1.0, 0.5))
        medians = [plain] + [expedited] * (len(table.rows) - 1)
        return [type("Timing", (), {"median": median.item()}) for median in medians]

    monkeypatch.setattr(tool, "count_row", count)
    monkeypatch.setattr(tool, "time_table", timings)
    return tool


def test_json_and_table(fast, tmp_path, capsys):
    path = tmp_path / "rows.json"
    fast.run(["--models", "Segmenter", "DPT", "--json", str(path)])
    rows = json.loads(path.read_text())
    assert [list(row) for row in rows] == [FIELDS] * 20
    plain, first = rows[:2]
    assert (plain["alpha"], plain["grid"], plain["speedup_measured"]) == (None, None, 1.0)
    assert (first["alpha"], first["grid"], first["speedup_measured"]) == (16, [28, 28], 2.0)
    assert first["speedup_published"] == pytest.approx(7.92 / 6.55, abs=1e-4)
    out = capsys.readouterr().out
    assert out.count("2.00×") == 15
    assert "Weights are random" in out and "medians (repeats: 3)" in out
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_without_timing(fast, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fast, "time_table", None)
    fast.run(["--no-timing", "--datasets", "KITTI", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["speedup_measured"] for row in rows] == [None] * 4
    assert "Weights are random" in (out := capsys.readouterr().out)
    assert "not measured (--no-timing)" in out


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_interrupted_timing_leaves_what_was_done(fast, monkeypatch, tmp_path, capsys, error):
    once = fast.time_table

    def timings(table, *args):
        if table.dataset == "NYUv2":
            raise error
        return once(table, *args)

    monkeypatch.setattr(fast, "time_table", timings)
    path = tmp_path / "rows.json"
    with pytest.raises(SystemExit) as end:
        fast.run(["--models", "DPT", "--json", str(path)])
    assert end.value.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    rows = json.loads(path.read_text())
    assert [list(row) for row in rows] == [FIELDS] * 8
    assert [row["speedup_measured"] for row in rows] == [1.0, 2.0, 2.0, 2.0] + [None] * 4
    out = capsys.readouterr().out
    assert out.count("| DPT") == 8 and out.count("2.00×") == 3


def test_interrupted_counting_leaves_what_was_done(fast, monkeypatch, tmp_path, capsys):
    count = fast.count_row

    def some(table, row):
        if row.alpha == 4:
            raise KeyboardInterrupt
        return count(table, row)

    monkeypatch.setattr(fast, "count_row", some)
    path = tmp_path / "rows.json"
    with pytest.raises(SystemExit):
        fast.run(["--datasets", "KITTI", "--json", str(path)])
    assert [row["alpha"] for row in json.loads(path.read_text())] == [None, 6]
    captured = capsys.readouterr()
    assert captured.out.count("| DPT") == 2 and "interrupted" in captured.err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--json", f"{__file__}/all.json"], "test_tables.py' is a file; give a folder"),
        (["--json", "/"], "--json: '/' is a folder"),
        (["--models", "SAM"], "--models must be among"),
        (["--repeats", "0"], "--repeats: must be a whole number, 1 or more, got '0'"),
        (["--threads", "-1"], "--threads: must be a whole number, 1 or more, got '-1'"),
    ],
)
def test_errors_are_one_sentence(fast, arguments, message):
    with pytest.raises(SystemExit) as end:
        fast.run(arguments)
    text = str(end.value)
    assert end.value.code == 2
    assert text.startswith("paper_tables.py: ") and message in text and "\n" not in text


def test_text_says_what_the_columns_are():
    text = to_text([Result("DPT", "KITTI", 4, [16, 16], 613.6, 613.17, 308.1, 17.14 / 12.55)])
    assert "16×16" in text and "-0.07 %" in text and "1.37×" in text
    assert "Published rule, DPT: two FLOPs per multiply-add" in text and "Segmenter" not in text
