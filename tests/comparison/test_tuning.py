"""Tuning: candidates, the search against trying everything, the tuned config, the tool."""

import itertools
from dataclasses import replace

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from expedit_d2.adapters import find_transformer
from expedit_d2.analysis.timing import Timing
from expedit_d2.cli.workloads import load_workload, setting_of, write_tuned_config
from expedit_d2.comparison import (
    Comparison,
    Options,
    Store,
    Target,
    candidates,
    compare,
    parse_setting,
    run,
    tune,
)
from expedit_d2.comparison import session as session_module
from expedit_d2.comparison import tuning as tuning_module
from expedit_d2.data import register_collage
from expedit_d2.projects import load_cfg, trainer_of
from expedit_d2.settings import Settings
from support.detector import LAZY, make_confident
from support.repository import ROOT, SEGMENTER, VITDET, load_tool

pytestmark = pytest.mark.slow

QUIET = Options(timed_images=0, progress=False)

#: Few enough to try all of them, and from hardly anything to nearly everything.
FEW = dict(
    parse_setting(text)
    for text in (
        *(f"alpha={alpha} ratio={ratio}" for alpha in (1, 2) for ratio in (0.25, 0.5, 0.75)),
        *(f"method=merge alpha=0-2 keep={keep}" for keep in (0.1, 0.3, 0.5, 0.7, 0.9)),
    )
)


