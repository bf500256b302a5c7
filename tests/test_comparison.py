"""The comparison table, the demo, and the small checkpoint tool."""

import copy

import pytest
import torch
from conftest import EMBEDDED, load_tool
from PIL import Image
from torch import nn

from expedit_d2.analysis.flops import Flops
from expedit_d2.analysis.timing import Timing
from expedit_d2.comparison import Row, compare, share_weights, to_table
from expedit_d2.engine import Trainer, load_weights
from expedit_d2.settings import Settings


def row(name, ap, after, seconds):
    flops = Flops(embed=1e9, before=2e9, clustering=0.0, after=after, reconstruction=0.0, head=4e9)
    return Row(name, {"box AP": ap}, {"instances": 97.0}, flops, Timing(seconds, seconds, seconds))


def test_table_shows_ratios_to_the_plain_model():
    plain, ours = row("plain", 50.0, 3e9, 0.5), row("a1_8x8", 49.0, 1.5e9, 0.4)
    header, _, first, second = to_table([plain, ours]).splitlines()
    assert (
        "box AP" in header
        and "kept" in header
        and "agree, instances" in header
        and "speed-up" in header
    )
    assert first.split() == "plain 50.0 100.0 % 97.0 6.00 0 % 10.00 0 % 2.00 1.00x".split()
    assert second.split() == "a1_8x8 49.0 98.0 % 97.0 4.50 25 % 8.50 15 % 2.50 1.25x".split()


def test_flops_parts_add_up():
    flops = Flops(1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    assert (flops.total, flops.transformer, flops.blocks) == (63.0, 31.0, 30.0)


def test_shared_copy_has_the_same_tensors_and_its_own_modules():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    twin = share_weights(model)
    assert twin is not model and twin[0] is not model[0]
    for mine, theirs in zip(twin.state_dict().values(), model.state_dict().values(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()


@pytest.fixture
def tiny_model(tiny_opts):
    from projects import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(EMBEDDED)
    cfg.merge_from_list(tiny_opts)
    model = Trainer.build_model(cfg).eval()
    load_weights(model, cfg.MODEL.WEIGHTS)
    return cfg, model


def test_comparison_of_a_real_detector(tiny_model):
    cfg, model = tiny_model
    name = cfg.DATASETS.TEST[0]
    before = copy.deepcopy(model.state_dict())
    settings = {
        # As many clusters as tokens and no softness: nothing may change.
        "same": Settings(alpha=1, grid=(8, 8), temperature=1e6),
        "half": Settings(alpha=1, ratio=0.5),
    }
    rows = compare(
        model,
        settings,
        Trainer.build_test_loader(cfg, name),
        lambda: Trainer.build_evaluator(cfg, name),
        timed_images=2,
        progress=False,
    )
    plain, same, half = rows
    assert [r.name for r in rows] == ["plain", "same", "half"]
    assert set(plain.metrics) == {"box AP", "mask AP"}
    assert plain.agreement == same.agreement == {"instances": 100.0}
    assert same.metrics == pytest.approx(plain.metrics)
    assert half.flops.total < plain.flops.total and half.flops.clustering > 0
    assert all(r.seconds.median > 0 for r in rows)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_slim_checkpoint_keeps_the_weights_and_overwrites_nothing(tmp_path):
    slim = load_tool("slim_checkpoint")
    model = nn.Linear(64, 64)
    source, target = str(tmp_path / "model_final.pth"), str(tmp_path / "slim.pth")
    torch.save({"model": model.state_dict(), "optimizer": {"lr": 1}, "iteration": 9}, source)
    slim.run([source, target])
    kept = torch.load(target)
    assert set(kept) == {"model"} and kept["model"]["weight"].dtype == torch.float16
    torch.testing.assert_close(kept["model"]["weight"].float(), model.weight, atol=1e-3, rtol=1e-3)
    with pytest.raises(SystemExit, match="is there already"):
        slim.run([source, target])
    with pytest.raises(SystemExit, match="there is no checkpoint"):
        slim.run([str(tmp_path / "none.pth"), str(tmp_path / "other.pth")])


def test_demo_writes_its_table_and_picture(tiny_opts, tmp_path, capsys):
    demo = load_tool("demo")
    setting = tmp_path / "vitdet_a1_2x2.yaml"
    setting.write_text(
        f"_BASE_: {EMBEDDED}\nMODEL:\n  EXPEDIT:\n    ENABLED: True\n    ALPHA: 1\n"
        "    GRID: [2, 2]\n    SCOPE: window\n"
    )
    output = tmp_path / "demo"
    options = ["--timed", "2", "--pictures", "1", "--output", str(output)]
    options += ["--config-file", EMBEDDED, "--expedit"]
    demo.run([*options, str(setting), "--", *tiny_opts])
    table = (output / "tables.md").read_text()
    assert table.startswith("vitdet\n") and "| plain" in " ".join(table.split())
    assert "a1_2x2" in table and "a1_2x2" in capsys.readouterr().out
    with Image.open(output / "vitdet.png") as picture:
        assert min(picture.size) > 100
    with pytest.raises(SystemExit, match="demo.py: there is no config file 'none.yaml'"):
        demo.run([*options, "none.yaml", "--", *tiny_opts])
    with pytest.raises(SystemExit, match="--models must be among .*'vitdet'.* got 'none'"):
        demo.run(["--models", "none"])


def test_embedded_cases_are_the_plain_configs_with_their_settings():
    demo = load_tool("demo")
    cases = {case.plain.stem: case.expedit for case in demo.embedded_cases(None)}
    assert "vitdet_a6_3x3" in {path.stem for path in cases["vitdet"]}
    assert all(path.stem.startswith(f"{name}_") for name in cases for path in cases[name])
