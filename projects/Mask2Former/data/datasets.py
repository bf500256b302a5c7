"""Registers the data sets of official configs that Detectron2 does not register.

``coco_2017_{train,val}_panoptic_with_sem_seg``: COCO panoptic, with semantic PNGs, so that one
evaluation gives PQ, AP and mIoU. ``ade20k_panoptic_{train,val}``: ADE20K with its 150 classes.
``ade20k_instance_{train,val}``: its 100 things. Detectron2's own ``cityscapes_fine_instance_seg_*``
now name the package to install if one is missing.

The files are those of the official preparation scripts, in the folder of all data sets,
``$DETECTRON2_DATASETS``. Nothing is read before a data set is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES, COCO_CATEGORIES

from expedit_d2.data.panoptic import class_metadata, load_panoptic

__all__ = ["check_packages", "register_panoptic_datasets"]

# ADE20K classes without instances, by contiguous id.
_ADE20K_STUFF = frozenset(
    (0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59)
    + (60, 61, 63, 68, 77, 79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122)
    + (128, 131, 140, 141, 145)
)


def check_packages(dataset_name: str, *packages: str) -> None:
    """Check for packages that a data set needs and this project does not.

    Raises:
        ModuleNotFoundError: if one is missing; names it.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the data set {dataset_name!r} needs a package that is not installed: "
            f"pip install {' '.join(missing)}"
        )


def _load_checked(name: str, packages: Sequence[str], load: Callable[[], list]) -> list[dict]:
    check_packages(name, *packages)
    return load()


def _load_ade20k_instances(name: str) -> list[dict]:
    """COCO instances with our class names, independent of the file's category names."""
    meta = MetadataCatalog.get(name)
    records = load_coco_json(meta.json_file, meta.image_root)
    for annotation in chain.from_iterable(record["annotations"] for record in records):
        category = annotation["category_id"]
        annotation["category_id"] = meta.thing_dataset_id_to_contiguous_id[category]
    return records


def _register(
    name: str,
    load: Callable[[str], list[dict]],
    root: str,
    files: Mapping[str, str],
    **metadata: Any,
) -> None:
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, partial(load, name))
        paths = {key: os.path.join(root, path) for key, path in files.items()}
        MetadataCatalog.get(name).set(**paths, **metadata)


def register_panoptic_datasets(root: str | os.PathLike | None = None) -> None:
    """Register the data sets above; repeated calls have no effect.

    Args:
        root: the folder of all data sets; default ``$DETECTRON2_DATASETS`` or ``datasets``.
    """
    root = os.path.expanduser(root or os.getenv("DETECTRON2_DATASETS", "datasets"))
    ade20k = [
        {"id": i, "name": name, "isthing": i not in _ADE20K_STUFF}
        for i, name in enumerate(ADE20K_SEM_SEG_CATEGORIES)
    ]
    for split, folder in (("train", "training"), ("val", "validation")):
        _register(
            f"coco_2017_{split}_panoptic_with_sem_seg",
            load_panoptic,
            root,
            {
                "image_root": f"coco/{split}2017",
                "panoptic_root": f"coco/panoptic_{split}2017",
                "panoptic_json": f"coco/annotations/panoptic_{split}2017.json",
                "sem_seg_root": f"coco/panoptic_semseg_{split}2017",
                "json_file": f"coco/annotations/instances_{split}2017.json",
            },
            evaluator_type="coco_panoptic_seg",
            **class_metadata(COCO_CATEGORIES),
        )
        _register(
            f"ade20k_panoptic_{split}",
            load_panoptic,
            root,
            {
                "image_root": f"ADEChallengeData2016/images/{folder}",
                "panoptic_root": f"ADEChallengeData2016/ade20k_panoptic_{split}",
                "panoptic_json": f"ADEChallengeData2016/ade20k_panoptic_{split}.json",
                "sem_seg_root": f"ADEChallengeData2016/annotations_detectron2/{folder}",
                "json_file": f"ADEChallengeData2016/ade20k_instance_{split}.json",
            },
            evaluator_type="ade20k_panoptic_seg",
            **class_metadata(ade20k),
        )
        things = [c for c in ade20k if c["isthing"]]
        _register(
            f"ade20k_instance_{split}",
            _load_ade20k_instances,
            root,
            {
                "image_root": f"ADEChallengeData2016/images/{folder}",
                "json_file": f"ADEChallengeData2016/ade20k_instance_{split}.json",
            },
            evaluator_type="coco",
            thing_classes=[c["name"] for c in things],
            thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(things)},
        )
    for split in ("train", "val", "test"):
        name = f"cityscapes_fine_instance_seg_{split}"
        load = DatasetCatalog[name]
        if getattr(load, "func", None) is not _load_checked:
            needed = ("cityscapesscripts", "shapely")
            DatasetCatalog[name] = partial(_load_checked, name, needed, load)
