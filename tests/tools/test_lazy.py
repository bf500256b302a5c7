"""The tools on a LazyConfig in the layout of ViTDet's official ones, as on YAML."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from PIL import Image

from expedit_d2.cli.workloads import load_any_model
from expedit_d2.comparison import Comparison
from expedit_d2.engine import load_lazy_config
from support.detector import LAZY
from support.repository import load_tool

pytestmark = pytest.mark.slow

EXPEDIT = ["expedit.alpha=1", "expedit.ratio=0.5"]


@pytest.fixture
def config(tiny_data, tmp_path):
    """The arguments of a tiny ViTDet: the config and where its weights are."""
    file, weights = tmp_path / "vitdet.py", tmp_path / "lazy.pth"
    text = LAZY.replace("{name}", tiny_data[1]).replace("{output}", str(tmp_path / "inference"))
    # As the official files have them.
    file.write_text(text.replace("square_pad=0", "square_pad=64"))
    torch.manual_seed(0)
    model = instantiate(LazyConfig.load(str(file)).model)
    torch.save({"model": model.state_dict()}, weights)
    opts = [f"train.init_checkpoint={weights}", f"train.output_dir={tmp_path}", "train.device=cpu"]
    return ["--config-file", str(file), *opts]


def test_draw(config, tiny_data, tmp_path, capsys, caplog):
    draw = load_tool("draw")
    output = tmp_path / "pictures"
    draw.run(["--output", str(output), "--count", "2", *config, *EXPEDIT])
    names = [record["file_name"] for record in DatasetCatalog.get(tiny_data[1])]
    expected = [f"{i:03d}_{name.rsplit('/', 1)[1]}" for i, name in enumerate(names[:2])]
    assert sorted(path.name for path in output.iterdir()) == expected
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.effect_noise((90, 70), 80).convert("RGB").save(photos / "good.jpg")
    (photos / "bad.jpg").write_bytes(b"no image")
    draw.run(["--output", str(output), *config, *EXPEDIT, "--images", str(photos)])
    out = capsys.readouterr().out
    assert (output / "000_good.png").is_file() and f"1 pictures in {output}, 1 skipped" in out
    assert "skipped: " in caplog.text and "bad.jpg" in caplog.text
    (photos / "good.jpg").unlink()
    with pytest.raises(SystemExit, match="no image at .* can be read: .*bad.jpg"):
        draw.run(["--output", str(output), *config, *EXPEDIT, "--images", str(photos)])


def test_export(config, tmp_path, capsys):
    export = load_tool("export")
    path = tmp_path / "backbone.pt2"
    fixed = ["--size", "64x64", "--fixed", "--output", str(path)]
    export.run([*fixed, *config, *EXPEDIT, "expedit.enabled=True"])
    program = torch.export.load(path).module()
    x = torch.randn(1, 3, 64, 64)
    for expedited in (True, False):
        model = load_any_model(config[1], [*config[2:], *EXPEDIT], "cpu", expedited)
        with torch.no_grad():
            same = all(
                torch.allclose(ours, theirs, atol=1e-4)
                for ours, theirs in zip(
                    program(x).values(), model.backbone(x).values(), strict=True
                )
            )
        assert same == expedited


def test_comparison_by_train_net(config, capsys):
    load_tool("train_net").run(["--compare", *config, *EXPEDIT])
    printed = capsys.readouterr().out
    for word in ("box AP", "mask AP", "agree", "GFLOPs", "plain", "expedit"):
        assert word in printed
    # Whatever the order of options and overrides.
    load_tool("train_net").run([*config, "--eval-only"])
    assert "bbox" in capsys.readouterr().out


def test_comparison_and_demo_with_its_own_setting(config, tmp_path):
    quick = ["--timed", "1", "--pictures", "1", "--output", str(tmp_path / "out")]
    load_tool("compare").run([*quick, "--batch", "1", *config, *EXPEDIT])
    (row,) = Comparison.from_json((tmp_path / "out" / "vitdet.json").read_text()).rows[1:]
    assert (row.name, row.settings.alpha, row.settings.ratio) == ("expedit", 1, 0.5)
    half = tmp_path / "vitdet_half.py"
    half.write_text((tmp_path / "vitdet.py").read_text() + "expedit = dict(alpha=1, ratio=0.5)\n")
    load_tool("demo").run([*quick, *config, "--expedit", str(half)])
    assert "half" in (tmp_path / "out" / "tables.md").read_text()
    assert (tmp_path / "out" / "vitdet.png").is_file()


def test_keys_that_the_config_may_take(config):
    def load(*overrides):
        return load_lazy_config(config[1], overrides)

    # An argument that the config leaves at its default, and one that is added on purpose.
    assert load("model.backbone.net.use_act_checkpoint=True").model.backbone.net.use_act_checkpoint
    assert load("+train.my_key=3").train.my_key == 3
    assert load("expedit.alpha=[0,2]").expedit.alpha == [0, 2]
    for key, like in (
        ("model.backbone.net.use_act_checkpoints=True", "use_act_checkpoint"),
        ("train.my_key=3", None),
        ("dataloader.test.dataset.name=x", "names"),
    ):
        with pytest.raises(ValueError, match=f"did you mean {like}" if like else "no key 'my_key'"):
            load(key)


def test_train_says_only_what_differs(config, tmp_path):
    """The rest is Detectron2's own."""
    text = (tmp_path / "vitdet.py").read_text()
    end = text.index("train = model_zoo")
    (tmp_path / "short.py").write_text(text[:end] + "train = dict(device='cpu', max_iter=5)\n")
    train = load_lazy_config(str(tmp_path / "short.py"), ["train.init_checkpoint=x"]).train
    assert (train.max_iter, train.device, train.init_checkpoint) == (5, "cpu", "x")
    assert train.output_dir == "./output" and train.amp.enabled is False


def test_a_broken_config_leaves_imports_as_they_were(tmp_path):
    (tmp_path / "fails.py").write_text("model = 1 / 0\n")
    importer = __builtins__["__import__"]
    with pytest.raises(ValueError, match="fails.py, line 1: ZeroDivisionError"):
        load_lazy_config(str(tmp_path / "fails.py"), [])
    assert __builtins__["__import__"] is importer
