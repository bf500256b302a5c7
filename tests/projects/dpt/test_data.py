"""Data with depth for DPT: lists, mapper, a whole training and evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from expedit_d2.api import is_expedited
from expedit_d2.engine import load_weights
from expedit_d2.projects import load_cfg, trainer_of
from expedit_d2.projects.DPT import DepthMapper, DPTTrainer
from expedit_d2.projects.DPT.data import load_depth_list, read_depth
from expedit_d2.projects.DPT.data.datasets import depth_scale_of
from expedit_d2.projects.DPT.data.mapper import bottom_crop
from support.dpt import tiny_cfg
from support.repository import DPT, load_tool


def scene(folder: Path, name: str, size=(40, 60), scale: float = 1000.0) -> tuple[str, str]:
    """An image whose red value is ten times its depth in metres; names of the two files."""
    red = np.random.default_rng(len(name)).integers(10, 250, size).astype(np.uint8)
    image, depth = f"{name}.png", f"{name}_depth.png"
    Image.fromarray(np.stack([red, red * 0, red * 0], -1)).save(folder / image)
    Image.fromarray(np.rint(red / 10 * scale).astype(np.uint16)).save(folder / depth)
    return image, depth


# --- lists -------------------------------------------------------------------------------------


def test_lists_are_read(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "depths").mkdir()
    for folder in ("images", "depths"):
        scene(tmp_path / folder, "a")
    scene(tmp_path / "images", "b")
    text = "/a.png /a_depth.png 721.5\na.png None 721.5\n\nb.png a_depth.png\n"
    (tmp_path / "list.txt").write_text(text)
    records = load_depth_list(tmp_path / "list.txt", tmp_path / "images", tmp_path / "depths")
    assert [r["image_id"] for r in records] == ["a.png", "b.png"]
    assert records[0]["file_name"] == str(tmp_path / "images" / "a.png")
    assert records[0]["depth_file_name"] == str(tmp_path / "depths" / "a_depth.png")


def test_lists_that_cannot_be_read(tmp_path):
    file = tmp_path / "list.txt"
    with pytest.raises(FileNotFoundError, match="there is no list .*list.txt"):
        load_depth_list(file, tmp_path, tmp_path)
    file.write_text("a.png\nb.png None\n")
    with pytest.raises(ValueError, match="no line of .*list.txt is of the form"):
        load_depth_list(file, tmp_path, tmp_path)
    file.write_text("a.png a_depth.png\n")
    with pytest.raises(FileNotFoundError, match=r"list.txt names .*a.png, which does not exist"):
        load_depth_list(file, tmp_path, tmp_path)
    scene(tmp_path, "a")
    file.write_text("a.png a_depth.png\na.png b_depth.png\na.png c_depth.png\n")
    with pytest.raises(FileNotFoundError, match=r"b_depth.png.*: 2 of its 3 depths are missing"):
        load_depth_list(file, tmp_path, tmp_path)


def test_kitti_and_nyu_are_registered():
    for name, scale in (("kitti_eigen", 256.0), ("nyu_depth_v2", 1000.0)):
        for split in ("train", "test"):
            assert f"{name}_{split}" in DatasetCatalog.list()
            assert MetadataCatalog.get(f"{name}_{split}").depth_scale == scale
    with pytest.raises(FileNotFoundError, match="kitti_depth/eigen_test_files_with_gt.txt"):
        DatasetCatalog.get("kitti_eigen_test")


def test_scales_must_agree():
    with pytest.raises(ValueError, match="differ: .*'kitti_eigen_train': 256.0"):
        depth_scale_of(["kitti_eigen_train", "nyu_depth_v2_train"])
    with pytest.raises(ValueError, match="'coco_2017_val' has no depth"):
        depth_scale_of(["coco_2017_val"])


def test_depth_with_colours_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match=r"rgb.png has colours \(mode RGB\)"):
        read_depth(str(tmp_path / "rgb.png"), 1000.0)


# --- mapper ------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path, catalogs):
    """Name of a data set by path, with values of 256 to the metre, and its config."""
    pairs = [scene(tmp_path, name, scale=256.0) for name in ("a", "bb")]
    file = tmp_path / "list.txt"
    file.write_text("".join(f"{image} {depth} 500.0\n" for image, depth in pairs))
    cfg = tiny_cfg(OUTPUT="metric", ACTIVATION="sigmoid", INVERT=True, SHIFT=0.04)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (str(file),)
    cfg.INPUT.DEPTH.SCALE = 256.0
    cfg.INPUT.MIN_SIZE_TRAIN = (40,)
    cfg.INPUT.CROP.SIZE = [24, 32]
    cfg.TEST.DEPTH.ALIGN = "none"
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def test_depth_follows_the_image(listed):
    listed.SOLVER.IMS_PER_BATCH = 2
    loader = iter(DPTTrainer.build_train_loader(listed))
    flips = set()
    for _ in range(4):
        for sample in next(loader):
            image, depth = sample["image"], sample["depth"]
            assert image.dtype == torch.uint8 and depth.dtype == torch.float32
            assert image.shape[1:] == depth.shape == (24, 32)
            # Within the rounding of the PNG, 1 / 256 m.
            assert (image[0] / 10 - depth).abs().max() < 0.01
            flips.add(depth[0, 0].item())
    assert len(flips) > 4  # crops and flips differ


def test_depth_is_resized_to_the_nearest_pixel(tmp_path):
    """Values of two pixels are never mixed: there is nothing between two surfaces."""
    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.CROP.ENABLED = (90,), False
    cfg.DATASETS.TRAIN = ("nyu_depth_v2_train",)
    image, depth = scene(tmp_path, "a")
    record = {"file_name": str(tmp_path / image), "depth_file_name": str(tmp_path / depth)}
    sample = DepthMapper(cfg, is_train=True)(record)
    assert sample["depth"].shape == sample["image"].shape[1:] == (90, 135)
    known = read_depth(record["depth_file_name"], 1000.0)
    assert set(sample["depth"].flatten().tolist()) <= set(known.flatten().tolist())


def test_evaluation_leaves_images_as_they_are_but_for_the_crop(tmp_path):
    cfg = tiny_cfg()
    image, depth = scene(tmp_path, "a")
    record = {
        "file_name": str(tmp_path / image),
        "depth_file_name": str(tmp_path / depth),
        "image_id": "a",
        "annotations": [],
    }
    sample = DepthMapper(cfg, is_train=False)(record)
    whole = torch.from_numpy(np.array(Image.open(tmp_path / image))).permute(2, 0, 1)
    assert torch.equal(sample["image"], whole)
    assert (sample["height"], sample["width"], sample["crop"]) == (40, 60, (0, 0))
    assert "depth" not in sample and "annotations" not in sample and sample["image_id"] == "a"
    cfg.INPUT.DEPTH.CROP = (30, 41)
    sample = DepthMapper(cfg, is_train=False)(record)
    assert sample["crop"] == (10, 9) and (sample["height"], sample["width"]) == (30, 41)
    assert torch.equal(sample["image"], whole[:, 10:, 9:50])


def test_crop_of_kittis_benchmark():
    assert bottom_crop((375, 1242), (352, 1216)) == (23, 13)
    assert bottom_crop((376, 1241), (352, 1216)) == (24, 12)
    with pytest.raises(ValueError, match=r"INPUT.DEPTH.CROP must fit .*\(300, 1242\), got \(352"):
        bottom_crop((300, 1242), (352, 1216))


def test_records_that_do_not_fit(tmp_path):
    cfg = tiny_cfg()
    cfg.DATASETS.TRAIN = ("nyu_depth_v2_train",)
    mapper = DepthMapper(cfg, is_train=True)
    with pytest.raises(ValueError, match="depth needs records with 'depth_file_name'"):
        mapper({"file_name": "a.png"})
    image, _ = scene(tmp_path, "a")
    _, depth = scene(tmp_path, "b", size=(40, 61))
    with pytest.raises(ValueError, match=r"b_depth.png has \(40, 61\) pixels, .*\(40, 60\)"):
        mapper({"file_name": str(tmp_path / image), "depth_file_name": str(tmp_path / depth)})
    cfg.INPUT.RANDOM_FLIP = "vertical"
    with pytest.raises(ValueError, match="INPUT.RANDOM_FLIP must be .* got 'vertical'"):
        DepthMapper(cfg, is_train=True)
    cfg.INPUT.RANDOM_FLIP, cfg.DATASETS.TRAIN = "none", ("coco_2017_train",)
    with pytest.raises(ValueError, match="'coco_2017_train' has no depth"):
        DepthMapper(cfg, is_train=True)


# --- whole -------------------------------------------------------------------------------------


def test_lists_by_path_are_evaluated(listed):
    trainer, name = trainer_of(listed), listed.DATASETS.TEST[0]
    assert trainer is DPTTrainer

    class Truth(torch.nn.Module):
        def forward(self, inputs):
            return [{"depth": item["image"][0] / 10} for item in inputs]

    results = trainer.test(listed, Truth())["depth"]
    assert results["RMSE"] < 0.01 and results["d1"] == 100
    assert MetadataCatalog.get(name).depth_scale == 256.0


def test_training_and_evaluation_on_the_embedded_data(tiny_data, tmp_path):
    """The tool trains; the weights are evaluated, plain and expedited."""
    train, val = tiny_data
    opts = [
        *("DATASETS.TRAIN", f"('{train}',)"),
        *("DATASETS.TEST", f"('{val}',)"),
        *("OUTPUT_DIR", str(tmp_path / "output")),
    ]
    tool = load_tool("train_net")
    tool.run(["--config-file", DPT, *opts])
    weights = tmp_path / "output" / "model_final.pth"
    expedit = ["MODEL.EXPEDIT.ENABLED", "True", "MODEL.EXPEDIT.ALPHA", "1"]
    opts += ["MODEL.WEIGHTS", str(weights), "MODEL.EXPEDIT.RATIO", "0.5"]
    results = {}
    for name, more in (("plain", []), ("expedit", expedit)):
        cfg = load_cfg(DPT, [*opts, *more])
        trainer = trainer_of(cfg)
        model = trainer.build_model(cfg)
        assert is_expedited(model) == bool(more)
        load_weights(model, cfg.MODEL.WEIGHTS)
        results[name] = trainer.test(cfg, model)["depth"]
    assert results["plain"] != results["expedit"]
    results = results["expedit"]
    assert set(results) == {
        *("RMSE", "RMSE_log", "AbsRel", "SqRel", "log10", "SILog"),
        *("d1", "d2", "d3"),
    }
    assert all(np.isfinite(value) for value in results.values())


def test_optimizer_trains_the_encoder_slower():
    cfg = tiny_cfg()
    model = DPTTrainer.build_model(cfg)
    groups = DPTTrainer.build_optimizer(cfg, model).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        factor = 0.1 if name.startswith("backbone.") else 1.0
        assert rates[id(parameter)] == pytest.approx(cfg.SOLVER.BASE_LR * factor)
