"""tools/train_net.py: it trains, resumes, evaluates, and says clearly what is wrong."""

import subprocess
import sys

import pytest
import torch
from detectron2.data import DatasetCatalog

from support.detector import LAZY, evaluate, fails, predictions, train_net
from support.repository import ROOT, VITDET

pytestmark = pytest.mark.slow

EXPEDIT = ["MODEL.EXPEDIT.ENABLED", "True", "MODEL.EXPEDIT.ALPHA", "1"]


def test_evaluation_writes_predictions_and_expedit_changes_them(tiny_opts, tmp_path):
    evaluate(tiny_opts)
    plain = predictions(tmp_path)
    assert len(plain) > 0
    evaluate([*tiny_opts, *EXPEDIT, "MODEL.EXPEDIT.RATIO", "0.5"])
    assert predictions(tmp_path) != plain
    # A grid as large as the map, and no softness: the plain model again.
    exact = ["MODEL.EXPEDIT.GRID", "(8, 8)", "MODEL.EXPEDIT.TEMPERATURE", "1e6"]
    evaluate([*tiny_opts, *EXPEDIT, *exact])
    again = predictions(tmp_path)
    assert [p["category_id"] for p in again] == [p["category_id"] for p in plain]
    for mine, theirs in zip(again, plain, strict=True):
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-4)
        assert mine["bbox"] == pytest.approx(theirs["bbox"], abs=1e-2)


def test_comparison_prints_one_table(tiny_opts, capsys):
    evaluate([*tiny_opts, "MODEL.EXPEDIT.ALPHA", "1", "MODEL.EXPEDIT.RATIO", "0.5"], "--compare")
    printed = capsys.readouterr().out
    for word in ("box AP", "mask AP", "agree", "GFLOPs", "FPS", "plain", "expedit"):
        assert word in printed


def test_training_resumes_where_it_stopped(tiny_opts, tmp_path):
    opts = [*tiny_opts, "SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "2"]
    train = ["--config-file", VITDET, "--resume", *opts, "TEST.EVAL_PERIOD", "0"]
    train_net.run([*train, "SOLVER.MAX_ITER", "2"])
    first = torch.load(tmp_path / "output" / "model_0000001.pth", weights_only=False)
    assert first["iteration"] == 1
    train_net.run([*train, "SOLVER.MAX_ITER", "4"])
    last = torch.load(tmp_path / "output" / "model_final.pth", weights_only=False)
    assert last["iteration"] == 3
    changed = [k for k, v in last["model"].items() if not torch.equal(v, first["model"][k])]
    assert any("blocks" in key for key in changed)


def test_data_set_by_path(tiny_opts, tiny_data, tmp_path):
    json_file = DatasetCatalog.get(tiny_data[1]) and next(tmp_path.rglob("instances_val.json"))
    images = next(path.parent for path in tmp_path.rglob("*.png") if path.parent.name == "val")
    name = f"{json_file}@{images}"
    try:
        evaluate([*tiny_opts, "DATASETS.TEST", f"('{name}',)"])
        assert predictions(tmp_path)
    finally:
        DatasetCatalog.remove(name)


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["MODEL.EXPEDIT.ALPHA", "3", "MODEL.EXPEDIT.RATIO", "0.5"], ["ALPHA", "0 to 2", "got 3"]),
        (["MODEL.EXPEDIT.ALPHA", "1", "MODEL.EXPEDIT.RATIO", "0.0"], ["RATIO", "(0, 1]", "0.0"]),
        (
            ["MODEL.EXPEDIT.ALPHA", "1", "MODEL.EXPEDIT.GRID", "(9, 9)"],
            ["GRID", "8 x 8", "(9, 9)", "RATIO"],
        ),
        (["MODEL.EXPEDIT.ALPHA", "1"], ["GRID", "RATIO"]),
        (
            ["MODEL.EXPEDIT.ALPHA", "1", "MODEL.EXPEDIT.RATIO", "0.5", "MODEL.EXPEDIT.METHOD", "x"],
            ["METHOD", "expedit", "'x'"],
        ),
    ],
)
def test_settings_out_of_range(tiny_opts, opts, words):
    message = fails([*tiny_opts, "MODEL.EXPEDIT.ENABLED", "True", *opts])
    assert all(word in message for word in words), message


