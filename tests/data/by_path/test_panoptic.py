"""COCO panoptic files by path: the truth gets full marks, from a path in any form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from expedit_d2.data import register_by_path
from expedit_d2.data.panoptic import class_metadata, semantic_path
from expedit_d2.projects.Mask2Former import MaskFormerTrainer
from support.repository import load_tool
from support.scenes import (
    IDS,
    SCENES,
    config,
    evaluate,
    evaluate_random,
    perfect,
    semantic,
    write_panoptic,
    write_panoptic_png,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("catalogs")]


def test_panoptic_by_path_in_the_layout_of_coco(tmp_path):
    labels = tmp_path / "annotations"
    file = write_panoptic(
        labels / "panoptic_val2017.json", tmp_path / "val2017", labels / "panoptic_val2017"
    )
    name = str(file)
    register_by_path([name])
    register_by_path([name])
    before = sorted(tmp_path.rglob("*"))
    assert evaluate(name, SCENES, 4, tmp_path / "run") == perfect("PQ", "AP", "mIoU")
    written = {p.relative_to(tmp_path).parts[0] for p in set(tmp_path.rglob("*")) - set(before)}
    assert written == {"cache", "run"}
    random = evaluate_random(name, 4, tmp_path / "random")
    assert set(random) == {"PQ", "AP", "mIoU"} and max(random.values()) < 50


@pytest.mark.parametrize(
    "form,images,pngs",
    [
        ("{root}/p.json", "", "p"),
        ("{root}/p.json", "images", ""),
        ("{root}/p.json@far/away", "far/away", "p"),
        ("{root}/p.json@{root}/far@maps", "far", "maps"),
        ("{root}/p.json@@{root}/maps", "images", "maps"),
    ],
)
def test_forms_of_panoptic_paths(tmp_path, form, images, pngs):
    write_panoptic(tmp_path / "p.json", tmp_path / images, tmp_path / pngs)
    name = form.format(root=tmp_path)
    register_by_path([name])
    meta = MetadataCatalog.get(name)
    assert meta.thing_classes == ["cat", "dog"]
    assert meta.stuff_classes == ["cat", "sky", "dog", "road"]
    assert meta.evaluator_type == "coco_panoptic_seg"
    for record, scene in zip(DatasetCatalog.get(name), SCENES.values(), strict=True):
        assert Path(record["file_name"]).parent == tmp_path / images
        assert Path(record["pan_seg_file_name"]).parent == tmp_path / pngs
        assert [s["category_id"] for s in record["segments_info"]] == [s.category for s in scene]
        assert [s["isthing"] for s in record["segments_info"]] == [s.thing for s in scene]
        drawn = detection_utils.read_image(record["sem_seg_file_name"])
        assert drawn.dtype == np.uint8 and np.array_equal(drawn, semantic(scene))


def test_instances_of_a_panoptic_file_are_written_once_and_again_after_a_change(tmp_path):
    file = write_panoptic(tmp_path / "p.json", tmp_path, tmp_path / "p")
    register_by_path([str(file)])
    json_file = MetadataCatalog.get(str(file)).json_file
    first = Path(PathManager.get_local_path(json_file))
    assert first.parent == tmp_path / "cache" / "by_path"
    stamp = first.stat().st_mtime_ns
    assert PathManager.get_local_path(json_file) == str(first)
    assert first.stat().st_mtime_ns == stamp
    with PathManager.open(json_file) as opened:
        assert opened.read() == first.read_text()
    coco = COCO(str(first))
    things = [s for scene in SCENES.values() for s in scene if s.thing]
    for annotation, segment in zip(coco.loadAnns(coco.getAnnIds()), things, strict=True):
        assert np.array_equal(coco.annToMask(annotation), segment.mask)
        assert annotation["category_id"] == IDS[segment.category]
        assert annotation["iscrowd"] == segment.crowd and annotation["area"] == segment.mask.sum()
    content = json.loads(file.read_text())
    content["annotations"].pop()
    file.write_text(json.dumps(content))
    second = Path(PathManager.get_local_path(json_file))
    assert second != first and len(json.loads(second.read_text())["images"]) == 1


def test_semantic_labels_of_more_than_255_classes(tmp_path):
    categories = [{"id": i, "name": str(i), "isthing": 0} for i in range(300)]
    ignore = class_metadata(categories)["ignore_label"]
    write_panoptic_png(tmp_path / "a.png", SCENES["0.jpg"], IDS)
    segments = [{"id": 70001, "category_id": 255}, {"id": 70001 * 3, "category_id": 299}]
    path = semantic_path(str(tmp_path / "a.png"), segments, ignore)
    labels = detection_utils.read_image(path)
    assert np.unique(labels).tolist() == [255, 299, 65535]
    assert np.array_equal(labels == 299, SCENES["0.jpg"][2].mask)


def test_crowds_count_neither_for_nor_against(tmp_path):
    name = str(write_panoptic(tmp_path / "p.json", tmp_path, tmp_path / "p"))
    register_by_path([name])
    found = {k: [s._replace(crowd=False) for s in scene] for k, scene in SCENES.items()}
    results = evaluate(name, found, 4, tmp_path, ("PANOPTIC", "INSTANCE"))
    assert results == perfect("PQ", "AP")
    wrong = {
        k: [s._replace(category=0, crowd=False) if s.crowd else s for s in scene]
        for k, scene in SCENES.items()
    }
    assert evaluate(name, wrong, 4, tmp_path, ("PANOPTIC",))["PQ"] < 100


@pytest.mark.parametrize(
    "mapper,classes",
    [
        ("mask_former_panoptic", {0, 1, 2, 3}),
        ("mask_former_semantic", {0, 1, 2, 3}),
        ("coco_panoptic_lsj", {0, 1, 2, 3}),
    ],
)
def test_mappers_read_panoptic_files(tmp_path, mapper, classes):
    name = str(write_panoptic(tmp_path / "p.json", tmp_path, tmp_path / "p"))
    register_by_path([name])
    cfg = config(name, 4, tmp_path)
    cfg.INPUT.DATASET_MAPPER_NAME = mapper
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 1.0
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.9
    seen: set[int] = set()
    for _, batch in zip(range(4), MaskFormerTrainer.build_train_loader(cfg), strict=False):
        for sample in batch:
            assert sample["instances"].gt_masks.shape[1:] == sample["image"].shape[1:]
            seen |= set(sample["instances"].gt_classes.tolist())
    assert seen == classes


def test_train_net_trains_and_evaluates_by_path(tmp_path):
    name = str(write_panoptic(tmp_path / "p.json", tmp_path, tmp_path / "p"))
    cfg = config(name, 4, tmp_path)
    cfg.SOLVER.MAX_ITER = 1
    cfg.TEST.EVAL_PERIOD = 1
    (tmp_path / "config.yaml").write_text(cfg.dump())
    load_tool("train_net").run(["--config-file", str(tmp_path / "config.yaml")])
    metrics = (tmp_path / "output" / "metrics.json").read_text().splitlines()[-1]
    assert {"panoptic_seg/PQ", "segm/AP", "sem_seg/mIoU"} <= set(json.loads(metrics))


def _without_isthing(content):
    del content["categories"][0]["isthing"]


def _without_iscrowd(content):
    del content["annotations"][0]["segments_info"][0]["iscrowd"]


def _of_no_image(content):
    content["annotations"][1]["image_id"] = 99


def _of_no_category(content):
    content["annotations"][0]["segments_info"][0]["category_id"] = 77


def _of_one_name(content):
    content["images"][1]["file_name"] = "deep/0.png"


@pytest.mark.parametrize(
    "spoil,message",
    [
        (_without_isthing, "'road' has no 'isthing'"),
        (_without_iscrowd, "image 10 has no 'iscrowd'"),
        (_of_no_image, "image_id 99"),
        (_of_no_category, "category_id 77"),
        (_of_one_name, "named '0'"),
    ],
)
def test_broken_panoptic_files_are_refused_at_once(tmp_path, spoil, message):
    file = write_panoptic(tmp_path / "p.json", tmp_path, tmp_path / "p")
    content = json.loads(file.read_text())
    spoil(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"DATASETS.*not a valid COCO panoptic file.*{message}"):
        register_by_path([str(file)])


def test_missing_panoptic_pngs_are_named(tmp_path):
    name = str(write_panoptic(tmp_path / "p.json", tmp_path, tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=r"DATASETS.*first panoptic PNG 0\.png is not in"):
        register_by_path([name])
    assert name not in DatasetCatalog.list()


def test_quality_without_stuff_is_refused(tmp_path):
    file = write_panoptic(tmp_path / "p.json", tmp_path, tmp_path / "p")
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["isthing"] = 1
    file.write_text(json.dumps(content))
    register_by_path([str(file)])
    with pytest.raises(ValueError, match="has no stuff.*PANOPTIC_ON False"):
        evaluate(str(file), SCENES, 4, tmp_path)
