"""What is undefined, not finite, uncertain or failed is reported, and never recommended."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from expedit_d2.analysis.flops import Flops
from expedit_d2.analysis.timing import Ratio, Timing
from expedit_d2.cli.workloads import load_workload
from expedit_d2.comparison import (
    Comparison,
    Conditions,
    Options,
    Row,
    Store,
    Target,
    compare,
    parse_setting,
    to_csv,
    to_markdown,
    to_terminal,
    tune,
)
from expedit_d2.comparison import session as session_module
from expedit_d2.data import register_collage
from expedit_d2.report import best_row, headline, headline_row, write_report
from expedit_d2.report.summary import tradeoffs
from expedit_d2.settings import Settings
from support.random_weights import write_random_weights
from support.repository import DPT, MASK2FORMER, SEGMENTER, VITDET, load_tool

pytestmark = pytest.mark.slow

QUIET = Options(timed_images=0, progress=False)
HALF = Settings(alpha=1, ratio=0.5)
CONDITIONS = Conditions("a CPU", 1, "float32", "2", "2026-01-01", 5, 4, "python compare.py")


def row(name="plain", blocks=4e9, ratio=None, **values) -> Row:
    flops = Flops(0, blocks, 0, 0, 0, 1e9)
    values = {"metrics": {"AP": 50.0, "PQ": 40.0}, "agreement": {"panoptic": 100.0}, **values}
    settings = None if name == "plain" else HALF
    if ratio is not None:
        speed = Timing(0.2 / ratio.median, 0.1, 0.3)
        values |= {"latency": speed, "baseline": Timing(0.2, 0.1, 0.3), "ratio": ratio}
    return Row(name, settings, flops=flops, parameters=1, **values)


def comparison_of(*rows: Row, **values) -> Comparison:
    return Comparison("m", "d", 8, CONDITIONS, list(rows), **values)


# --- undefined ---------------------------------------------------------------------------------


def test_metrics_that_are_zero_make_no_headline():
    """Neither of "every metric" is left out of it, nor is one of them divided by 0."""
    mine = {"AP": 0.0, "PQ": 0.0, "mIoU": 4.51}
    for plain_metrics in ({"AP": 0.0, "PQ": 0.0, "mIoU": 1.0}, {**mine, "AP": float("nan")}):
        plain = row(metrics=plain_metrics)
        better = row("better", 2e9, metrics=mine, agreement={"panoptic": 99.9})
        found = comparison_of(plain, better)
        assert found.lowest_retained(better) is None
        assert best_row(found) is headline_row(found) is None
        text = headline(found)
        assert (
            text.startswith("No setting can be recommended.") and "The plain model's AP is" in text
        )
        assert "451" not in text and "The plain model's AP is" in to_terminal(found)
        with pytest.raises(ValueError, match="the plain model's AP is (0|nan), so no share of it"):
            Target(retained=99).check(found)
        Target(retained=99, metric="mIoU").check(found)


def test_a_metric_that_a_row_lacks_is_not_kept():
    lacking = row("lacking", 2e9, metrics={"AP": 50.0})
    broken = row("broken", 2e9, metrics={"AP": 50.0, "PQ": float("nan")})
    found = comparison_of(row(), lacking, broken)
    assert found.lowest_retained(lacking) is found.lowest_retained(broken) is None
    assert best_row(found) is None
    assert "-" in to_terminal(found).splitlines()[3].split()


def test_a_headline_needs_agreement_as_well_as_the_metric():
    kept = row("kept", 2e9, agreement={"panoptic": 60.0})
    agreeing = row("agreeing", 2e9, metrics={"AP": 30.0, "PQ": 40.0}, agreement={"panoptic": 99.0})
    assert best_row(comparison_of(row(), kept, agreeing)) is None
    text = headline(comparison_of(row(), kept))
    assert "nearest is kept" in text and "100.0 %" in text and "60.0 % agreement" in text
    both = row("both", 3e9, agreement={"panoptic": 99.0})
    assert best_row(comparison_of(row(), kept, agreeing, both)) is both
    unknown = row("unknown", 2e9, agreement={})
    assert best_row(comparison_of(row(agreement={}), unknown)) is None


def test_a_detector_that_finds_nothing_is_no_success(tiny_opts, tmp_path, capsys):
    """The tiny detector with random weights: no score reaches 0.5."""
    options = ["--config-file", VITDET, "--first", "2", "--timed", "0", "--pictures", "0"]
    options += ["--output", str(tmp_path), "--setting", "half: alpha=1 ratio=0.5"]
    load_tool("compare").run([*options, "--", *tiny_opts])
    printed = capsys.readouterr().out
    assert "100" not in printed.split("GFLOPs: of")[0].replace("0.0 %", "")
    stored = Comparison.from_json((tmp_path / "vitdet.json").read_text())
    assert [r.agreement for r in stored.rows] == [{"instances": None}] * 2
    sentence = "The plain model finds nothing (instances): no agreement is defined."
    page = (tmp_path / "vitdet.html").read_text()
    for text in (printed, (tmp_path / "vitdet.md").read_text(), page):
        assert sentence in text
    assert "No setting can be recommended." in page
    assert next(line for line in printed.splitlines() if line.startswith("half")).split()[1] == "-"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (["--agreement", "90"], "an agreement cannot be reached: the plain model finds nothing"),
        (["--keep", "90"], "the plain model's box AP is (0|nan), so no share of it can be kept"),
        (["--faster", "1.1", "--timed", "1"], "on the 2 images of the sweep the plain model finds"),
    ],
)
def test_no_tuning_for_what_is_undefined(tiny_opts, tmp_path, target, words):
    options = ["--config-file", VITDET, "--timed", "0", "--sweep", "2", "--batch", "1"]
    with pytest.raises(SystemExit, match=f"^tune.py: {words}"):
        load_tool("tune").run([*options, "--output", str(tmp_path), *target, "--", *tiny_opts])


# --- not finite --------------------------------------------------------------------------------

KINDS = {VITDET: "instances", SEGMENTER: "semantic", DPT: "depth", MASK2FORMER: "panoptic"}


@pytest.fixture(scope="module", params=KINDS, ids=KINDS.values())
def broken(request, rendered_scenes, tmp_path_factory):
    """A model whose heads are NaN, and its kind of output."""
    weights = write_random_weights(request.param, tmp_path_factory.mktemp("broken") / "random.pth")
    register_collage(rendered_scenes.parent, {"train": 4, "val": 4}, (64, 64), name="broken")
    opts = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"]
    opts += ["MODEL.WEIGHTS", str(weights), "DATASETS.TEST", "('broken_val',)"]
    workload = load_workload(request.param, opts, limit=2)
    with torch.no_grad():
        for name, parameter in workload.model.named_parameters():
            if not name.startswith(("backbone.", "encoder.")):
                parameter.fill_(float("nan"))
    yield workload, KINDS[request.param]
    for name in ("broken_train", "broken_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_outputs_of_nan_agree_with_nothing(broken):
    workload, kind = broken
    found = compare(workload, {"half": Settings(alpha=1, ratio=0.5)}, QUIET)
    for one in found.rows:
        assert one.not_finite == 2
        assert one.agreement[kind] == 0.0
    assert best_row(found) is headline_row(found) is None
    said = "The output of half is not finite (NaN or infinite) on 2 of 2 images."
    assert said in to_terminal(found) and said in to_markdown(found)
    assert "The output of plain is not finite" in headline(found)


def test_nothing_is_tuned_for_nan(broken):
    workload, _ = broken
    with pytest.raises(ValueError, match="nothing to tune for: The output of plain is not finite"):
        tune(workload, {"half": Settings(alpha=1, ratio=0.5)}, Target(agreement=1), options=QUIET)


@pytest.fixture
def broken_when_reduced(confident_opts, monkeypatch):
    """A detector whose features are NaN on its second image if tokens are reduced; detectors drop
    what is not finite from their output."""
    original, seen = session_module._expedited, []

    def spoil(module, args, output):
        seen.append(args)
        return {k: v * float("nan") if len(seen) == 2 else v for k, v in output.items()}

    def expedited(model, settings):
        twin, resolved = original(model, settings)
        if settings is not None and settings.ratio == 0.5:
            seen.clear()
            twin.backbone.register_forward_hook(spoil)
        return twin, resolved

    monkeypatch.setattr(session_module, "_expedited", expedited)
    return load_workload(VITDET, confident_opts)


def test_a_row_that_is_not_finite_is_never_best(broken_when_reduced):
    others = {"half": HALF, "fine": Settings(alpha=1, ratio=0.75)}
    found = compare(broken_when_reduced, others, QUIET)
    plain, half, fine = found.rows
    assert [r.not_finite for r in found.rows] == [0, 1, 0]
    assert half.worst[1] == 0.0
    assert found.not_finite() == [
        "The output of half is not finite (NaN or infinite) on 1 of 4 images."
    ]
    assert headline_row(found) is not half
    # Even if all else were perfect.
    perfect = replace(half, metrics=plain.metrics, agreement={"instances": 100.0})
    assert best_row(replace(found, rows=[plain, perfect])) is None
    assert not Target(agreement=50).met(found, perfect)
    assert not any(
        p.front
        for plot in tradeoffs(replace(found, rows=[plain, perfect]))
        for p in plot.points
        if p.name == "half"
    )
    tuning = tune(broken_when_reduced, others, Target(agreement=1e-6), 4, 2, QUIET)
    assert tuning.best is None or tuning.best.name == "fine"
    assert "half" not in [r.name for r in tuning.front]


# --- settings that fail ------------------------------------------------------------------------


#: Images keep their shape: neither enlarged nor padded to a square.
NARROW = ("MODEL.VIT.SQUARE_PAD", "0", "INPUT.MAX_SIZE_TEST", "64")


@pytest.fixture
def photos(tmp_path):
    """Three images; the last one is so narrow that it has fewer tokens than the others."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (64, 64), (24, 64)]):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def test_a_setting_that_fails_on_an_image_costs_the_others_nothing(
    confident_opts, photos, tmp_path, capsys, monkeypatch
):
    opts = [*confident_opts, *NARROW]
    settings = ["--setting", "wide: alpha=2 grid=5x5", "--setting", "half: alpha=1 ratio=0.5"]
    options = ["--config-file", VITDET, "--timed", "0", "--pictures", "0", *settings]
    options += ["--images", str(photos), "--output", str(tmp_path / "out"), "--", *opts]
    with pytest.raises(SystemExit) as stopped:
        load_tool("compare").run(options)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert "wide: image" in captured.err and "2.png: GRID must be at most" in captured.err
    assert "Traceback" not in captured.err
    stored = Comparison.from_json((tmp_path / "out" / "vitdet.json").read_text())
    assert [r.name for r in stored.rows] == ["plain", "half"]
    assert list(stored.failed) == ["wide"] and "2.png: GRID" in stored.failed["wide"]
    assert "Failed: wide: image" in captured.out
    assert "Failed: wide: image" in (tmp_path / "out" / "vitdet.html").read_text()


