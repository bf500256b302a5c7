"""Data sets in their official layouts: the truth gets full marks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import builtin
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from pycocotools import mask as mask_util

from expedit_d2.projects.Mask2Former import register_panoptic_datasets
from expedit_d2.projects.Mask2Former.data import datasets
from support.repository import load_tool
from support.scenes import (
    OUTPUTS,
    Scene,
    config,
    evaluate,
    evaluate_random,
    make_scenes,
    perfect,
    semantic,
    write_image,
    write_labels,
    write_panoptic_png,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("catalogs")]


@pytest.fixture
def official(monkeypatch, tmp_path) -> Path:
    """The folder of all data sets; Detectron2's and our names lead there."""
    root = tmp_path / "datasets"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    monkeypatch.setattr(DatasetCatalog, "data", {})
    monkeypatch.setattr(MetadataCatalog, "data", {})
    for register in (
        builtin.register_all_coco,
        builtin.register_all_ade20k,
        builtin.register_all_cityscapes,
        builtin.register_all_cityscapes_panoptic,
    ):
        register(str(root))
    register_panoptic_datasets()
    return root


def write_official(
    scenes: dict[str, Scene],
    meta: Metadata,
    image_id: Callable[[str], int | str],
) -> None:
    """Images, semantic and panoptic PNGs, and both JSON files, where the metadata say."""
    classes = meta.stuff_dataset_id_to_contiguous_id
    things = meta.thing_dataset_id_to_contiguous_id
    images, panoptic, instances = [], [], []
    for name, scene in scenes.items():
        png = f"{Path(name).stem}.png"
        write_image(Path(meta.image_root) / name, scene)
        write_labels(Path(meta.sem_seg_root) / png, semantic(scene))
        info = write_panoptic_png(Path(meta.panoptic_root) / png, scene, list(classes))
        image = {"id": image_id(Path(name).stem), "file_name": name, "height": 64, "width": 96}
        images.append(image)
        panoptic.append({"image_id": image["id"], "file_name": png, "segments_info": info})
        for segment, s in zip(scene, info, strict=True):
            if segment.thing:
                code = mask_util.encode(np.asfortranarray(segment.mask))
                code["counts"] = code["counts"].decode()
                own = {"image_id": image["id"], "id": len(instances) + 1, "segmentation": code}
                instances.append({**s, **own})
    for file, ids, annotated in (
        (meta.panoptic_json, classes, panoptic),
        (meta.json_file, things, instances),
    ):
        # Official files of ADE20K do not agree on names.
        categories = [{"id": i, "name": f"another {i}", "isthing": int(i in things)} for i in ids]
        content = {"images": images, "annotations": annotated, "categories": categories}
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps(content))


def test_ade20k(official, tmp_path):
    wall, floor, bed, person = 0, 3, 7, 12
    scenes = {
        f"ADE_val_0000000{i}.jpg": scene
        for i, scene in enumerate(make_scenes((wall, floor), (bed, person), crowd=False), start=1)
    }
    name = "ade20k_panoptic_val"
    write_official(scenes, MetadataCatalog.get(name), str)
    top = official / "ADEChallengeData2016"
    for path in (
        "images/validation/ADE_val_00000001.jpg",
        "annotations_detectron2/validation/ADE_val_00000001.png",
        "ade20k_panoptic_val/ADE_val_00000001.png",
        "ade20k_panoptic_val.json",
        "ade20k_instance_val.json",
    ):
        assert (top / path).is_file()
    assert evaluate(name, scenes, 150, tmp_path) == perfect("PQ", "AP", "mIoU")
    assert set(evaluate_random(name, 150, tmp_path)) == {"PQ", "AP", "mIoU"}
    name = "ade20k_sem_seg_val"
    assert evaluate(name, scenes, 150, tmp_path, ("SEMANTIC",)) == perfect("mIoU")
    assert set(evaluate_random(name, 150, tmp_path, ("SEMANTIC",))) == {"mIoU"}
    name = "ade20k_instance_val"
    things = {bed: 0, person: 3}
    numbered = {
        k: [s._replace(category=things[s.category]) for s in scene if s.thing]
        for k, scene in scenes.items()
    }
    assert evaluate(name, numbered, 100, tmp_path, ("INSTANCE",)) == perfect("AP")
    assert set(evaluate_random(name, 100, tmp_path, ("INSTANCE",))) == {"AP"}


def test_coco(official, tmp_path):
    dog, pizza, sky, wall = 16, 53, 119, 131
    scenes = {
        f"00000000000{i}.jpg": scene
        for i, scene in enumerate(make_scenes((sky, wall), (dog, pizza), crowd=True))
    }
    name = "coco_2017_val_panoptic_with_sem_seg"
    write_official(scenes, MetadataCatalog.get(name), int)
    for path in (
        "val2017/000000000001.jpg",
        "panoptic_val2017/000000000001.png",
        "panoptic_semseg_val2017/000000000001.png",
        "annotations/panoptic_val2017.json",
        "annotations/instances_val2017.json",
    ):
        assert (official / "coco" / path).is_file()
    assert evaluate(name, scenes, 133, tmp_path) == perfect("PQ", "AP", "mIoU")
    assert set(evaluate_random(name, 133, tmp_path)) == {"PQ", "AP", "mIoU"}


def test_ade20k_instances_are_the_hundred_things():
    for split in ("train", "val"):
        meta = MetadataCatalog.get(f"ade20k_instance_{split}")
        panoptic = MetadataCatalog.get(f"ade20k_panoptic_{split}")
        assert meta.thing_classes == panoptic.thing_classes and len(meta.thing_classes) == 100
        ids = meta.thing_dataset_id_to_contiguous_id
        assert list(ids.values()) == list(range(100)) and [*ids][:4] == [7, 8, 10, 12]
        assert meta.evaluator_type == "coco"
        assert meta.json_file.endswith(f"ADEChallengeData2016/ade20k_instance_{split}.json")


