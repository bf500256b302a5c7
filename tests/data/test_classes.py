"""Numbers of classes of a model and of a data set that do not fit are said."""

from __future__ import annotations

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from expedit_d2.data import register_by_path
from expedit_d2.projects import trainer_of
from support.detector import train_net
from support.repository import VITDET
from support.small_data import put, tiny_config

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("catalogs")]


def test_a_detector_on_other_classes_is_refused_before_inference(tiny_opts, coco, fails):
    arguments = ["--eval-only", "--config-file", VITDET, *tiny_opts]
    name = coco()
    message = fails(train_net, *arguments, "DATASETS.TEST", f"('{name}',)")
    expected = "has 2 classes, but the model has 6 (MODEL.ROI_HEADS.NUM_CLASSES)"
    assert message.startswith("train_net.py: DATASETS.TEST: ") and expected in message


def test_registered_names_and_training_are_checked_too(tiny_data, fails):
    train, val = tiny_data
    cfg = tiny_config("vitdet", val, MODEL__ROI_HEADS__NUM_CLASSES=80)
    expected = r"has 6 thing classes, but the model has 80 \(MODEL.ROI_HEADS.NUM_CLASSES\)"
    with pytest.raises(ValueError, match=f"^DATASETS.TEST: .*{expected}"):
        trainer_of(cfg).build_evaluator(cfg, val)
    with pytest.raises(ValueError, match=f"^DATASETS.TRAIN: .*{expected}"):
        trainer_of(cfg)(cfg)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES = 81
    with pytest.raises(ValueError, match=r"has 81 \(MODEL.RETINANET.NUM_CLASSES\)"):
        trainer_of(cfg).build_evaluator(cfg, val)


@pytest.mark.parametrize("model", ["mask2former", "segmenter"])
def test_models_of_pixels_on_other_classes(tiny_data, model):
    cfg = tiny_config(model, tiny_data[1], MODEL__SEM_SEG_HEAD__NUM_CLASSES=19)
    expected = r"has \d+ classes, but the model has 19 \(MODEL.SEM_SEG_HEAD.NUM_CLASSES\)"
    for key, call in (
        ("TEST", lambda: trainer_of(cfg).build_evaluator(cfg, tiny_data[1])),
        ("TRAIN", lambda: trainer_of(cfg)(cfg)),
    ):
        with pytest.raises(ValueError, match=f"^DATASETS.{key}: .*{expected}"):
            call()


def test_instances_of_a_panoptic_model(tiny_data):
    """Its first classes may be the things of a data set of instances, as they are in COCO."""
    meta = MetadataCatalog.get(tiny_data[1])
    MetadataCatalog.get("things").set(
        thing_classes=meta.thing_classes,
        thing_dataset_id_to_contiguous_id=meta.thing_dataset_id_to_contiguous_id,
        evaluator_type="coco",
    )
    cfg = tiny_config("mask2former", "things")
    cfg.DATASETS.TRAIN = (tiny_data[0],)
    trainer_of(cfg).check_dataset(cfg, "things")
    MetadataCatalog.get("others").set(
        thing_classes=[*meta.thing_classes[1:], "cube"],
        thing_dataset_id_to_contiguous_id=meta.thing_dataset_id_to_contiguous_id,
        evaluator_type="coco",
    )
    with pytest.raises(ValueError, match="'others' has 6 classes, but the model has"):
        trainer_of(cfg).check_dataset(cfg, "others")


def test_a_model_may_know_more_classes_than_the_largest_id(labels):
    """mIoU by hand: a model of five classes that calls class 0 class 4."""
    name = str(labels)
    register_by_path([name])
    cfg = tiny_config("segmenter", name, MODEL__SEM_SEG_HEAD__NUM_CLASSES=5)
    evaluator = trainer_of(cfg).build_evaluator(cfg, name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        scores = torch.zeros(5, 24, 32)
        scores[{0: 4, 1: 1, 2: 2}[int(record["image_id"])]] = 1
        evaluator.process([record], [{"sem_seg": scores}])
    # IoU 0 of class 0, 1 of classes 1 and 2; classes without a label do not count.
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(200 / 3)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 2
    with pytest.raises(ValueError, match="has 3 classes, but the model has 2"):
        trainer_of(cfg).build_evaluator(cfg, name)


def test_labels_of_another_kind_are_refused(labels, coco, tiny_data, tiny_opts, fails):
    arguments = ["--eval-only", "--config-file", VITDET, *tiny_opts]
    message = fails(train_net, *arguments, "DATASETS.TEST", f"('{labels}',)")
    assert "has no instances" in message and "COCO instance file" in message
    name = coco()
    register_by_path([name])
    cfg = tiny_config("segmenter", name)
    with pytest.raises(ValueError, match="^DATASETS.TEST: .*has no classes of pixels"):
        trainer_of(cfg).build_evaluator(cfg, name)


@pytest.mark.parametrize("key", ["area", "iscrowd", "segmentation"])
def test_annotations_without_what_ap_needs(coco, key):
    name = coco(lambda content: content["annotations"][1].pop(key))
    register_by_path([name])
    cfg = tiny_config("vitdet", name, MODEL__ROI_HEADS__NUM_CLASSES=2)
    with pytest.raises(ValueError, match=f"annotation 2 of image 2 has no .*{key}"):
        trainer_of(cfg).build_evaluator(cfg, name)
    if key == "segmentation":
        cfg.MODEL.MASK_ON = False
        trainer_of(cfg).build_evaluator(cfg, name)


def test_annotation_number_0_is_warned_of(coco, caplog):
    """The truth does not get full marks with it, by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def truth_of(name: str) -> float:
        truth = COCO(name)
        results = [{**a, "score": 1.0} for a in truth.dataset["annotations"]]
        scoring = COCOeval(truth, truth.loadRes(results), "bbox")
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
        return scoring.stats[0]

    assert truth_of(coco()) == pytest.approx(1)
    name = coco(put("id", 0))
    assert truth_of(name) < 1
    register_by_path([name])
    cfg = tiny_config("vitdet", name, MODEL__ROI_HEADS__NUM_CLASSES=2)
    trainer_of(cfg).build_evaluator(cfg, name)
    assert "number annotations from 1" in caplog.text
