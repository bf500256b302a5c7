"""Folders of label PNGs by path: the truth gets full marks; what is wrong with them is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from expedit_d2.data import register_by_path
from support.scenes import (
    SCENES,
    evaluate,
    evaluate_random,
    perfect,
    semantic,
    write_image,
    write_labels,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("catalogs")]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Label PNGs one folder down; images beside, in ``images``."""
    for name, scene in SCENES.items():
        write_labels(tmp_path / "labels" / "val" / "town" / f"{name[:-4]}.png", semantic(scene))
        write_image(tmp_path / "images" / "val" / "town" / name, scene)
    return tmp_path / "labels" / "val"


@pytest.mark.parametrize("given", ["", "@{root}/images/val", "@../images/val"])
def test_semantic_folders(folder, tmp_path, given):
    name = f"{folder}{given.format(root=tmp_path)}"
    register_by_path([name])
    assert MetadataCatalog.get(name).stuff_classes == ["0", "1", "2", "3"]
    assert evaluate(name, SCENES, 4, tmp_path, ("SEMANTIC",)) == perfect("mIoU")
    assert set(evaluate_random(name, 4, tmp_path, ("SEMANTIC",))) == {"mIoU"}


@pytest.mark.parametrize("file", ["classes.txt", "classes.json"])
def test_names_of_classes_may_be_listed(folder, tmp_path, file):
    names = ["cat", "sky", "dog", "road", "unseen"]
    text = "\n".join(names) + "\n" if file.endswith("txt") else json.dumps(names)
    (folder / file).write_text(text)
    register_by_path([str(folder)])
    assert MetadataCatalog.get(str(folder)).stuff_classes == names
    assert evaluate(str(folder), SCENES, 5, tmp_path, ("SEMANTIC",)) == perfect("mIoU")


def test_labels_and_images_of_one_folder(tmp_path):
    for name, scene in SCENES.items():
        write_labels(tmp_path / f"{name[:-4]}.png", semantic(scene))
        write_image(tmp_path / name, scene)
    register_by_path([str(tmp_path)])
    records = DatasetCatalog.get(str(tmp_path))
    assert [Path(r["file_name"]).name for r in records] == ["0.jpg", "1.jpg"]


def test_labels_that_are_no_classes_are_refused(folder, tmp_path):
    (folder / "classes.txt").write_text("cat\nsky\n")
    register_by_path([str(folder)])
    with pytest.raises(ValueError, match="has the label 3, but .* has 2 classes"):
        known = {k: [s for s in scene if s.category < 2] for k, scene in SCENES.items()}
        evaluate(str(folder), known, 2, tmp_path, ("SEMANTIC",))
    with pytest.raises(ValueError, match="has 2 classes, but the model has 9 .*NUM_CLASSES"):
        evaluate(str(folder), SCENES, 9, tmp_path, ("SEMANTIC",))


def test_broken_folders_are_named(folder, tmp_path):
    def refuses(name, error, match):
        valid = ".*valid are" if error is FileNotFoundError else ""
        with pytest.raises(error, match=f"DATASETS.TEST or DATASETS.TRAIN.*{match}{valid}"):
            register_by_path([name])

    refuses(f"{tmp_path}/nothing@images", FileNotFoundError, "nothing does not exist")
    refuses(f"{tmp_path}@{tmp_path}/nothing", FileNotFoundError, "no image in")
    (tmp_path / "empty").mkdir()
    refuses(f"{tmp_path}/empty", FileNotFoundError, "has no PNGs")
    (folder / "classes.json").write_text('{"0": "cat"}')
    refuses(str(folder), ValueError, "must list 1 to 255 names")
    (folder / "classes.json").write_text("{")
    refuses(str(folder), ValueError, "cannot be read")
    (folder / "classes.json").unlink()
    (tmp_path / "images" / "val" / "town" / "1.jpg").unlink()
    refuses(str(folder), FileNotFoundError, r"lacks the images of 1 labels, such as .*1\.png")
    write_image(folder / "town" / "0.png", SCENES["0.jpg"])
    refuses(str(folder), ValueError, "has colours")
