"""Pictures of a report, drawn from a model or read from files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog

from ..comparison import Row, Workload
from ..data.images import find_images, load_image
from ..engine.interrupt import check_interrupt
from ..evaluation.agreement import image_key
from ..visualize import side_by_side

__all__ = ["Picture", "draw_pictures", "read_pictures"]


@dataclass(frozen=True)
class Picture:
    """A row of panels, such as those of `side_by_side`.

    Attributes:
        title: of the picture.
        panels: uint8 RGB (height, width, 3) by title.
    """

    title: str
    panels: Mapping[str, np.ndarray]


def draw_pictures(workload: Workload, row: Row, count: int) -> list[Picture]:
    """Draw images, clusters, predictions without and with token reduction, and their differences.

    Args:
        workload: the plain model and its images; the first ones and the one with the lowest
            agreement are drawn.
        row: the setting to draw.
        count: number of first images; 0: no pictures.

    Returns:
        One picture per image, of the most detailed kind of output.

    Raises:
        ValueError: for the row of the plain model, or a negative count.
        KeyboardInterrupt: between two images, after Ctrl-C.
    """
    if row.settings is None:
        raise ValueError(f"the row {row.name!r} has no settings to draw")
    if count < 0:
        raise ValueError(f"the number of pictures must be 0 or more, got {count}")
    metadata = MetadataCatalog.get(workload.dataset)
    worst, least = row.worst or (None, None)
    pictures = []
    for number, item in _first_and_worst(workload, count, worst):
        check_interrupt()
        title = f"Image {_name_of(item, number)}, setting {row.name}"
        if worst is not None and image_key(item) == worst:
            title += f": lowest agreement, {least:.1f} %"
        (panels,) = side_by_side(
            workload.model, row.settings, item, metadata, workload.color, all_kinds=False
        )
        pictures.append(Picture(title, panels))
    return pictures


def _first_and_worst(
    workload: Workload, count: int, worst: int | str | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and item of the first images and the worst one, once each."""
    if count == 0:
        return
    for number, (item,) in enumerate(workload.images(), start=1):
        is_worst = worst is not None and image_key(item) == worst
        if number <= count or is_worst:
            yield number, item
        if is_worst:
            worst = None
        if number >= count and worst is None:
            return


def _name_of(item: Mapping[str, Any], number: int) -> str:
    return Path(item["file_name"]).stem if "file_name" in item else f"{number}"


def read_pictures(paths: Sequence[str | Path]) -> list[Picture]:
    """Image files and sorted images of folders, each as a picture of one panel.

    Raises:
        FileNotFoundError: if there are no images.
        ValueError: if an image cannot be read.
    """
    files = [file for path in paths for file in find_images(path)]
    return [
        Picture(Path(file).stem, {"": np.asarray(load_image(file).convert("RGB"))})
        for file in files
    ]
