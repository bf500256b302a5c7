"""What is wrong with a COCO file is one sentence that names it, before or instead of a number."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image
from pycocotools import mask as mask_util

from expedit_d2.data import register_by_path
from expedit_d2.data.coco_checks import run_lengths
from support.detector import train_net
from support.repository import VITDET
from support.small_data import box_mask, compressed, put

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("catalogs")]


BROKEN = {
    "unknown image": (
        put("image_id", 99),
        "annotation 2 of image 99 belongs to an image that is not",
    ),
    "image id twice": (put("id", 1, "images"), "two of its images have the id 1"),
    "category id twice": (put("id", 5, "categories"), "two of its categories have the id 5"),
    "annotation id twice": (put("id", 1), "annotation 1 of image 2 has the same id as another"),
    "unknown category": (put("category_id", 77), "annotation 2 of image 2 has category_id 77"),
    "negative box": (put("bbox", [2, 3, -10, 6]), r"a box of negative size, \[2, 3, -10, 6\]"),
    "three numbers": (put("bbox", [2, 3, 10]), r"the box \[2, 3, 10\], which must be four"),
    "box of NaN": (put("bbox", [2, 3, float("nan"), 6]), "must be four numbers"),
    "box of text": (put("bbox", ["2", 3, 10, 6]), "annotation number 1 is malformed"),
    "no box": (lambda c: c["annotations"][1].pop("bbox"), "annotation number 1 is malformed"),
    "odd polygon": (put("segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "a polygon of 7 numbers"),
    "two points": (put("segmentation", [[1, 2, 3, 4]]), "a polygon of 4 numbers"),
    "far away": (put("segmentation", [[1, 2, 3, 4, 1e9, 6]]), "a point far outside"),
    "ignored": (put("ignore", 1), "a true 'ignore'"),
    "mask of another size": (
        put("segmentation", compressed(box_mask(30, 20))),
        r"a mask of \(30, 20\), but its image has \(20, 30\)",
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
        "its string is not pycocotools",
    ),
    "code of huge runs": (
        put("segmentation", {"size": [20, 30], "counts": "oooooo?oooooo?"}),
        "a broken run-length mask",
    ),
    "no height": (
        lambda c: c["images"][1].pop("height"),
        "number 1 of its images has no 'height'",
    ),
    "no annotation at all": (
        lambda c: c.update(annotations=None),
        "its annotations are not a list",
    ),
    "wrong size": (put("width", 40, "images", 2), r"3\.png has 20 x 30 pixels.*are for 20 x 40"),
    "missing images": (
        lambda c: [image.update(file_name=f"x{i}.png") for i, image in enumerate(c["images"]) if i],
        r"2 of its 3 images are not in .*, such as x1\.png",
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
    arguments = ["--eval-only", "--config-file", VITDET]
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