def test_tuning_keeps_what_it_has_where_a_setting_fails_on_everything(confident_opts, photos):
    workload = load_workload(VITDET, [*confident_opts, *NARROW], images=str(photos))
    tried = {"wide": Settings(alpha=1, grid=(5, 5), method="pool")}
    tuning = tune(workload, tried, Target(agreement=1e-6), 2, 2, QUIET)
    assert [r.name for r in tuning.front] == ["wide"]  # the first two images are wide enough
    assert tuning.best is None and [r.name for r in tuning.confirmed.rows] == ["plain"]
    assert "2.png: GRID must be at most" in tuning.skipped["wide"]
    assert tuning.confirmed.failed == tuning.skipped


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pictures", "-1"], "--pictures: must be .* 0 or more, got '-1'"),
        (
            ["--setting", "alpha=9 ratio=0.5"],
            "setting 'alpha=9 ratio=0.5': ALPHA must be in 0 to 2",
        ),
        (["--expedit", "none.yaml"], "there is no config file 'none.yaml'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    tiny_opts, tmp_path, options, words, monkeypatch
):
    def run(*args):
        pytest.fail("something was measured")

    monkeypatch.setattr(session_module.Session, "_run", run)
    base = ["--config-file", VITDET, "--output", str(tmp_path)]
    base += ["--setting", "half: alpha=1 ratio=0.5"]
    with pytest.raises(SystemExit, match=f"^compare.py: .*{words}"):
        load_tool("compare").run([*base, *options, "--", *tiny_opts])