@pytest.fixture(scope="module")
def segmenter_opts(tmp_path_factory):
    """The small Segmenter, shrunken, with random weights in which nothing is zero."""
    folder = tmp_path_factory.mktemp("tune")
    register_collage(folder, {"train": 4, "val": 4}, (64, 64), name="tune")
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    sides = ("MODEL.SEGMENTER.WINDOW_SIZE", "MODEL.SEGMENTER.WINDOW_STRIDE", "INPUT.MIN_SIZE_TEST")
    opts = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"]
    for key, value in sizes.items():
        opts += [f"MODEL.TIMM.KWARGS.{key}", str(value)]
    for key in sides:
        opts += [key, "64"]
    torch.manual_seed(0)
    cfg = load_cfg(SEGMENTER, opts)
    model = trainer_of(cfg).build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    weights = folder / "segmenter.pth"
    torch.save({"model": model.state_dict()}, weights)
    opts += ["MODEL.WEIGHTS", str(weights), "DATASETS.TEST", "('tune_val',)"]
    yield [*opts, "OUTPUT_DIR", str(folder / "output")]
    for name in ("tune_train", "tune_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="module")
def workload(segmenter_opts):
    return load_workload(SEGMENTER, segmenter_opts)


@pytest.fixture(scope="module")
def store():
    """Of all searches here, so that none repeats what another one has run."""
    return Store(None)


@pytest.fixture(scope="module")
def everything(workload, store):
    return compare(workload, FEW, QUIET, store)


def search(workload, target, **options):
    values = {"sweep_images": 4, "confirm": 1, "options": QUIET, **options}
    return tune(workload, FEW, target, **values)


def levels(comparison):
    """Targets between neighbouring agreements, so that each has its own best setting."""
    found = sorted({row.lowest_agreement for row in comparison.rows[1:]})
    return [(a + b) / 2 for a, b in itertools.pairwise(found) if b - a > 1e-9]


def test_the_best_setting_is_that_of_trying_everything(workload, everything, store):
    assert len(levels(everything)) >= 6
    for level in levels(everything):
        good = [row for row in everything.rows[1:] if row.lowest_agreement >= level]
        best = min(good, key=lambda row: row.flops.total)
        tuning = search(workload, Target(agreement=level), store=store)
        assert tuning.best == best
        # Found without running everything on everything.
        assert len(tuning.confirmed.rows) - 1 < len(FEW) / 2
        assert not tuning.interrupted and not tuning.skipped


def test_no_best_setting_where_there_is_none(workload, everything, store):
    best = max(row.lowest_agreement for row in everything.rows[1:])
    tuning = search(workload, Target(agreement=min(100.0, best + 1e-3)), store=store)
    assert best < 100 and tuning.best is None
    assert tuning.confirmed.rows[1].lowest_agreement == best  # the one that comes closest


def test_front_is_of_what_saves(workload, everything, store):
    front = search(workload, Target(agreement=50), store=store).front
    rows = everything.rows[1:]
    for row in rows:
        better = [
            r
            for r in rows
            if r.flops.total <= row.flops.total
            and r.lowest_agreement >= row.lowest_agreement
            and (r.flops.total, r.lowest_agreement) != (row.flops.total, row.lowest_agreement)
        ]
        saves = row.flops.total < everything.plain.flops.total
        assert (row.name in {r.name for r in front}) == (saves and not better)


def test_what_to_keep_of_a_metric(workload, everything, store):
    rows = everything.rows[1:]
    assert {everything.lowest_retained(row) for row in rows} != {None}
    tuning = search(workload, Target(retained=1e-6, metric="mIoU"), confirm=3, store=store)
    assert tuning.best == min(rows, key=lambda row: row.flops.total)
    assert everything.retained(tuning.best, "mIoU") >= 1e-6
    assert len(tuning.confirmed.rows) - 1 >= 3


class Speeds(session_module.Session):
    """A model that is as fast as its GFLOPs say; timing itself is not under test here."""

    def row(self, name, settings):
        self.options = replace(self.options, timed_images=0)
        row, plain = super().row(name, settings), super().row("plain", None)
        mine, baseline = (Timing(r.flops.total, 0.0, 0.0) for r in (row, plain))
        return replace(row, latency=mine, baseline=baseline)


def test_speed_target_takes_the_best_output_that_is_fast_enough(workload, store, monkeypatch):
    monkeypatch.setattr(tuning_module, "Session", Speeds)
    monkeypatch.setattr(run, "Session", Speeds)
    options = replace(QUIET, timed_images=1)
    everything = compare(workload, FEW, options, store)
    ratios = sorted(everything.speedup(row) for row in everything.rows[1:])
    for speedup in (ratios[2] + 1e-6, ratios[len(ratios) // 2], ratios[-1]):
        fast = [row for row in everything.rows[1:] if everything.speedup(row) >= speedup]
        tuning = search(workload, Target(speedup=speedup), options=options, store=store)
        assert tuning.best.lowest_agreement == max(row.lowest_agreement for row in fast)
        assert everything.speedup(tuning.best) >= speedup
    # Both: only what is fast and good.
    best = max(row.lowest_agreement for row in everything.rows[1:])
    both = Target(agreement=best, speedup=ratios[-1])
    assert search(workload, both, options=options, store=store).best is None


@pytest.mark.parametrize("count", [0, 1, 2, 7, 16])
def test_bisection(count):
    for edge in range(-1, count):
        asked = []

        def met(index, edge=edge, asked=asked):
            asked.append(index)
            return index <= edge

        assert tuning_module._last_met(count, met) == edge
        assert len(asked) <= count.bit_length()


def test_interrupted_sweep_goes_on_where_it_stopped(workload, store, tmp_path, monkeypatch):
    target = Target(agreement=60)
    whole = search(workload, target, store=store)
    original = session_module.Session._evaluate
    names = []

    def evaluate(self, name, model):
        names.append(name)
        if len(names) == 5:
            raise KeyboardInterrupt
        return original(self, name, model)

    monkeypatch.setattr(session_module.Session, "_evaluate", evaluate)
    partial = search(workload, target, store=Store(tmp_path))
    assert partial.interrupted and partial.best is None and partial.confirmed is None
    assert len(partial.sweep.rows) == 3  # the plain model, on all images as well, and two more
    assert Comparison.from_json(partial.sweep.to_json()) == partial.sweep
    first, names[:] = names[:4], []
    monkeypatch.setattr(
        session_module.Session,
        "_evaluate",
        lambda self, name, model: names.append(name) or original(self, name, model),
    )
    resumed = search(workload, target, store=Store(tmp_path))
    assert resumed.best == whole.best and resumed.sweep.rows == whole.sweep.rows
    assert len(first) + len(names) == 2 + len(FEW) + len(resumed.confirmed.rows) - 1


def test_candidates_of_each_family(workload, tiny_opts):
    plain = find_transformer(workload.model)
    found = candidates(plain)
    assert {s.method for s in found.values()} >= {"expedit", "merge"}
    assert all(0 <= alpha < 4 for s in found.values() for alpha in s.alphas)
    assert {s.scope for s in found.values()} == {"map"}  # there are no windows
    assert all(parse_setting(name) == (name, settings) for name, settings in found.items())
    windowed = find_transformer(load_workload(VITDET, tiny_opts).model)
    found = candidates(windowed).values()
    assert {s.scope for s in found if s.alphas} == {"map", "window"}
    assert [s for s in found if s.method == "merge"]


def test_candidates_of_stages_lie_in_the_longest():
    from detectron2.layers import ShapeSpec

    from expedit_d2.backbones.swin import D2SwinTransformer
    from expedit_d2.projects import get_cfg

    cfg = get_cfg()
    cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWIN.DEPTHS = 24, [2, 2, 6, 2]
    cfg.MODEL.SWIN.NUM_HEADS = [2, 2, 2, 2]
    swin = D2SwinTransformer(cfg, ShapeSpec(channels=3))
    found = candidates(find_transformer(swin)).values()
    clustering = [s for s in found if s.alphas]
    assert {s.scope for s in clustering if s.method != "merge"} == {"window"}
    assert {alpha for s in clustering for alpha in s.alphas} <= set(range(4, 10))
    assert len({s.alpha for s in clustering}) >= 4


def test_settings_that_do_not_run_are_left_out(workload):
    tried = {"fits": Settings(alpha=1, ratio=0.5), "does not": Settings(alpha=1, grid=(9, 9))}
    tuning = tune(workload, tried, Target(agreement=1), 1, 1, QUIET)
    assert "9" in tuning.skipped["does not"] and list(tuning.skipped) == ["does not"]
    assert tuning.best.name == "fits"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({}, "there is no target"),
        ({"retained": 101}, r"retained must be .* \(0, 100\], got 101"),
        ({"agreement": 0}, "agreement must be"),
        ({"speedup": -1}, "speedup must be positive, got -1"),
        ({"metric": "PQ"}, "'PQ' needs a percentage"),
    ],
)
def test_targets_that_make_no_sense(target, words):
    with pytest.raises(ValueError, match=words):
        Target(**target)


def test_targets_that_the_data_cannot_give(workload):
    with pytest.raises(ValueError, match=r"one of \['mIoU'\], got 'PQ'"):
        search(workload, Target(retained=99, metric="PQ"))
    with pytest.raises(ValueError, match="without labels"):
        search(replace(workload, make_evaluator=None), Target(retained=99))
    with pytest.raises(ValueError, match="needs images to time"):
        search(workload, Target(speedup=2))


def test_target_in_words():
    assert str(Target(retained=99.5, metric="PQ", speedup=1.4)) == (
        "keep 99.5 % of PQ, at least 1.4x faster"
    )
    assert (
        str(Target(retained=99, agreement=98))
        == "keep 99 % of every metric, agreement at least 98 %"
    )


@pytest.mark.parametrize(
    "text",
    [
        "alpha=2 ratio=0.5",
        "method=merge alpha=0-2 keep=0.3",
        "alpha=1 grid=4x4 temperature=0.5 residual=false",
        "budget=0.5",
    ],
)
@pytest.mark.parametrize("base", ["small_segmenter.yaml", "small_segmenter_published_16x16.yaml"])
def test_the_written_config_has_the_settings_and_the_overrides(text, base, tmp_path):
    _, settings = parse_setting(text)
    opts = ["INPUT.MIN_SIZE_TEST", "64", "DATASETS.TEST", "('a', 'b')", "MODEL.EXPEDIT.ALPHA", "3"]
    config = ROOT / "configs" / "embedded" / base
    file, command = write_tuned_config(settings, config, opts, tmp_path / "mine")
    assert file == tmp_path / "mine_tuned.yaml" and str(file) in command
    assert setting_of(file) == settings
    cfg: CfgNode = load_cfg(file)
    assert cfg.MODEL.EXPEDIT.ENABLED and cfg.INPUT.MIN_SIZE_TEST == 64
    assert tuple(cfg.DATASETS.TEST) == ("a", "b")
    assert len(file.read_text().splitlines()) < 20


def test_tool_finds_a_setting_that_train_net_runs(segmenter_opts, tmp_path, capsys, monkeypatch):
    tool, train_net = load_tool("tune"), load_tool("train_net")
    output = tmp_path / "tuned"
    monkeypatch.setattr(tool, "candidates", lambda spec: FEW)
    options = ["--config-file", SEGMENTER, "--sweep", "2", "--confirm", "1", "--timed", "0"]
    options += ["--output", str(output)]
    tool.run([*options, "--agreement", "70", "--", *segmenter_opts])
    printed = capsys.readouterr().out
    assert "For agreement at least 70 %: " in printed and "On all images" in printed
    confirmed = Comparison.from_json((output / "small_segmenter.json").read_text())
    sweep = Comparison.from_json((output / "small_segmenter_sweep.json").read_text())
    assert len(sweep.rows) == 1 + len(FEW) and sweep.images == 2 and confirmed.images == 4
    config = output / "small_segmenter_tuned.yaml"
    best = next(row for row in confirmed.rows if row.settings == setting_of(config))
    assert best.lowest_agreement >= 70
    results = {}
    monkeypatch.setattr(
        train_net, "launch", lambda main, *_, args, **__: results.update(main(*args))
    )
    train_net.run(["--eval-only", "--config-file", str(config)])
    assert results["sem_seg"]["mIoU"] == pytest.approx(best.metrics["mIoU"])
    with pytest.raises(SystemExit) as stopped:
        tool.run([*options, "--agreement", "100", "--", *segmenter_opts])
    assert stopped.value.code == 1
    assert "Found no setting for agreement at least 100 %." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="tune.py: there is no target"):
        tool.run(options)
    with pytest.raises(
        SystemExit, match="tune.py: argument --sweep: must be .* 1 or more, got '0'"
    ):
        tool.run([*options, "--agreement", "70", "--sweep", "0"])


