"""What is wrong with data is one sentence that names the file, before or instead of a number.

Files are broken one thing at a time; everything goes through the tools or `register_by_path`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from PIL import Image
from pycocotools import mask as mask_util

from expedit_d2.comparison import register_images
from expedit_d2.data import register_by_path
from expedit_d2.data.coco_checks import run_lengths
from expedit_d2.data.images import MAX_PIXELS, DataError, load_labels, read_image
from expedit_d2.data.mapper import CheckedMapper
from expedit_d2.projects import get_cfg, trainer_of
from support.detector import TINY
from support.repository import EMBEDDED, ROOT, load_tool

train_net = load_tool("train_net")
draw = load_tool("draw")

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def catalogs(monkeypatch):
    """Forgets what a test registers."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


@pytest.fixture
def fails(capsys):
    """Runs a tool, which must end with one sentence; returns that."""

    def run(tool, *arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            tool.run([str(argument) for argument in arguments])
        if isinstance(stopped.value.code, str):
            return stopped.value.code
        assert stopped.value.code not in (0, None)
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


# --------------------------------------------------------------------------------- COCO files


def box_mask(height: int = 20, width: int = 30) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[3:9, 2:12] = 1
    return mask


def compressed(mask: np.ndarray) -> dict[str, Any]:
    code = mask_util.encode(np.asfortranarray(mask))
    return {"size": code["size"], "counts": code["counts"].decode()}


def annotation(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": number,
        "category_id": 5,
        "bbox": [2, 3, 10, 6],
        "area": 60,
        "iscrowd": 0,
        "segmentation": [[2, 3, 12, 3, 12, 9]],
    } | changes


@pytest.fixture
def coco(tmp_path) -> Callable[..., str]:
    """Writes an instance file with three images, changed by a function; returns its path."""

    def write(change: Callable[[dict], None] = lambda content: None) -> str:
        images = [
            {"id": number, "file_name": f"{number}.png", "height": 20, "width": 30}
            for number in (1, 2, 3)
        ]
        for image in images:
            Image.new("RGB", (30, 20), (0, 99, 200)).save(tmp_path / image["file_name"])
        content = {
            "images": images,
            "annotations": [annotation(number) for number in (1, 2, 3)],
            "categories": [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}],
        }
        content["annotations"][1]["segmentation"] = compressed(box_mask())
        change(content)
        (tmp_path / "coco.json").write_text(json.dumps(content))
        return str(tmp_path / "coco.json")

    return write


def put(key: str, value: Any, where: str = "annotations", index: int = 1):
    """Changes one value of the second annotation, or of another item."""

    def change(content: dict) -> None:
        content[where][index][key] = value

    return change


