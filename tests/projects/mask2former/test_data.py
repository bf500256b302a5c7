"""Mappers, data sets, metrics and optimizer of the Mask2Former project."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances
from PIL import Image
from torch import nn

from expedit_d2.data import register_collage
from expedit_d2.data.color import ColorAugSSD
from expedit_d2.engine.solver import build_lr_scheduler
from expedit_d2.projects import get_cfg
from expedit_d2.projects.Mask2Former import (
    MaskFormerTrainer,
    add_maskformer2_config,
    build_evaluators,
    build_mapper,
    register_panoptic_datasets,
)
from expedit_d2.projects.Mask2Former.data.mappers import MAPPERS, MaskFormerMapper, read_segments

HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def collage(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("collage")
    register_collage(root, {"train": 2, "val": 2}, (HEIGHT, WIDTH), name="mask2former_collage")
    return "mask2former_collage"


@pytest.fixture
def records(collage) -> list[dict]:
    return DatasetCatalog.get(collage + "_train")


def config(name: str = "mask2former_collage", **changes) -> CfgNode:
    cfg = get_cfg()
    add_maskformer2_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name + "_train",), (name + "_val",)
    cfg.INPUT.FORMAT = "RGB"
    cfg.DATALOADER.NUM_WORKERS = 0
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def unchanged(record: dict, task: str) -> Instances:
    return read_segments(record, task, T.TransformList([]), (HEIGHT, WIDTH))


# ------------------------------------------------------------------------------------- segments


def test_all_three_tasks_tell_of_the_same_scene(records):
    for record in records:
        panoptic, instance, semantic = (
            unchanged(record, task) for task in ("panoptic", "instance", "semantic")
        )
        # Segments of a panoptic map cover every pixel once.
        assert (panoptic.gt_masks.sum(0) == 1).all()
        classes = (panoptic.gt_masks * panoptic.gt_classes[:, None, None]).sum(0)
        things = {s["category_id"] for s in record["segments_info"] if s["isthing"]}
        of_things = [int(c) in things for c in panoptic.gt_classes]
        found = {(int(c), m.numpy().tobytes()) for c, m in _pairs(panoptic[of_things])}
        assert found == {(int(c), m.numpy().tobytes()) for c, m in _pairs(instance)}
        for category, mask in _pairs(semantic):
            assert torch.equal(mask, classes == category)
        assert len(semantic) == len(classes.unique())


def _pairs(instances: Instances):
    return zip(instances.gt_classes, instances.gt_masks, strict=True)


def test_crowds_and_segments_without_pixels_are_left_out(records):
    record = records[0]
    everything = unchanged(record, "panoptic")
    crowd = [{**s, "iscrowd": int(i == 0)} for i, s in enumerate(record["segments_info"])]
    assert len(unchanged({**record, "segments_info": crowd}, "panoptic")) == len(everything) - 1
    one = everything.gt_masks[0]
    row, column = (int(v) for v in one.nonzero()[0])
    crop = T.CropTransform(column, row, 1, 1)
    cropped = read_segments(record, "panoptic", T.TransformList([crop]), (1, 1))
    assert len(cropped) == 1 and cropped.gt_classes[0] == everything.gt_classes[0]


def test_an_image_without_segments_has_empty_masks(records):
    instances = unchanged({**records[0], "annotations": []}, "instance")
    assert instances.gt_masks.shape == (0, HEIGHT, WIDTH)
    assert instances.gt_classes.dtype == torch.int64


def test_polygons_run_lengths_and_bitmaps_are_the_same_masks():
    box = np.zeros((20, 30), dtype=np.uint8)
    box[4:12, 6:26] = 1
    run_length = mask_util.encode(np.asfortranarray(box))
    shapes = [[[6, 4, 26, 4, 26, 12, 6, 12]], run_length, box]
    record = {"annotations": [{"category_id": 1, "segmentation": s} for s in shapes]}
    # Halved, flipped, cropped beyond the right and lower border of the box.
    transforms = T.TransformList(
        [
            T.ResizeTransform(20, 30, 10, 15),
            T.HFlipTransform(15),
            T.CropTransform(4, 3, 8, 5, 15, 10),
            T.PadTransform(0, 0, 2, 1, 8, 5, 128, 255),
        ]
    )
    found = read_segments(record, "instance", transforms, (6, 10))
    expected = torch.zeros(6, 10, dtype=torch.bool)
    expected[0:3, 0:8] = True
    assert len(found) == 3
    for mask in found.gt_masks:
        assert torch.equal(mask, expected)


def test_padding_is_no_segment(records):
    pad = T.TransformList([T.PadTransform(0, 0, 10, 7, WIDTH, HEIGHT, 128, 255)])
    for task in ("panoptic", "instance"):
        found = read_segments(records[0], task, pad, (HEIGHT + 7, WIDTH + 10))
        assert not found.gt_masks[:, HEIGHT:].any() and not found.gt_masks[:, :, WIDTH:].any()


def test_ignored_pixels_and_16_bit_labels(tmp_path):
    labels = np.array([[0, 300, 255], [65535, 300, 7]], dtype=np.uint16)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record = {"sem_seg_file_name": str(tmp_path / "labels.png")}
    found = read_segments(record, "semantic", T.TransformList([]), (2, 3), ignore_label=65535)
    assert found.gt_classes.tolist() == [0, 7, 255, 300]
    assert found.gt_masks[3].tolist() == [[False, True, False], [False, True, False]]


@pytest.mark.parametrize(
    "task,key",
    [
        ("panoptic", "pan_seg_file_name"),
        ("panoptic", "segments_info"),
        ("instance", "annotations"),
        ("semantic", "sem_seg_file_name"),
    ],
)
def test_a_record_without_the_labels_of_the_task_is_refused(records, task, key):
    record = {k: v for k, v in records[0].items() if k != key}
    with pytest.raises(ValueError, match=f"DATASET_MAPPER_NAME.*{key}"):
        unchanged(record, task)


# -------------------------------------------------------------------------------------- mappers


@pytest.mark.parametrize("name", sorted(MAPPERS))
def test_every_mapper_reads_the_embedded_data(records, name):
    cfg = config(
        INPUT__DATASET_MAPPER_NAME=name,
        INPUT__IMAGE_SIZE=80,
        INPUT__MIN_SCALE=0.5,
        INPUT__MIN_SIZE_TRAIN=[48, 70],
        INPUT__CROP__ENABLED=True,
        INPUT__CROP__TYPE="absolute",
        INPUT__CROP__SIZE=[40, 40],
        INPUT__CROP__SINGLE_CATEGORY_MAX_AREA=0.9,
        INPUT__COLOR_AUG_SSD=True,
        INPUT__SIZE_DIVISIBILITY=56,
    )
    mapper = pickle.loads(pickle.dumps(build_mapper(cfg)))
    side = 80 if name.endswith("_lsj") else 56
    for record in records * 3:
        before = json.dumps(record, default=str)
        sample = mapper(record)
        assert json.dumps(record, default=str) == before
        assert sample["image"].shape == (3, side, side) and sample["image"].dtype == torch.uint8
        instances = sample["instances"]
        assert instances.image_size == (side, side)
        assert instances.gt_masks.shape == (len(instances), side, side)
        assert instances.gt_masks.dtype == torch.bool
        assert instances.gt_masks.flatten(1).any(1).all()
        assert sample["image_id"] == record["image_id"] and "annotations" not in sample
        if name != "coco_instance_lsj" and name != "mask_former_instance":
            assert (instances.gt_masks.sum(0) <= 1).all()


def test_masks_move_with_the_image(records, tmp_path):
    """An image painted with its own labels is still painted with them after augmentation."""
    record = dict(records[0])
    ids = np.array(Image.open(record["pan_seg_file_name"]))
    numbers = ids.astype(int) @ np.array([1, 256, 65536])
    painted = np.zeros(ids.shape, dtype=np.uint8)
    for index, segment in enumerate(record["segments_info"]):
        painted[numbers == segment["id"]] = 20 * (index + 1)
    Image.fromarray(painted).save(tmp_path / "painted.png")
    record["file_name"] = str(tmp_path / "painted.png")
    cfg = config(INPUT__DATASET_MAPPER_NAME="coco_panoptic_lsj", INPUT__IMAGE_SIZE=90)
    cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE = 0.7, 1.6
    mapper = build_mapper(cfg)
    for _ in range(5):
        sample = mapper(record)
        image = sample["image"][0].int()
        for mask in sample["instances"].gt_masks:
            if mask.sum() > 100:
                value = image[mask].float().median()
                assert value % 20 == 0
                # All but the border, where the image is interpolated.
                assert (image[mask] == value).float().mean() > 0.7


def test_class_map_of_a_panoptic_record_serves_the_constrained_crop(records):
    record = {k: v for k, v in records[0].items() if k != "sem_seg_file_name"}
    crop = T.RandomCrop_CategoryAreaConstraint("absolute", (32, 32), 0.75, 255)
    sample = MaskFormerMapper("panoptic", [crop], "RGB")(record)
    assert sample["image"].shape == (3, 32, 32)


def test_loader_gives_batches(collage):
    cfg = config(INPUT__DATASET_MAPPER_NAME="coco_panoptic_lsj", INPUT__IMAGE_SIZE=64)
    cfg.SOLVER.IMS_PER_BATCH = 2
    batch = next(iter(MaskFormerTrainer.build_train_loader(cfg)))
    assert [x["image"].shape for x in batch] == [(3, 64, 64)] * 2


def test_wrong_names_are_refused(collage):
    with pytest.raises(ValueError, match="INPUT.DATASET_MAPPER_NAME must be one of"):
        build_mapper(config(INPUT__DATASET_MAPPER_NAME="nope"))
    with pytest.raises(ValueError, match="INPUT.RANDOM_FLIP"):
        build_mapper(
            config(INPUT__DATASET_MAPPER_NAME="coco_panoptic_lsj", INPUT__RANDOM_FLIP="twice")
        )
    with pytest.raises(ValueError, match="INPUT.FORMAT"):
        ColorAugSSD("L")


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_colour_distortion_does_not_depend_on_the_channel_order(order):
    image = np.random.randint(0, 256, (8, 9, 3), dtype=np.uint8)
    given = image if order == "RGB" else image[..., ::-1]
    np.random.seed(3)
    changed = ColorAugSSD(order).get_transform(given).apply_image(given)
    np.random.seed(3)
    expected = ColorAugSSD("RGB").get_transform(image).apply_image(image)
    assert np.array_equal(changed if order == "RGB" else changed[..., ::-1], expected)
    assert changed.dtype == np.uint8 and changed.shape == image.shape


def test_colour_distortion_parts():
    image = np.full((2, 2, 3), (100, 150, 50), dtype=np.uint8)
    augmentation = ColorAugSSD("RGB")
    transform = augmentation.get_transform(image)
    settings = {"shift": 0, "contrast": 1, "saturation": 1, "hue": 0, "contrast_first": True}

    def changed(**values):
        for name, value in (settings | values).items():
            setattr(transform, name, value)
        return transform.apply_image(image)[0, 0].astype(int)

    # HSV in bytes costs a rounding.
    assert np.abs(changed() - image[0, 0]).max() <= 2
    assert np.abs(changed(shift=20) - (120, 170, 70)).max() <= 2
    assert np.abs(changed(contrast=0.5) - (50, 75, 25)).max() <= 2
    # Hue by 120 degrees turns red into green, green into blue, blue into red.
    assert np.abs(changed(hue=120) - (50, 100, 150)).max() <= 3
    gray = changed(saturation=0)
    assert gray.max() - gray.min() <= 1
    assert np.array_equal(transform.apply_segmentation(image), image)


# -------------------------------------------------------------------------------------- metrics


def perfect_outputs(record: dict, classes: int) -> dict:
    panoptic, instance, semantic = (
        unchanged(record, task) for task in ("panoptic", "instance", "semantic")
    )
    ids = torch.zeros(HEIGHT, WIDTH, dtype=torch.int32)
    segments = []
    for number, (info, mask) in enumerate(
        zip(record["segments_info"], panoptic.gt_masks, strict=True), start=1
    ):
        ids[mask] = number
        segments.append({"id": number, **{k: info[k] for k in ("isthing", "category_id")}})
    scores = torch.zeros(classes, HEIGHT, WIDTH)
    scores[semantic.gt_classes] = semantic.gt_masks.float()
    found = Instances(
        (HEIGHT, WIDTH),
        pred_masks=instance.gt_masks.float(),
        pred_boxes=BitMasks(instance.gt_masks).get_bounding_boxes(),
        pred_classes=instance.gt_classes,
        scores=torch.ones(len(instance)),
    )
    return {"panoptic_seg": (ids, segments), "sem_seg": scores, "instances": found}


def evaluate(evaluator, name: str) -> dict:
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        item = {"file_name": record["file_name"], "image_id": record["image_id"]}
        evaluator.process([item], [perfect_outputs(record, classes=10)])
    return evaluator.evaluate()


@pytest.mark.filterwarnings("ignore")
def test_perfect_outputs_have_perfect_metrics(collage, tmp_path):
    cfg = config(OUTPUT_DIR=str(tmp_path))
    test = cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.INSTANCE_ON = test.SEMANTIC_ON = True
    DatasetCatalog.get(collage + "_val")  # written when it is first read, as a loader does
    results = evaluate(build_evaluators(cfg, collage + "_val"), collage + "_val")
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)


def test_instances_whose_class_ids_have_gaps_are_scored(collage, tmp_path):
    """As in ADE20K: things are no unbroken range, and stuff among the instances is dropped."""
    name = "mask2former_gaps"
    original = MetadataCatalog.get(collage + "_val")
    things = original.thing_dataset_id_to_contiguous_id
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, lambda: DatasetCatalog.get(collage + "_val"))
        MetadataCatalog.get(name).set(
            json_file=original.json_file,
            evaluator_type="ade20k_panoptic_seg",
            thing_classes=original.thing_classes,
            thing_dataset_id_to_contiguous_id={k: 2 * v + 1 for k, v in things.items()},
        )
    cfg = config(OUTPUT_DIR=str(tmp_path))
    test = cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.SEMANTIC_ON = False
    test.INSTANCE_ON = True
    records = DatasetCatalog.get(name)  # which writes the files that the evaluator reads
    evaluator = build_evaluators(cfg, name)
    evaluator.reset()
    for record in records:
        found = perfect_outputs(record, classes=10)["instances"]
        found.pred_classes = 2 * found.pred_classes + 1
        stuff = found[[0]]
        stuff.pred_classes = stuff.pred_classes - 1
        both = Instances.cat([found, stuff])
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": both}])
    assert evaluator.evaluate()["segm"]["AP"] == pytest.approx(100)


def test_metrics_follow_what_is_switched_on(collage, tmp_path):
    cfg = config(OUTPUT_DIR=str(tmp_path))
    test = cfg.MODEL.MASK_FORMER.TEST
    test.SEMANTIC_ON = False
    with pytest.raises(ValueError, match="PANOPTIC_ON or INSTANCE_ON or SEMANTIC_ON"):
        build_evaluators(cfg, collage + "_val")
    test.PANOPTIC_ON = True
    assert type(build_evaluators(cfg, collage + "_val")).__name__ == "COCOPanopticEvaluator"
    with pytest.raises(ValueError, match="evaluator_type None"):
        build_evaluators(cfg, "mask2former_unknown")


def test_official_data_sets_are_registered():
    register_panoptic_datasets()
    for split in ("train", "val"):
        coco = MetadataCatalog.get(f"coco_2017_{split}_panoptic_with_sem_seg")
        ade20k = MetadataCatalog.get(f"ade20k_panoptic_{split}")
        assert (len(coco.thing_classes), len(coco.stuff_classes)) == (80, 133)
        assert (len(ade20k.thing_classes), len(ade20k.stuff_classes)) == (100, 150)
        assert sorted(coco.thing_dataset_id_to_contiguous_id.values()) == list(range(80))
        assert ade20k.thing_dataset_id_to_contiguous_id[7] == 7
        assert {"wall", "sky", "floor"}.isdisjoint(ade20k.thing_classes)
        assert {"bed", "person", "clock", "flag"} <= set(ade20k.thing_classes)


def test_panoptic_files_are_loaded_with_contiguous_classes(tmp_path):
    register_panoptic_datasets()
    meta = MetadataCatalog.get("coco_2017_val_panoptic_with_sem_seg")
    content = {
        "annotations": [
            {
                "file_name": "000.png",
                "image_id": 5,
                "segments_info": [
                    {"id": 9, "category_id": 90, "iscrowd": 0},
                    {"id": 4, "category_id": 200, "iscrowd": 0},
                ],
            }
        ]
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    original = meta.panoptic_json
    del meta.panoptic_json
    meta.panoptic_json = str(tmp_path / "panoptic.json")
    try:
        [record] = DatasetCatalog.get("coco_2017_val_panoptic_with_sem_seg")
    finally:
        del meta.panoptic_json
        meta.panoptic_json = original
    assert [(s["category_id"], s["isthing"]) for s in record["segments_info"]] == [
        (79, True),
        (132, False),
    ]
    assert record["file_name"].endswith("val2017/000.jpg")
    assert record["sem_seg_file_name"].endswith("panoptic_semseg_val2017/000.png")


# ------------------------------------------------------------------------------------ optimizer


class _Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 3))
        self.linear = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = _Backbone()
        self.query = nn.Embedding(2, 2)
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize("name", ["ADAMW", "SGD"])
def test_optimizer_groups(name):
    cfg = config(SOLVER__OPTIMIZER=name, SOLVER__BASE_LR=0.1, SOLVER__WEIGHT_DECAY=0.05)
    cfg.SOLVER.WEIGHT_DECAY_EMBED, cfg.SOLVER.WEIGHT_DECAY_NORM = 0.01, 0.02
    model = _Model()
    optimizer = MaskFormerTrainer.build_optimizer(cfg, model)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    slow = pytest.approx(0.01)
    assert found == {
        "backbone.pos_embed": (slow, 0.0),
        "backbone.linear.weight": (slow, 0.05),
        "backbone.linear.bias": (slow, 0.05),
        "backbone.norm.weight": (slow, 0.02),
        "backbone.norm.bias": (slow, 0.02),
        "query.weight": (0.1, 0.01),
        "head.weight": (0.1, 0.05),
        "head.bias": (0.1, 0.05),
    }


def test_full_model_clipping_limits_the_norm_of_all_gradients_together():
    cfg = config(SOLVER__OPTIMIZER="SGD", SOLVER__BASE_LR=1.0, SOLVER__MOMENTUM=0.0)
    cfg.SOLVER.CLIP_GRADIENTS.merge_from_list(
        ["ENABLED", True, "CLIP_TYPE", "full_model", "CLIP_VALUE", 0.01]
    )
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MaskFormerTrainer.build_optimizer(cfg, model)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    moved = [(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)]
    assert torch.cat(moved).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER"):
        MaskFormerTrainer.build_optimizer(config(SOLVER__OPTIMIZER="LION"), nn.Linear(1, 1))


@pytest.mark.filterwarnings("ignore")
def test_polynomial_schedule():
    cfg = config(SOLVER__LR_SCHEDULER_NAME="WarmupPolyLR", SOLVER__MAX_ITER=10)
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.BASE_LR = 0, 1.0
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = build_lr_scheduler(cfg, optimizer)
    for step in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx((1 - step / 10) ** 0.9)
        optimizer.step()
        schedule.step()
