"""Small data sets on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.small_data import annotation, box_mask, compressed


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