BROKEN = {
    "unknown image": (put("image_id", 99), "annotation 2 of image 99 is of an image that is not"),
    "image id twice": (put("id", 1, "images"), "two of its images have the id 1"),
    "category id twice": (put("id", 5, "categories"), "two of its categories have the id 5"),
    "annotation id twice": (put("id", 1), "annotation 1 of image 2 has the id of another one"),
    "unknown category": (put("category_id", 77), "annotation 2 of image 2 has category_id 77"),
    "negative box": (put("bbox", [2, 3, -10, 6]), r"a box of negative size, \[2, 3, -10, 6\]"),
    "three numbers": (put("bbox", [2, 3, 10]), r"the box \[2, 3, 10\], which must be four"),
    "box of NaN": (put("bbox", [2, 3, float("nan"), 6]), "must be four numbers"),
    "box of text": (put("bbox", ["2", 3, 10, 6]), "annotation number 1 is malformed"),
    "no box": (lambda c: c["annotations"][1].pop("bbox"), "annotation number 1 is malformed"),
    "odd polygon": (put("segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "a polygon of 7 numbers"),
    "two points": (put("segmentation", [[1, 2, 3, 4]]), "a polygon of 4 numbers"),
    "far away": (put("segmentation", [[1, 2, 3, 4, 1e9, 6]]), "a point far from every image"),
    "ignored": (put("ignore", 1), "a true 'ignore'"),
    "mask of another size": (
        put("segmentation", compressed(box_mask(30, 20))),
        r"a mask of \(30, 20\), but its image is of \(20, 30\)",
    ),
    "counts too short": (
        put("segmentation", {"size": [20, 30], "counts": [5, 5]}),
        "add up to the 600 pixels of the image, got 10",
    ),
    "negative counts": (
        put("segmentation", {"size": [20, 30], "counts": [605, -5]}),
        "must not be negative",
    ),
    "counts of floats": (
        put("segmentation", {"size": [20, 30], "counts": [300.5, 299.5]}),
        "not all integers",
    ),
    "torn code": (
        put("segmentation", {"size": [20, 30], "counts": compressed(box_mask())["counts"][:-2]}),
        "a broken run-length mask",
    ),
    "code of text": (
        put("segmentation", {"size": [20, 30], "counts": "no code at all"}),
        "its string is no code",
    ),
    "code of huge runs": (
        put("segmentation", {"size": [20, 30], "counts": "oooooo?oooooo?"}),
        "a broken run-length mask",
    ),
    "no height": (
        lambda c: c["images"][1].pop("height"),
        "number 1 of its images has no 'height'",
    ),
    "no annotation at all": (lambda c: c.update(annotations=None), "its annotations are no list"),
    "wrong size": (put("width", 40, "images", 2), r"3\.png has 20 x 30 pixels.*are for 20 x 40"),
    "missing images": (
        lambda c: [image.update(file_name=f"x{i}.png") for i, image in enumerate(c["images"]) if i],
        r"2 of its 3 images are not in .*, x1\.png for one",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_instance_files(coco, change, message):
    name = coco(change)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        register_by_path([name])
    text = str(caught.value)
    assert text.startswith(f"DATASETS.TEST or DATASETS.TRAIN names {name!r}, but ")
    assert re.search(message, text) and "\n" not in text
    assert name not in DatasetCatalog.list()


def test_a_broken_file_ends_a_tool_with_its_sentence(coco, fails):
    name = coco(BROKEN["unknown image"][0])
    arguments = ["--eval-only", "--config-file", EMBEDDED, *TINY]
    message = fails(train_net, *arguments, "DATASETS.TEST", f"('{name}',)")
    assert message.startswith("train_net.py: DATASETS.TEST") and "of image 99" in message


def test_what_is_right_is_taken(coco):
    """Masks in every form, crowds, an image turned by its EXIF data, one without annotations."""

    def change(content):
        turned = Image.new("RGB", (20, 30))
        exif = turned.getexif()
        exif[274] = 6
        turned.save(Path(name).parent / "3.jpg", exif=exif)
        content["images"][2]["file_name"] = "3.jpg"
        counts = run_lengths(compressed(box_mask())["counts"]).tolist()
        crowd = {"size": [20, 30], "counts": counts}
        content["annotations"][0].update(iscrowd=1, segmentation=crowd)
        content["annotations"].pop()

    name = coco()
    coco(change)
    register_by_path([name])
    records = DatasetCatalog.get(name)
    assert [len(record["annotations"]) for record in records] == [1, 1, 0]
    for record in records[:2]:
        mask = mask_util.decode(record["annotations"][0]["segmentation"])
        assert np.array_equal(mask, box_mask())


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_run_lengths_are_those_of_the_mask(share):
    random = np.random.default_rng(0)
    mask = (random.random((37, 211)) < share).astype(np.uint8)
    flat = mask.flatten(order="F")
    runs = [0] if flat[0] else []
    previous = -1
    for position in [*np.flatnonzero(np.diff(flat)), flat.size - 1]:
        runs.append(int(position) - previous)
        previous = int(position)
    assert run_lengths(compressed(mask)["counts"]).tolist() == runs
    assert run_lengths("") is None and run_lengths("é") is None


# -------------------------------------------------------------------------------- class counts


def tiny_config(name: str, dataset: str, **values: Any):
    """An embedded model's config, tested and trained on a data set."""
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / "embedded" / f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN = (dataset,)
    for key, value in values.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def test_a_detector_on_other_classes_is_refused_before_inference(tiny_opts, coco, fails):
    arguments = ["--eval-only", "--config-file", EMBEDDED, *tiny_opts]
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


@pytest.fixture
def labels(tmp_path) -> Path:
    """A folder of three label PNGs of ids 0 to 2, 24 x 32, with images beside it."""
    for number in range(3):
        ids = np.full((24, 32), number, np.uint8)
        ids[:2] = 255
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(ids).save(tmp_path / "labels" / f"{number}.png")
        Image.new("RGB", (32, 24), (number, 9, 9)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "labels"


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
    arguments = ["--eval-only", "--config-file", EMBEDDED, *tiny_opts]
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


# ----------------------------------------------------------------------------- label PNGs


def _tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


BROKEN_LABELS = {
    "torn": (_tear, r"1\.png cannot be read as an image"),
    "text": (lambda file: file.write_text("hello"), r"1\.png cannot be read as an image"),
    "colours": (
        lambda file: Image.new("RGB", (32, 24)).save(file),
        r"1\.png has colours \(RGB\), where pixels must be class ids",
    ),
    "another size": (
        lambda file: Image.new("L", (24, 32)).save(file),
        r"1\.png has 32 x 24 pixels, but the image .*1\.png has 24 x 32",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN_LABELS.values(), ids=BROKEN_LABELS)
def test_broken_labels(labels, spoil, message):
    spoil(labels / "1.png")
    with pytest.raises(ValueError, match=f"DATASETS.TEST or DATASETS.TRAIN names .*{message}"):
        register_by_path([str(labels)])


@pytest.mark.parametrize("model", ["segmenter", "mask2former"])
def test_ids_beyond_the_classes_stop_training(labels, model):
    """In a folder that lists two classes, as the model has."""
    (labels / "classes.txt").write_text("cat\nsky\n")
    name = str(labels)
    register_by_path([name])
    cfg = tiny_config(
        model,
        name,
        MODEL__SEM_SEG_HEAD__NUM_CLASSES=2,
        INPUT__DATASET_MAPPER_NAME="mask_former_semantic",
        DATALOADER__NUM_WORKERS=0,
        SOLVER__IMS_PER_BATCH=1,
    )
    loader = iter(trainer_of(cfg).build_train_loader(cfg))
    with pytest.raises(ValueError, match=r"2\.png has the label 2, but the model has 2 classes"):
        for _ in range(9):
            next(loader)


def test_labels_in_a_palette_are_ids(labels):
    ids = np.arange(24 * 32).reshape(24, 32).astype(np.uint8) % 3
    image = Image.fromarray(ids).convert("P")
    image.putpalette([9, 9, 9, 80, 80, 80, 200, 0, 0])
    image.putdata(ids.flatten().tolist())
    image.save(labels / "1.png")
    assert np.array_equal(load_labels(labels / "1.png"), ids)
    register_by_path([str(labels)])
    assert MetadataCatalog.get(str(labels)).stuff_classes == ["0", "1", "2"]


# --------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_become_8(tmp_path, suffix):
    values = np.arange(48 * 64).reshape(48, 64).astype(np.uint16) * 21
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    image = read_image(str(tmp_path / f"a.{suffix}"), "BGR")
    assert image.dtype == np.uint8 and image.shape == (48, 64, 3)
    assert np.array_equal(image, np.repeat((values // 256)[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"),
        ("L", "jpg"),
        ("LA", "png"),
        ("P", "png"),
        ("P", "gif"),
        ("RGBA", "png"),
        ("CMYK", "jpg"),
        ("RGB", "webp"),
    ],
)
def test_other_modes_are_read_as_detectron2_does(tmp_path, mode, suffix):
    random = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(random).resize((64, 48)).convert(mode)
    file = str(tmp_path / f"a.{suffix}")
    image.save(file)
    expected = detection_utils.read_image(file, "RGB")
    assert np.array_equal(read_image(file, "RGB"), expected)
    # As the reference of the reference: nearly the colours that were written.
    assert np.abs(expected.astype(int) - np.asarray(image.convert("RGB"))).mean() < 9


def test_first_frame_and_orientation(tmp_path):
    frames = [Image.new("L", (8, 4), value) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(str(tmp_path / "a.gif"), "RGB").max() == 10
    values = np.arange(12 * 20).reshape(12, 20).astype(np.uint16) * 256
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    turned = np.rot90(values // 256, -1)
    assert np.array_equal(read_image(str(tmp_path / "a.png"), "RGB")[..., 0], turned)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("hello"),
        _tear,
        lambda file: Image.fromarray(np.ones((4, 4), np.float32)).save(file, "TIFF"),
    ],
    ids=["empty", "text", "torn", "32 bits"],
)
def test_an_unreadable_image_is_named_or_skipped(
    tmp_path, tiny_data, tiny_opts, fails, capsys, caplog, spoil
):
    """With labels it ends the evaluation, without it is left out and counted."""
    file = Path(DatasetCatalog.get(tiny_data[1])[1]["file_name"])
    good = file.read_bytes()
    spoil(file)
    arguments = ["--config-file", EMBEDDED, *tiny_opts]
    message = fails(train_net, "--eval-only", *arguments)
    assert str(file) in message
    assert "cannot be read as an image" in message or "32-bit pixels" in message
    with pytest.raises(DataError, match=re.escape(str(file))):
        read_image(str(file), "RGB")

    expedit = ["MODEL.EXPEDIT.ALPHA", "1", "MODEL.EXPEDIT.RATIO", "0.5"]
    output = tmp_path / "pictures"
    draw.run(["--images", str(file.parent), "--output", str(output), *arguments, *expedit])
    assert f"3 pictures in {output}, 1 left out" in capsys.readouterr().out
    assert f"left out: {file} " in caplog.text
    assert len(list(output.iterdir())) == 3
    name = register_images(str(file.parent))
    assert len(DatasetCatalog.get(name)) == 3 and name.endswith(", 1 unreadable left out)")
    assert len(DatasetCatalog.get(register_images(str(file.parent), limit=2))) == 2
    file.write_bytes(good)
    assert len(DatasetCatalog.get(register_images(str(file.parent)))) == 4


def test_no_readable_image_at_all(tmp_path, tiny_opts, fails):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("hello")
    expedit = ["MODEL.EXPEDIT.ALPHA", "1", "MODEL.EXPEDIT.RATIO", "0.5"]
    arguments = ["--config-file", EMBEDDED, *tiny_opts, *expedit]
    message = fails(draw, "--images", tmp_path / "bad", *arguments)
    assert "no image at " in message and "can be read: " in message and "a.jpg" in message
    with pytest.raises(ValueError, match="no image at .* can be read: .*a.jpg"):
        register_images(str(tmp_path / "bad"))


def test_large_images(tmp_path, labels, monkeypatch):
    """Without labels they are reduced, as outputs have their size; with labels they are refused."""
    size = (2500, 1250)
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "large.jpg")
    image = read_image(str(tmp_path / "large.jpg"), "RGB", MAX_PIXELS)
    assert 0.99 * MAX_PIXELS < image.shape[0] * image.shape[1] <= MAX_PIXELS
    assert image.shape[1] / image.shape[0] == pytest.approx(2, rel=1e-2)
    assert np.abs(image.mean((0, 1)) - [10, 20, 30]).max() < 2
    record = {"file_name": str(tmp_path / "large.jpg")}

    def read(record):
        return {**record, "image": detection_utils.read_image(record["file_name"], "RGB")}

    sample = CheckedMapper(read)(record)
    assert sample["image"].shape == image.shape and sample["file_name"] == record["file_name"]
    assert CheckedMapper(read)({**record, "annotations": []})["image"].shape == (1250, 2500, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)
    with pytest.raises(DataError, match=r"large\.jpg has 1250 x 2500 pixels.*2,000,000"):
        CheckedMapper(read)({**record, "annotations": []})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    with pytest.raises(ValueError, match=r"0\.png has 24 x 32 pixels.*MAX_IMAGE_PIXELS"):
        register_by_path([str(labels)])


def test_defects_of_a_mapper_stay_defects(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png")}
    with pytest.raises(KeyError, match="nothing"):
        CheckedMapper(lambda record: record["nothing"])(record)
    with pytest.raises(DataError, match="there is no file .*b.png"):
        CheckedMapper(lambda record: record)({"file_name": str(tmp_path / "b.png")})
