"""The comparison table, the pictures, and the small checkpoint tool."""

import copy

import numpy as np
import pytest
import torch
from conftest import EMBEDDED, load_tool
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from expedit_d2.analysis.flops import Flops
from expedit_d2.analysis.timing import Timing
from expedit_d2.comparison import Row, compare, share_weights, to_table
from expedit_d2.engine import Trainer, load_weights
from expedit_d2.operators import cluster_tokens
from expedit_d2.settings import Settings
from expedit_d2.visualize import cluster_labels, draw_clusters, draw_instances, save_panels


def row(name, ap, after, seconds):
    flops = Flops(embed=1e9, before=2e9, clustering=0.0, after=after, reconstruction=0.0, head=4e9)
    return Row(name, {"box AP": ap}, {"instances": 97.0}, flops, Timing(seconds, seconds, seconds))


def test_table_shows_ratios_to_the_plain_model():
    plain, ours = row("plain", 50.0, 3e9, 0.5), row("a1_8x8", 49.0, 1.5e9, 0.4)
    header, _, first, second = to_table([plain, ours]).splitlines()
    assert "box AP" in header and "kept" in header and "agree, instances" in header and "speed-up" in header
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


def test_labels_are_the_nearest_cluster_by_explicit_search():
    torch.manual_seed(0)
    tokens = torch.randn(1, 6, 9, 4)
    settings = Settings(alpha=1, grid=(3, 4), iterations=2, temperature=0.5, window=3)
    labels = cluster_labels(tokens, settings)
    clusters = cluster_tokens(tokens, (3, 4), 2, 0.5, 3).features[0]
    for i in range(6):
        for j in range(9):
            home = (i * 3 // 6, j * 4 // 9)
            near = {
                r * 4 + c: float((tokens[0, i, j] - clusters[r, c]).square().sum())
                for r in range(3)
                for c in range(4)
                if abs(r - home[0]) <= 1 and abs(c - home[1]) <= 1
            }
            assert labels[0, i, j] == min(near, key=near.get)


def test_labels_by_window_are_those_of_each_window():
    torch.manual_seed(0)
    tokens = torch.randn(1, 8, 12, 4)
    settings = Settings(alpha=1, grid=(2, 2), scope="window", iterations=2)
    labels = cluster_labels(tokens, settings, attention_window=4)
    alone = Settings(alpha=1, grid=(2, 2), iterations=2)
    for index, (row, col) in enumerate((r, c) for r in (0, 4) for c in (0, 4, 8)):
        window = cluster_labels(tokens[:, row : row + 4, col : col + 4], alone)
        assert torch.equal(labels[:, row : row + 4, col : col + 4], window + 4 * index)


def test_boundaries_lie_where_labels_change():
    image = np.zeros((4, 8, 3), np.uint8)
    drawn = draw_clusters(image, np.array([[0, 1]]))
    assert drawn[:, 4].any(-1).all() and not drawn[:, [0, 1, 2, 3, 5, 6, 7]].any()
    assert not image.any()


def test_panels_are_written(tmp_path):
    instances = Instances((32, 32))
    instances.pred_boxes = Boxes(torch.tensor([[4.0, 4, 20, 20], [0, 0, 8, 8]]))
    instances.scores = torch.tensor([0.9, 0.1])
    instances.pred_classes = torch.tensor([0, 1])
    from detectron2.data.catalog import Metadata

    image = np.full((32, 32, 3), 90, np.uint8)
    drawn = draw_instances(image, instances, Metadata(thing_classes=["disk", "ring"]))
    assert drawn.shape == (512, 512, 3) and (drawn != 90).any()
    path = tmp_path / "new" / "panels.png"
    save_panels([{"image": image, "plain": drawn}, {"image": image}], path)
    assert min(Image.open(path).size) > 100


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
    demo.run([*options, "--expedit", str(setting), "--", *tiny_opts])
    table = (output / "table.md").read_text()
    assert "| plain" in table.replace(" ", "").replace("|", "| ") and "a1_2x2" in table
    assert "a1_2x2" in capsys.readouterr().out
    with Image.open(output / "clusters_and_predictions.png") as picture:
        assert min(picture.size) > 100
    with pytest.raises(SystemExit, match="demo.py: there is no config file 'none.yaml'"):
        demo.run([*options, "--expedit", "none.yaml", "--", *tiny_opts])