def write_cityscapes(root: Path) -> dict[str, Scene]:
    """Road and sky, cars and people: images, the four label files of each, panoptic labels."""
    road, sky, person, car = (
        next(c for c in CITYSCAPES_CATEGORIES if c["name"] == name)
        for name in ("road", "sky", "person", "car")
    )
    kinds = {c["trainId"]: c for c in (road, sky, person, car)}
    made = make_scenes(
        *[(a["trainId"], b["trainId"]) for a, b in ((sky, road), (car, person))], False
    )
    scenes, images, annotations = {}, [], []
    for number, scene in enumerate(made):
        stem = f"frankfurt_000000_00029{number}"
        scenes[f"{stem}_leftImg8bit.png"] = scene
        write_image(root / f"leftImg8bit/val/frankfurt/{stem}_leftImg8bit.png", scene)
        labels = np.zeros((64, 96), dtype=np.uint8)
        ids = np.zeros((64, 96), dtype=np.uint16)
        objects = []
        for index, segment in enumerate(scene):
            kind = kinds[segment.category]
            labels[segment.mask] = kind["id"]
            ids[segment.mask] = kind["id"] * 1000 + index if segment.thing else kind["id"]
            rows, columns = np.nonzero(segment.mask)
            left, top, right, bottom = columns.min(), rows.min(), columns.max(), rows.max()
            corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
            polygon = [[int(x), int(y)] for x, y in corners]
            # Later ones are on top.
            objects.insert(0, {"label": kind["name"], "polygon": polygon})
        gt = root / "gtFine/val/frankfurt"
        write_labels(gt / f"{stem}_gtFine_labelIds.png", labels)
        write_labels(gt / f"{stem}_gtFine_labelTrainIds.png", semantic(scene))
        write_labels(gt / f"{stem}_gtFine_instanceIds.png", ids)
        polygons = {"imgHeight": 64, "imgWidth": 96, "objects": objects}
        (gt / f"{stem}_gtFine_polygons.json").write_text(json.dumps(polygons))
        png = f"{stem}_gtFine_panoptic.png"
        by_class = {c: kind["id"] for c, kind in kinds.items()}
        info = write_panoptic_png(root / "gtFine/cityscapes_panoptic_val" / png, scene, by_class)
        images.append({"id": stem, "file_name": f"{stem}_gtFine_leftImg8bit.png"})
        annotations.append({"image_id": stem, "file_name": png, "segments_info": info})
    categories = [{k: c[k] for k in ("id", "name", "isthing")} for c in CITYSCAPES_CATEGORIES]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "gtFine/cityscapes_panoptic_val.json").write_text(json.dumps(content))
    return scenes


def test_cityscapes_panoptic_quality_needs_no_other_package(official, tmp_path):
    scenes = write_cityscapes(official / "cityscapes")
    name = "cityscapes_fine_panoptic_val"
    assert evaluate(name, scenes, 19, tmp_path, ("PANOPTIC",)) == perfect("PQ")
    assert set(evaluate_random(name, 19, tmp_path, ("PANOPTIC",))) == {"PQ"}


def test_cityscapes_says_what_to_install(official, tmp_path, monkeypatch):
    scenes = write_cityscapes(official / "cityscapes")
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    for name, outputs, packages in (
        ("cityscapes_fine_panoptic_val", OUTPUTS, "cityscapesscripts"),
        ("cityscapes_fine_sem_seg_val", ("SEMANTIC",), "cityscapesscripts"),
        ("cityscapes_fine_instance_seg_val", ("INSTANCE",), "cityscapesscripts shapely"),
    ):
        with pytest.raises(ModuleNotFoundError, match=f"{name}.*: pip install {packages}$"):
            evaluate(name, scenes, 19, tmp_path, outputs)
    cfg = config(name, 8, tmp_path, ("INSTANCE",))
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_instance"
    (tmp_path / "config.yaml").write_text(cfg.dump())
    with pytest.raises(SystemExit, match="^train_net.py: the data set .* pip install"):
        load_tool("train_net").run(["--config-file", str(tmp_path / "config.yaml")])
    register_panoptic_datasets()
    assert getattr(DatasetCatalog[name].args[-1], "func", None) is None  # wrapped once


def test_cityscapes(official, tmp_path, monkeypatch):
    pytest.importorskip("cityscapesscripts")
    monkeypatch.chdir(tmp_path)  # cityscapesScripts writes matches.json wherever it runs
    scenes = write_cityscapes(official / "cityscapes")
    name = "cityscapes_fine_panoptic_val"
    assert evaluate(name, scenes, 19, tmp_path) == perfect("PQ", "AP", "mIoU")
    assert set(evaluate_random(name, 19, tmp_path)) == {"PQ", "AP", "mIoU"}
    name = "cityscapes_fine_sem_seg_val"
    assert evaluate(name, scenes, 19, tmp_path, ("SEMANTIC",)) == perfect("mIoU")
    pytest.importorskip("shapely")
    name = "cityscapes_fine_instance_seg_val"
    classes = MetadataCatalog.get(name).thing_classes
    things = {13: classes.index("car"), 11: classes.index("person")}
    numbered = {
        k: [s._replace(category=things[s.category]) for s in scene if s.thing]
        for k, scene in scenes.items()
    }
    assert evaluate(name, numbered, 8, tmp_path, ("INSTANCE",)) == perfect("AP")
    assert set(evaluate_random(name, 8, tmp_path, ("INSTANCE",))) == {"AP"}