def test_every_setting_that_does_not_fit_is_named(confident_opts):
    workload = load_workload(VITDET, confident_opts)
    settings = {
        "one": Settings(alpha=7, ratio=0.5),
        "two": Settings(alpha=8, ratio=0.5),
        "ok": HALF,
    }
    with pytest.raises(ValueError, match="setting 'one': ALPHA .* got 7; setting 'two': .* got 8"):
        compare(workload, settings, QUIET)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pictures", "-1"], "--pictures: must be .* 0 or more, got '-1'"),
        (["--config-file", VITDET], "--config-file needs --expedit"),
        (["--config-file", VITDET, "--expedit", VITDET], "neither MODEL.EXPEDIT.ALPHA nor"),
    ],
)
def test_the_demo_checks_first(tmp_path, options, words):
    with pytest.raises(SystemExit, match=f"^demo.py: .*{words}"):
        load_tool("demo").run(["--output", str(tmp_path), *options])


# --- speed -------------------------------------------------------------------------------------


def test_one_paired_measurement_gives_speedup_and_fps(confident_opts):
    found = compare(
        load_workload(VITDET, confident_opts, limit=3),
        {"half": HALF, "late": Settings(alpha=2, ratio=0.5)},
        Options(timed_images=3, batch=2, progress=False),
    )
    # As on a machine that was busy while one setting was measured.
    busy = replace(found.rows[1], latency=found.rows[1].latency.scaled(7))
    found = replace(found, rows=[found.plain, busy, found.rows[2]])
    plain = found.plain
    for one in found.rows:
        assert found.fps(one) / found.fps(plain) == pytest.approx(found.speedup(one))
        assert found.latency(plain).median / found.latency(one).median == pytest.approx(
            found.speedup(one)
        )
        assert found.throughput(one) / found.throughput(plain) == pytest.approx(
            found.batched_speedup(one)
        )
    assert found.speedup(plain) == found.batched_speedup(plain) == 1.0
    assert found.fps(plain) == 1 / plain.latency.median


