"""Pictures of a report: drawn from a model, or read from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog

from ..comparison import Row, Subject
from ..data.images import load_image
from ..visualize import side_by_side

__all__ = ["Picture", "draw_pictures", "read_pictures"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Picture:
    """Panels that belong together, such as what `side_by_side` gives for an image.

    Attributes:
        title: of them all.
        panels: title to uint8 RGB (height, width, 3).
    """

    title: str
    panels: Mapping[str, np.ndarray]


def draw_pictures(subject: Subject, row: Row, count: int) -> list[Picture]:
    """Images, clusters, predictions without and with token reduction, and where these differ.

    Args:
        subject: whose plain model runs on its first images; it is left as it was.
        row: its settings are drawn.
        count: of images.

    Returns:
        For each image one picture, of the output that says most where there are several.

    Raises:
        ValueError: for the row of the plain model.
    """
    if row.settings is None:
        raise ValueError(f"the row {row.name!r} has no settings to draw")
    metadata = MetadataCatalog.get(subject.dataset)
    pictures = []
    for number, (item,) in enumerate(subject.images(count), start=1):
        image = Path(item["file_name"]).stem if "file_name" in item else f"{number}"
        panels = side_by_side(subject.model, row.settings, item, metadata, subject.color)[-1]
        pictures.append(Picture(f"Image {image}, setting {row.name}", panels))
    return pictures


def read_pictures(paths: Sequence[str | Path]) -> list[Picture]:
    """Image files, and those in folders by name, each as a picture of one panel.

    Raises:
        FileNotFoundError: for a path that is not there.
        ValueError: for a folder without images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
            if not inside:
                raise ValueError(f"no images ({', '.join(_SUFFIXES)}) in the folder {str(path)!r}")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    pictures = []
    for file in files:
        pictures.append(Picture(file.stem, {"": np.asarray(load_image(file).convert("RGB"))}))
    return pictures