def test_tool_on_a_lazy_config_prints_overrides(tiny_data, tmp_path, capsys, monkeypatch):
    from detectron2.config import LazyConfig, instantiate

    tool, train_net = load_tool("tune"), load_tool("train_net")
    config, weights, output = tmp_path / "lazy.py", tmp_path / "lazy.pth", tmp_path / "tuned"
    config.write_text(LAZY.replace("{name}", tiny_data[1]).replace("{output}", str(tmp_path)))
    model = instantiate(LazyConfig.load(str(config)).model)
    torch.save({"model": model.state_dict()}, weights)
    make_confident(weights)
    some = dict(parse_setting(text) for text in ("alpha=1 ratio=0.5", "alpha=1 grid=4x4"))
    monkeypatch.setattr(tool, "candidates", lambda spec: some)
    folder = DatasetCatalog.get(tiny_data[1])[0]["file_name"].rsplit("/", 1)[0]
    opts = [f"train.init_checkpoint={weights}", "train.device=cpu"]
    options = ["--config-file", str(config), "--images", folder, "--output", str(output)]
    tool.run([*options, "--agreement", "1", "--timed", "0", "--", *opts])
    overrides = (output / "lazy_tuned.txt").read_text().split()
    assert setting_of(config, overrides) in some.values()
    assert str(config) in capsys.readouterr().out
    # And these are what train_net.py takes.
    opts = [*overrides, f"train.output_dir={tmp_path / 'run'}"]
    train_net.run(["--eval-only", "--config-file", str(config), *opts])
