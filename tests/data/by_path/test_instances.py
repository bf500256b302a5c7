"""COCO instance files by path: the truth gets full marks; what is wrong with them is said."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from expedit_d2.data import register_by_path

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("catalogs")]


@pytest.fixture
def coco(tmp_path) -> Callable[[str, str], Path]:
    """Writes a two-category instance file with one image; returns a function of their places."""

    def write(file, image):
        for path in (tmp_path / file, tmp_path / image):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20)).save(tmp_path / image)
        annotation = {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4], "area": 12}
        content = {
            "images": [{"id": 7, "file_name": "a.png", "height": 20, "width": 30}],
            "annotations": [annotation | {"iscrowd": 0, "segmentation": [[1, 2, 4, 2, 4, 6]]}],
            "categories": [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}],
        }
        (tmp_path / file).write_text(json.dumps(content))
        return tmp_path / file

    return write


@pytest.mark.parametrize(
    "image", ["labels/a.png", "labels/images/a.png", "images/a.png", "val2017/a.png"]
)
def test_images_are_found_near_the_file(coco, tmp_path, image):
    name = str(coco("labels/instances_val2017.json", image))
    register_by_path([name, "coco_2017_val"])
    register_by_path([name])
    meta = MetadataCatalog.get(name)
    assert meta.thing_classes == ["cat", "dog"] and meta.evaluator_type == "coco"
    (record,) = DatasetCatalog.get(name)
    assert Path(record["file_name"]).resolve() == (tmp_path / image).resolve()
    assert record["annotations"][0]["category_id"] == 1


@pytest.mark.parametrize("given", ["{root}/far/aw@y", "far/aw@y"])
def test_the_image_folder_can_be_given(coco, tmp_path, given):
    name = f"{coco('x.json', 'far/aw@y/a.png')}@{given.format(root=tmp_path)}"
    register_by_path((name,))
    assert DatasetCatalog.get(name)[0]["file_name"] == str(tmp_path / "far" / "aw@y" / "a.png")


def test_names_of_another_kind_are_left_alone():
    before = DatasetCatalog.list()
    register_by_path(["collage_val", f"nothing_{uuid.uuid4().hex}", "folder/nothing"])
    assert DatasetCatalog.list() == before


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError) as error:
        register_by_path(["no/such.json"])
    for part in ("DATASETS.TEST", "DATASETS.TRAIN", "'no/such.json'", "does not exist", "valid"):
        assert part in str(error.value)


def test_missing_images_are_named(coco, tmp_path):
    file = coco("labels/instances.json", "elsewhere/a.png")
    with pytest.raises(FileNotFoundError, match=r"first image a\.png is not in .*labels.*images"):
        register_by_path([str(file)])
    with pytest.raises(FileNotFoundError, match="DATASETS.TEST"):
        register_by_path([f"{file}@{tmp_path / 'nowhere'}"])
    assert str(file) not in DatasetCatalog.list()


@pytest.mark.parametrize("text", ["{", "[]", '{"images": []}', '{"images": [{"id": 1}]}'])
def test_a_file_of_another_format_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="not a COCO instance"):
        register_by_path([str(tmp_path / "x.json")])