def test_ratio_is_of_the_rounds():
    """Images of several sizes spread the times, not the ratios; other work spreads both."""
    sizes = [1.0, 2.0, 4.0, 8.0]
    ratio = Ratio.of([2 * s for s in sizes], sizes)
    assert ratio == Ratio(2.0, 2.0, 2.0) and not ratio.is_wide
    busy = Ratio.of([2.0, 2.0, 6.0, 2.0, 9.0], [1.0, 2.0, 1.0, 1.5, 1.0])
    assert busy.median == 2.0 and busy.is_wide
    assert not Ratio(2.0, 1.81, 2.2).is_wide and Ratio(2.0, 1.79, 2.2).is_wide


def test_a_wide_spread_is_said_and_not_on_the_front(tmp_path):
    sure = row("sure", 3e9, Ratio(1.4, 1.38, 1.42), agreement={"panoptic": 99.0})
    wide = row("wide", 2e9, Ratio(2.0, 1.2, 2.9), agreement={"panoptic": 99.5})
    found = comparison_of(row(ratio=Ratio(1.0, 1.0, 1.0)), sure, wide)
    for text in (to_terminal(found), to_markdown(found)):
        assert "2.00× (1.20-2.90)" in text and "1.40× (" not in text
    assert "2.00×<small>1.20-2.90</small>" in write_report([found], [], tmp_path / "r").read_text()
    speed, flops = tradeoffs(found)[2:]
    assert {p.name for p in speed.points if p.front} == {"plain", "sure"}
    assert {p.name for p in flops.points if p.front} == {"plain", "wide"}
    assert [p.spread for p in speed.points] == [None, None, (1.2, 2.9)]
    # The headline counts what it has for sure.
    assert best_row(found) is sure
    assert not Target(speedup=1.5).speed_met(found, wide)
    assert "spread widely: 1.20 to 2.90" in headline(comparison_of(found.plain, wide))


# --- what a budget chose -----------------------------------------------------------------------


def test_what_a_budget_chose_is_shown_everywhere(confident_opts, tmp_path, capsys, monkeypatch):
    tool, output = load_tool("compare"), tmp_path / "out"
    opts = ["--", *confident_opts]
    options = ["--config-file", VITDET, "--first", "2", "--timed", "0", "--pictures", "1"]
    options += ["--output", str(output), "--setting", "mine: budget=0.9", "--setting", "budget=0.8"]
    tool.run([*options, *opts])
    stored = Comparison.from_json((output / "vitdet.json").read_text())
    mine = stored.rows[1]
    assert mine.settings == Settings(budget=0.9)
    assert mine.resolved.budget is None and mine.resolved.alphas
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("mine: budget=0.9 -> "))
    chosen = line.partition(" -> ")[2]
    assert parse_setting(chosen)[1] == mine.resolved  # a line to paste
    page = (output / "vitdet.html").read_text()
    assert chosen in (output / "vitdet.md").read_text() and chosen in page
    assert chosen in (output / "vitdet.csv").read_text()
    assert ">by budget<" not in page
    # Tuning: printed, and in the file that it writes.
    tool = load_tool("tune")
    monkeypatch.setattr(tool, "candidates", lambda spec: {"mine": Settings(budget=0.9)})
    options = ["--config-file", VITDET, "--timed", "0", "--sweep", "2"]
    tool.run([*options, "--output", str(output), "--agreement", "1e-6", *opts])
    assert f"budget=0.9 -> {chosen}" in capsys.readouterr().out
    (file,) = output.glob("*_tuned.yaml")
    assert f"-> {chosen}" in file.read_text().splitlines()[0] and "BUDGET: 0.9" in file.read_text()