def test_unsupported_model(tiny_opts):
    opts = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES"]
    opts += ["('res4',)", "MODEL.RPN.IN_FEATURES", "('res4',)", "MODEL.ROI_HEADS.IN_FEATURES"]
    opts += ["('res4',)", "MODEL.ANCHOR_GENERATOR.SIZES", "((32,),)", "MODEL.EXPEDIT.RATIO", "0.5"]
    message = fails([*tiny_opts, *EXPEDIT, *opts])
    assert "no supported transformer" in message and "ViTDet" in message


def test_missing_and_unknown_data_sets(tiny_opts, monkeypatch):
    message = fails([*tiny_opts, "DATASETS.TEST", "('coco_2017_val',)"])
    assert all(w in message for w in ("DATASETS.TEST", "coco_2017_val", "DETECTRON2_DATASETS"))
    message = fails([*tiny_opts, "DATASETS.TEST", "('no_such_set',)"])
    assert all(w in message for w in ("DATASETS.TEST", "no_such_set", "coco_2017_val"))
    message = fails([*tiny_opts, "DATASETS.TEST", "('nowhere/instances.json',)"])
    assert all(w in message for w in ("DATASETS.TEST", "nowhere/instances.json"))


def test_weights_that_are_missing_or_do_not_fit(tiny_opts, tmp_path):
    message = fails([*tiny_opts, "MODEL.WEIGHTS", "no/such/file.pth"])
    assert "MODEL.WEIGHTS" in message and "no/such/file.pth" in message
    message = fails([*tiny_opts, "MODEL.WEIGHTS", ""])
    assert "MODEL.WEIGHTS" in message
    message = fails([*tiny_opts, "MODEL.ROI_HEADS.NUM_CLASSES", "5"])
    assert "MODEL.WEIGHTS" in message and "(7, 16)" in message and "(6, 16)" in message
    weights = torch.load(tmp_path / "weights.pth")
    del weights["model"]["backbone.net.pos_embed"]
    torch.save(weights, tmp_path / "partial.pth")
    message = fails([*tiny_opts, "MODEL.WEIGHTS", str(tmp_path / "partial.pth")])
    assert "backbone.net.pos_embed is not in the file" in message


def test_command_line_ends_with_one_sentence_and_no_traceback():
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file", "no.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "train_net.py: there is no config file 'no.yaml'"
    )
    assert "Traceback" not in done.stderr


def test_lazy_config(tiny_data, tmp_path):
    from detectron2.config import LazyConfig, instantiate

    name, output = tiny_data[1], tmp_path / "output" / "inference"
    config = tmp_path / "vitdet.py"
    config.write_text(LAZY.replace("{name}", name).replace("{output}", str(output)))
    torch.manual_seed(0)
    weights = tmp_path / "lazy.pth"
    model = instantiate(LazyConfig.load(str(config)).model)
    torch.save({"model": model.state_dict()}, weights)
    opts = [f"train.init_checkpoint={weights}", "train.device=cpu", f"train.output_dir={output}"]

    evaluate(opts, config=str(config))
    plain = predictions(tmp_path)
    assert plain
    expedit = ["expedit.enabled=True", "expedit.alpha=1", "expedit.ratio=0.5"]
    evaluate([*opts, *expedit], config=str(config))
    assert predictions(tmp_path) != plain
    message = fails([*opts, *expedit, "expedit.ratio=0"], config=str(config))
    assert "RATIO" in message
    message = fails([*opts, "expedit.enabled=True", "expedit.colour=1"], config=str(config))
    assert "colour" in message
    message = fails([*opts, "train.init_checkpoint=nowhere.pth"], config=str(config))
    assert "train.init_checkpoint" in message and "nowhere.pth" in message
