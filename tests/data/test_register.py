"""Registration: Detectron2's own evaluators give full marks to the truth, and less to less."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, SemSegEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from pycocotools import mask as mask_util

from expedit_d2.data import collage, register_collage

SIZE = (96, 128)
COUNTS = {"train": 2, "val": 6}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Prefix of a small registered set."""
    register_collage(tmp_path_factory.mktemp("datasets"), COUNTS, SIZE, name="collage_tiny")
    yield "collage_tiny"
    for split in collage.SPLITS:
        DatasetCatalog.remove(f"collage_tiny_{split}")
        MetadataCatalog.remove(f"collage_tiny_{split}")


@pytest.fixture(scope="module")
def val(tiny):
    return DatasetCatalog.get(f"{tiny}_val")


def read(path):
    return np.asarray(Image.open(path)).astype(np.int64)


def read_panoptic(record):
    return read(record["pan_seg_file_name"]) @ [1, 256, 65536]


def true_instances(record):
    instances = Instances((record["height"], record["width"]))
    annotations = record["annotations"]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    masks = np.stack([mask_util.decode(a["segmentation"]) for a in annotations])
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    instances.pred_masks = torch.from_numpy(masks).bool()
    instances.pred_classes = torch.tensor([a["category_id"] for a in annotations])
    instances.scores = torch.ones(len(annotations))
    return {"instances": instances}


def true_panoptic(record):
    segments = [
        {k: s[k] for k in ("id", "category_id", "isthing")} for s in record["segments_info"]
    ]
    return {"panoptic_seg": (torch.from_numpy(read_panoptic(record)), segments)}


def true_semantic(record):
    labels = torch.from_numpy(read(record["sem_seg_file_name"]))
    scores = torch.nn.functional.one_hot(labels, len(collage.CLASSES)).permute(2, 0, 1)
    return {"sem_seg": scores.float()}


def evaluate(evaluator, records, predict):
    evaluator.reset()
    for record in records:
        evaluator.process([record], [predict(copy.deepcopy(record))])
    return evaluator.evaluate()


# ---------------------------------------------------------------------------------- evaluators


def test_coco_evaluator_gives_full_marks_to_the_truth(tiny, val, tmp_path):
    evaluator = COCOEvaluator(
        f"{tiny}_val", ("bbox", "segm"), distributed=False, output_dir=tmp_path, use_fast_impl=False
    )
    result = evaluate(evaluator, val, true_instances)
    assert result["bbox"]["AP"] == pytest.approx(100)
    assert result["segm"]["AP"] == pytest.approx(100)

    def forget_the_first(record):
        return {"instances": true_instances(record)["instances"][1:]}

    assert evaluate(evaluator, val, forget_the_first)["segm"]["AP"] < 95


def test_panoptic_evaluator_gives_full_marks_to_the_truth(tiny, val, tmp_path):
    evaluator = COCOPanopticEvaluator(f"{tiny}_val", str(tmp_path))
    result = evaluate(evaluator, val, true_panoptic)["panoptic_seg"]
    assert [result[k] for k in ("PQ", "PQ_th", "PQ_st")] == pytest.approx([100, 100, 100])

    def shift(record):
        ids, segments = true_panoptic(record)["panoptic_seg"]
        return {"panoptic_seg": (ids.roll(5, dims=1), segments)}

    assert evaluate(evaluator, val, shift)["panoptic_seg"]["PQ"] < 95


def test_semantic_evaluator_gives_full_marks_to_the_truth(tiny, val, tmp_path):
    evaluator = SemSegEvaluator(f"{tiny}_val", distributed=False, output_dir=str(tmp_path))
    result = evaluate(evaluator, val, true_semantic)["sem_seg"]
    assert result["mIoU"] == pytest.approx(100) and result["pACC"] == pytest.approx(100)

    def shift(record):
        return {"sem_seg": true_semantic(record)["sem_seg"].roll(5, dims=2)}

    assert evaluate(evaluator, val, shift)["sem_seg"]["mIoU"] < 95


# ------------------------------------------------------------------------------------- records


def test_records_agree_with_the_scenes_pixel_by_pixel(val):
    assert len(val) == COUNTS["val"]
    for index, record in enumerate(val):
        scene = collage.make_scene("val", index, SIZE)
        assert (record["image_id"], record["height"], record["width"]) == (index, *SIZE)
        assert np.array_equal(detection_utils.read_image(record["file_name"]), scene.image)
        things = scene.instances()
        assert [a["category_id"] for a in record["annotations"]] == [c for c, _ in things]
        for annotation, (_, mask) in zip(record["annotations"], things, strict=True):
            assert np.array_equal(mask_util.decode(annotation["segmentation"]), mask)
        panoptic = read_panoptic(record)
        for segment in record["segments_info"]:
            mask = scene.semantic == segment["category_id"]
            assert (panoptic == segment["id"]).sum() == segment["area"] <= mask.sum()
            assert segment["isthing"] == (segment["category_id"] < 6)
        assert sum(s["area"] for s in record["segments_info"]) == SIZE[0] * SIZE[1]
        assert np.abs(read(record["depth_file_name"]) / 1000 - scene.depth).max() < 0.001


def test_metadata_follows_the_conventions(tiny):
    meta = MetadataCatalog.get(f"{tiny}_val")
    assert meta.thing_classes == ["disk", "square", "triangle", "star", "ring", "cross"]
    assert meta.stuff_classes == [*meta.thing_classes, "grass", "gravel", "brick", "sky"]
    assert meta.stuff_colors[:6] == meta.thing_colors and len(meta.stuff_colors) == 10
    assert meta.thing_dataset_id_to_contiguous_id == {i + 1: i for i in range(6)}
    assert (meta.ignore_label, meta.evaluator_type) == (255, "coco_panoptic_seg")


def test_both_sizes_are_registered(catalogs):
    register_collage()
    names = [f"{name}_{split}" for name in ("collage", "collage_448") for split in ("train", "val")]
    folders = [Path(MetadataCatalog.get(name).image_root).parent.name for name in names]
    assert folders == ["collage-v2"] * 2 + ["collage-v2-1200+200-448x448"] * 2


def test_nothing_is_written_before_first_use_and_registering_again_is_harmless(tmp_path, catalogs):
    for _ in range(2):
        register_collage(tmp_path, COUNTS, SIZE, name="collage_lazy")
    register_collage(name="collage_lazy")
    assert not list(tmp_path.iterdir())
    assert len(DatasetCatalog.get("collage_lazy_train")) == COUNTS["train"]
    assert [path.name for path in tmp_path.iterdir()] == ["collage-v2-2+6-96x128"]
    with pytest.raises(ValueError, match="collage_lazy_train is already registered"):
        register_collage(tmp_path / "elsewhere", COUNTS, SIZE, name="collage_lazy")
