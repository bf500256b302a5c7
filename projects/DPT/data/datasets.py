"""Data sets of images with depth PNGs: KITTI (Eigen split), NYU Depth V2, and any list of files.

A list has an image and its depth on each line: ``image depth [focal]``, as in the splits of BTS and
AdaBins. Lines whose depth is ``None``, or with fewer words, are left out. A depth PNG has 16 bits,
a fixed number of values per metre, and 0 where depth is unknown. Nothing is read before a data set
is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from expedit_d2.data.images import load_labels

__all__ = [
    "depth_scale_of",
    "load_depth_list",
    "read_depth",
    "register_depth_datasets",
    "register_depth_list",
    "register_depth_lists",
]

# name -> folder, list, where its images and its depths start from, PNG values per metre
_KITTI = ("kitti_depth", "eigen_{}_files_with_gt.txt", "", "data_depth_annotated", 256.0)
_NYU = ("nyu_depth_v2", "nyudepthv2_{}_files_with_gt.txt")
_DATASETS = {
    "kitti_eigen_train": _KITTI,
    "kitti_eigen_test": _KITTI,
    "nyu_depth_v2_train": (*_NYU, "sync", "sync", 1000.0),
    "nyu_depth_v2_test": (*_NYU, "official_splits/test", "official_splits/test", 1000.0),
}


def load_depth_list(file: Path, images: Path, depths: Path) -> list[dict[str, Any]]:
    """Records with ``file_name``, ``image_id`` and ``depth_file_name``.

    Args:
        file: the list.
        images, depths: folders that its paths are relative to, also those with a leading slash.

    Raises:
        FileNotFoundError: if the list, or an image or depth in it, does not exist.
        ValueError: if nothing in the list has a depth.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no list {file}")
    pairs = [line.split()[:2] for line in file.read_text().splitlines()]
    pairs = [pair for pair in pairs if len(pair) == 2 and pair[1] != "None"]
    if not pairs:
        raise ValueError(f"no line of {file} is of the form `image depth [focal]`")
    records = [
        {
            "file_name": str(images / image.lstrip("/")),
            "image_id": image.lstrip("/"),
            "depth_file_name": str(depths / depth.lstrip("/")),
        }
        for image, depth in pairs
    ]
    for key in ("file_name", "depth_file_name"):
        missing = [record[key] for record in records if not os.path.isfile(record[key])]
        if missing:
            raise FileNotFoundError(
                f"{file} names {missing[0]}, which does not exist: {len(missing)} of its "
                f"{len(records)} {'images' if key == 'file_name' else 'depths'} are missing"
            )
    return records


def register_depth_list(
    name: str, file: Path, images: Path, depths: Path, depth_scale: float
) -> None:
    """Register a list of files, unless the name is registered already.

    Args:
        name: of the data set.
        file, images, depths: see `load_depth_list`.
        depth_scale: PNG values per metre.
    """
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, partial(load_depth_list, file, images, depths))
        MetadataCatalog.get(name).set(depth_scale=depth_scale, evaluator_type="depth")


def register_depth_datasets() -> None:
    """``kitti_eigen_{train,test}`` and ``nyu_depth_v2_{train,test}`` in $DETECTRON2_DATASETS."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    for name, (folder, file, images, depths, scale) in _DATASETS.items():
        here, file = root / folder, file.format(name.rpartition("_")[2])
        register_depth_list(name, here / file, here / images, here / depths, scale)


def register_depth_lists(names: Iterable[str], depth_scale: float) -> None:
    """Register every name that is the path of a list (``.txt``) with paths relative to its folder.

    Args:
        names: the values of ``DATASETS.TRAIN`` or ``DATASETS.TEST``.
        depth_scale: PNG values per metre.
    """
    for name in names:
        if name.endswith(".txt"):
            file = Path(name).expanduser()
            register_depth_list(name, file, file.parent, file.parent, depth_scale)


def depth_scale_of(names: Iterable[str]) -> float:
    """PNG values per metre of registered data sets, which must agree.

    Raises:
        ValueError: if one of them has no depth, or their values differ.
    """
    scales = {name: MetadataCatalog.get(name).get("depth_scale") for name in names}
    for name, scale in scales.items():
        if scale is None:
            raise ValueError(f"DATASETS: {name!r} has no depth (no depth_scale in its metadata)")
    if len(set(scales.values())) > 1:
        raise ValueError(f"DATASETS: PNG values per metre differ: {scales}")
    return float(next(iter(scales.values())))


def read_depth(path: str, scale: float) -> np.ndarray:
    """A depth PNG in metres, float32 (H, W); 0 where depth is unknown.

    Args:
        path: of the PNG.
        scale: PNG values per metre.

    Raises:
        ValueError: if the file cannot be read, or has colours.
    """
    return load_labels(path).astype(np.float32) / scale
