"""tools/compare.py and tools/demo.py, run as a user would; and the small checkpoint tool."""

import csv

import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image
from torch import nn

from expedit_d2.comparison import Comparison
from expedit_d2.comparison import run as run_module
from expedit_d2.comparison import session as session_module
from expedit_d2.settings import Settings
from support.detector import LAZY
from support.repository import VITDET, load_tool

pytestmark = pytest.mark.slow

compare = load_tool("compare")

HALF = (
    f"_BASE_: {VITDET}\nMODEL:\n  EXPEDIT:\n    ENABLED: True\n    ALPHA: 1\n"
    "    GRID: [2, 2]\n    SCOPE: window\n"
)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "compared"


def run(output, *options, opts=()):
    quick = ["--timed", "1", "--batch", "1", "--pictures", "0", "--output", str(output)]
    compare.run([*quick, *options, "--", *opts])


def test_table_of_settings_from_the_command_line_and_from_configs(
    tiny_opts, output, tmp_path, capsys
):
    config = tmp_path / "vitdet_a1_2x2.yaml"
    config.write_text(HALF)
    settings = ["--setting", "alpha=1 ratio=0.5", "--setting", "late: alpha=2 ratio=0.5"]
    run(output, "--config-file", VITDET, *settings, "--expedit", str(config), opts=tiny_opts)
    printed = capsys.readouterr().out
    names = ["plain", "alpha=1 ratio=0.5", "late", "a1_2x2"]
    assert all(name in printed for name in (*names, "mask AP", "speed-up", "vitdet.md"))
    stored = Comparison.from_json((output / "vitdet.json").read_text())
    assert [row.name for row in stored.rows] == names
    assert stored.rows[3].settings == Settings(alpha=1, grid=(2, 2), scope="window")
    with open(output / "vitdet.csv", newline="") as file:
        assert [line["name"] for line in csv.DictReader(file)] == names


def test_settings_beside_the_config_and_its_own(tiny_opts, output, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {VITDET}\n")
    (tmp_path / "mine_small.yaml").write_text(HALF)
    (tmp_path / "mine_other_size.yaml").write_text(f"_BASE_: {VITDET}\n")
    own = ["MODEL.EXPEDIT.ALPHA", "2", "MODEL.EXPEDIT.RATIO", "0.5"]
    config = str(tmp_path / "mine.yaml")
    run(output, "--config-file", config, "--first", "1", opts=tiny_opts)
    rows = Comparison.from_json((output / "mine.json").read_text()).rows
    assert [row.name for row in rows] == ["plain", "small"]
    (tmp_path / "mine_small.yaml").unlink()
    run(output, "--config-file", config, "--first", "1", opts=[*tiny_opts, *own])
    rows = Comparison.from_json((output / "mine.json").read_text()).rows
    assert [row.settings for row in rows] == [None, Settings(alpha=2, ratio=0.5)]


def test_the_default_is_embedded():
    args = compare.parse_arguments([])
    assert {"budget_50", "expedit_16x16"} <= set(compare.all_settings(args))


def test_images_and_a_lazy_config(tiny_data, output, tmp_path, capsys):
    from detectron2.config import LazyConfig, instantiate

    config, weights = tmp_path / "my_vitdet.py", tmp_path / "lazy.pth"
    config.write_text(LAZY.replace("{name}", tiny_data[1]).replace("{output}", str(tmp_path)))
    model = instantiate(LazyConfig.load(str(config)).model)
    torch.save({"model": model.state_dict()}, weights)
    folder = DatasetCatalog.get(tiny_data[1])[0]["file_name"].rsplit("/", 1)[0]
    opts = [f"train.init_checkpoint={weights}", "train.device=cpu"]
    options = ["--config-file", str(config), "--setting", "half: alpha=1 ratio=0.5"]
    run(output, *options, opts=opts)
    rows = Comparison.from_json((output / "my_vitdet.json").read_text()).rows
    assert set(rows[0].metrics) == {"box AP", "mask AP"}
    run(output, *options, "--images", f"{folder}/*.png", opts=opts)
    stored = Comparison.from_json((output / "my_vitdet.json").read_text())
    assert stored.images == 4 and stored.plain.metrics == {}
    assert [row.agreement for row in stored.rows] == [row.agreement for row in rows]
    assert "kept" not in capsys.readouterr().out.split("my_vitdet on")[-1]
    # Again, all of it from the store.
    lines = (output / "results.jsonl").read_text()
    run(output, *options, opts=opts)
    assert (output / "results.jsonl").read_text() == lines
    assert "4 results were measured before" in capsys.readouterr().out


def test_interruption_is_told_and_ends_with_130(tiny_opts, output, monkeypatch, capsys):
    options = ["--config-file", VITDET, "--first", "2", "--setting", "alpha=1 ratio=0.5"]

    class Interrupted(session_module.Session):
        def _evaluate(self, name, model):
            if name != "plain":
                raise KeyboardInterrupt
            return super()._evaluate(name, model)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "Session", Interrupted)
        with pytest.raises(SystemExit) as stopped:
            run(output, *options, opts=tiny_opts)
    assert stopped.value.code == 130
    printed = capsys.readouterr()
    assert "the same command resumes" in printed.err and "Not finished: alpha=1" in printed.out
    stored = Comparison.from_json((output / "vitdet.json").read_text())
    assert [row.name for row in stored.rows] == ["plain"]
    run(output, *options, opts=tiny_opts)
    stored = Comparison.from_json((output / "vitdet.json").read_text())
    assert len(stored.rows) == 2 and not stored.unfinished


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--setting", "alpha"], "a setting is like .* got 'alpha'"),
        (["--setting", "a: alpha=1 ratio=0.5", "--setting", "a: alpha=2 ratio=0.5"], "named 'a'"),
        (["--config-file", "none.yaml"], "there is no config file 'none.yaml'"),
        (
            ["--config-file", "none.py", "--setting", "alpha=1 ratio=0.5"],
            "no config file 'none.py'",
        ),
        (["--setting", "alpha=9 ratio=0.5"], "ALPHA must be in 0 to 2"),
        (["--timed", "-1"], "--timed: must be a whole number, 0 or more, got '-1'"),
        (["--images", "nowhere/*.jpg", "--setting", "alpha=1 ratio=0.5"], "no images at 'nowhere"),
        (["--expedit", VITDET], "neither MODEL.EXPEDIT.ALPHA nor"),
    ],
)
def test_one_sentence_for_what_is_wrong(options, words, tiny_opts, output):
    with pytest.raises(SystemExit, match=f"^compare.py: .*{words}"):
        run(output, "--config-file", VITDET, *options, opts=tiny_opts)