# --- files -------------------------------------------------------------------------------------


def old_file() -> dict:
    """As it was written before these fields were there."""
    both = comparison_of(
        row(ratio=Ratio(1, 1, 1)),
        row("half", 2e9, Ratio(1.5, 1.5, 1.5), agreement={"panoptic": 98}),
    )
    values = json.loads(both.to_json())
    for name in ("failed", "config_file"):
        del values[name]
    for one in values["rows"]:
        for name in ("resolved", "ratio", "batched_ratio", "not_finite", "worst"):
            del one[name]
    return values


def test_files_of_older_versions_are_read():
    found = Comparison.from_json(json.dumps(old_file()))
    half = found.rows[1]
    assert half.resolved is None and half.not_finite == 0 and found.failed == {}
    assert found.speedup(half) == pytest.approx(1.5) and found.fps(half) == pytest.approx(7.5)
    assert "1.50×" in to_terminal(found) and "half" in to_csv(found)
    assert json.loads(Comparison.from_json(found.to_json()).to_json()) == json.loads(
        found.to_json()
    )


def test_all_fields_survive_a_file():
    full = row(
        "full",
        ratio=Ratio(1.5, 1.4, 1.6),
        batched_ratio=Ratio(1.2, 1.1, 1.3),
        resolved=Settings(alpha=(0, 1), keep=(0.5, 0.25)),
        not_finite=2,
        worst=("a.png", 12.5),
        agreement={"panoptic": None},
    )
    found = comparison_of(row(), full, failed={"x": "why"}, config_file="/a.yaml")
    assert Comparison.from_json(found.to_json()) == found
    assert asdict(found)["rows"][1]["worst"] == ("a.png", 12.5)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["rows"], [], "at least the plain model's row"),
        (["rows"], "text", "rows must be"),
        (["rows", 0], "text", "rows 1 must be an object, got 'text'"),
        (["rows", 0, "metrics"], {"AP": "high"}, "rows 1: metrics: AP must be float, got 'high'"),
        (["rows", 1, "flops"], None, "rows 2: flops must be an object"),
        (["rows", 1, "latency", "median"], "slow", "latency: median must be float, got 'slow'"),
        (["rows", 1, "settings", "ratio"], 7.0, r"RATIO must be in \(0, 1\], got 7.0"),
        (["rows", 1, "agreement"], [1], "agreement must be"),
        (["images"], True, "images must be int, got True"),
        (["conditions", "threads"], None, "conditions: threads must be int"),
        (["surplus"], 1, "unknown key 'surplus'"),
    ],
)
def test_a_report_of_something_else_is_one_sentence(tmp_path, path, value, words):
    values = old_file()
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file = tmp_path / "results.json"
    file.write_text(json.dumps(values))
    with pytest.raises(
        SystemExit, match=f"^report.py: .*is not the JSON of a comparison: .*{words}"
    ):
        load_tool("report").run([str(file), "--output", str(tmp_path / "r.html")])
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "content", [b"", b"text", b"[]", b'"text"', b"null", b"{}", b"\xff\xfe\x00"]
)
def test_a_report_of_no_comparison_is_one_sentence(tmp_path, content):
    file = tmp_path / "results.json"
    file.write_bytes(content)
    with pytest.raises(SystemExit, match="^report.py: .*results.json' is not the JSON of a compar"):
        load_tool("report").run([str(file), "--output", str(tmp_path / "r.html")])


def test_store_in_memory_keeps_arrays():
    store = Store(None)
    store.put_arrays("a", {"x": np.arange(2)})
    assert store.get_arrays("a")["x"].tolist() == [0, 1] and store.get_arrays("b") is None
