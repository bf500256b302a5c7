"""Images and label PNGs that cannot be read are named."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from PIL import Image

from expedit_d2.comparison import register_images
from expedit_d2.data import register_by_path
from expedit_d2.data.images import MAX_PIXELS, DataError, load_labels, read_image
from expedit_d2.data.mapper import CheckedMapper
from expedit_d2.projects import trainer_of
from support.detector import train_net
from support.repository import VITDET, load_tool
from support.small_data import tiny_config

draw = load_tool("draw")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("catalogs")]


def _tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


BROKEN_LABELS = {
    "torn": (_tear, r"1\.png cannot be read as an image"),
    "text": (lambda file: file.write_text("hello"), r"1\.png cannot be read as an image"),
    "colours": (
        lambda file: Image.new("RGB", (32, 24)).save(file),
        r"1\.png has colours \(mode RGB\), but its pixels must be class ids",
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
    arguments = ["--config-file", VITDET, *tiny_opts]
    message = fails(train_net, "--eval-only", *arguments)
    assert str(file) in message
    assert "cannot be read as an image" in message or "32-bit pixels" in message
    with pytest.raises(DataError, match=re.escape(str(file))):
        read_image(str(file), "RGB")

    expedit = ["MODEL.EXPEDIT.ALPHA", "1", "MODEL.EXPEDIT.RATIO", "0.5"]
    output = tmp_path / "pictures"
    draw.run(["--images", str(file.parent), "--output", str(output), *arguments, *expedit])
    assert f"3 pictures in {output}, 1 skipped" in capsys.readouterr().out
    assert f"skipped: {file} " in caplog.text
    assert len(list(output.iterdir())) == 3
    name = register_images(str(file.parent))
    assert len(DatasetCatalog.get(name)) == 3 and name.endswith(", 1 unreadable skipped)")
    assert len(DatasetCatalog.get(register_images(str(file.parent), limit=2))) == 2
    file.write_bytes(good)
    assert len(DatasetCatalog.get(register_images(str(file.parent)))) == 4


def test_no_readable_image_at_all(tmp_path, tiny_opts, fails):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("hello")
    expedit = ["MODEL.EXPEDIT.ALPHA", "1", "MODEL.EXPEDIT.RATIO", "0.5"]
    arguments = ["--config-file", VITDET, *tiny_opts, *expedit]
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
    with pytest.raises(DataError, match="the file .*b.png does not exist"):
        CheckedMapper(lambda record: record)({"file_name": str(tmp_path / "b.png")})