def test_demo_writes_its_table_and_picture(tiny_opts, tmp_path, capsys):
    demo = load_tool("demo")
    setting = tmp_path / "vitdet_a1_2x2.yaml"
    setting.write_text(HALF)
    output = tmp_path / "demo"
    options = ["--timed", "2", "--pictures", "1", "--output", str(output)]
    options += ["--config-file", VITDET, "--expedit"]
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
    for case in [*demo.embedded_cases(["segmenter", "vitdet"]), demo.small_case()]:
        assert case.plain.is_file() and len(case.expedit) >= 4
        settings = demo.settings_of(case, [])
        assert all(setting.reduces for setting in settings.values())
    named = demo.settings_of(demo.embedded_cases(["segmenter"])[0], [])
    assert named["budget 50"].budget == 0.5 and named["tome 50"].method == "tome"


def test_demo_without_the_backbone_shows_the_small_model(tmp_path, capsys, monkeypatch):
    demo = load_tool("demo")

    def offline(path, key):
        raise OSError(f"{key} {path!r} cannot be downloaded: no route to host")

    monkeypatch.setattr(demo, "fetch", offline)
    args = demo.parse_arguments(["--output", str(tmp_path)])
    assert demo.choose(args) == [demo.small_case()]
    (said,) = capsys.readouterr().err.splitlines()
    assert "no route to host" in said and "trained from scratch" in said


def test_slim_checkpoint_keeps_the_weights_and_overwrites_nothing(tmp_path):
    slim = load_tool("slim_checkpoint")
    model = nn.Linear(64, 64)
    source, target = str(tmp_path / "model_final.pth"), str(tmp_path / "slim.pth")
    torch.save({"model": model.state_dict(), "optimizer": {"lr": 1}, "iteration": 9}, source)
    slim.run([source, target])
    kept = torch.load(target)
    assert set(kept) == {"model"} and kept["model"]["weight"].dtype == torch.float16
    torch.testing.assert_close(kept["model"]["weight"].float(), model.weight, atol=1e-3, rtol=1e-3)
    with pytest.raises(SystemExit, match="already exists"):
        slim.run([source, target])
    with pytest.raises(SystemExit, match="there is no file"):
        slim.run([str(tmp_path / "none.pth"), str(tmp_path / "other.pth")])
