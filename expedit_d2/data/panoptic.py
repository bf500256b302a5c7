"""COCO's panoptic format: class metadata, and semantic and instance labels derived from it.

A panoptic PNG implies the class of every pixel and the masks of things, but Detectron2 reads these
from files. `semantic_path` and `things_path` give them virtual paths, which Detectron2 opens
through ``PathManager``: semantic labels are rendered from the panoptic PNG each time they are
opened, and instance annotations are written to a cache on first use. Nothing is written next to the
data.

Shorthand: H x W pixels; a segment id is R + 256 G + 256² B of the PNG's colour.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from detectron2.data import Metadata, MetadataCatalog
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import file_lock
from panopticapi.utils import rgb2id
from PIL import Image
from pycocotools import mask as mask_util

from .content import file_digest
from .images import load_image

__all__ = [
    "class_metadata",
    "contiguous_segments",
    "load_panoptic",
    "semantic_path",
    "things_path",
    "write_things",
]

logger = logging.getLogger(__name__)

_SEMANTIC = "panoptic-semantic://"
_THINGS = "panoptic-things://"


# ------------------------------------------------------------------------------------- classes


def class_metadata(categories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Detectron2's metadata of classes that share one range of contiguous ids, in this order.

    ``thing_classes`` has the things only and ``stuff_classes`` all classes, as Detectron2's
    instance and semantic evaluators expect.

    Args:
        categories: with ``id``, ``name``, ``isthing`` and, all or none, ``color``.
    """
    things = [c for c in categories if c["isthing"]]
    metadata: dict[str, Any] = {
        "thing_classes": [c["name"] for c in things],
        "stuff_classes": [c["name"] for c in categories],
        "thing_dataset_id_to_contiguous_id": {
            c["id"]: i for i, c in enumerate(categories) if c["isthing"]
        },
        "stuff_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
        # With more classes, 255 is one of them.
        "ignore_label": 255 if len(categories) <= 255 else 65535,
        "label_divisor": 1000,
    }
    if all("color" in c for c in categories):
        metadata["thing_colors"] = [c["color"] for c in things]
        metadata["stuff_colors"] = [c["color"] for c in categories]
    return metadata


def contiguous_segments(
    segments: Sequence[Mapping[str, Any]], meta: Metadata
) -> list[dict[str, Any]]:
    """``segments_info`` with contiguous ``category_id`` and with ``isthing``."""
    classes = meta.stuff_dataset_id_to_contiguous_id
    things = meta.thing_dataset_id_to_contiguous_id
    return [
        {**s, "category_id": classes[s["category_id"]], "isthing": s["category_id"] in things}
        for s in segments
    ]


def load_panoptic(name: str) -> list[dict[str, Any]]:
    """Records of a registered panoptic data set, with contiguous class ids.

    The metadata have the paths: ``panoptic_json``, ``panoptic_root``, ``image_root`` and, if
    semantic PNGs exist, ``sem_seg_root``; otherwise semantic labels come from `semantic_path`.
    """
    meta = MetadataCatalog.get(name)
    with PathManager.open(meta.panoptic_json) as file:
        content = json.load(file)
    images = {image["id"]: image for image in content.get("images", ())}
    sem_seg_root = meta.get("sem_seg_root")
    records = []
    for annotation in content["annotations"]:
        png = annotation["file_name"]
        image = images.get(annotation["image_id"], {})
        # Without a list of images, they are assumed to be named like the PNGs, as in COCO.
        image_name = image.get("file_name", os.path.splitext(png)[0] + ".jpg")
        pan_seg = os.path.join(meta.panoptic_root, png)
        segments = contiguous_segments(annotation["segments_info"], meta)
        if sem_seg_root is None:
            sem_seg = semantic_path(pan_seg, segments, meta.ignore_label)
        else:
            sem_seg = os.path.join(sem_seg_root, png)
        size = {side: image[side] for side in ("height", "width") if side in image}
        records.append(
            {
                "file_name": os.path.join(meta.image_root, image_name),
                "image_id": annotation["image_id"],
                "pan_seg_file_name": pan_seg,
                "sem_seg_file_name": sem_seg,
                "segments_info": segments,
                **size,
            }
        )
    return records


def _read_ids(png: str | os.PathLike) -> np.ndarray:
    """Segment ids (H, W) of a panoptic PNG."""
    return rgb2id(np.asarray(load_image(png).convert("RGB")))


# ------------------------------------------------------------------------------ semantic labels


def semantic_path(png: str, segments: Sequence[Mapping[str, Any]], ignore_label: int) -> str:
    """Virtual path of the semantic PNG of a panoptic PNG, rendered when it is opened.

    Crowds get their class, as in COCO's official semantic labels. The path contains everything that
    is needed to open it in any process.

    Args:
        png: the panoptic PNG.
        segments: with ``id`` and contiguous ``category_id``.
        ignore_label: label of pixels without a segment.
    """
    classes = "&".join(f"{s['id']}={s['category_id']}" for s in segments)
    return f"{_SEMANTIC}{png}?{ignore_label}&{classes}"


class _SemanticHandler(PathHandler):
    """Opens the paths of `semantic_path`."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_SEMANTIC]

    def _open(
        self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any
    ) -> IO[str] | IO[bytes]:
        self._check_kwargs(kwargs)
        if mode != "rb":
            raise ValueError(f"{path} can only be opened as 'rb', got {mode!r}")
        png, _, values = path.removeprefix(_SEMANTIC).rpartition("?")
        ignore, _, classes = values.partition("&")
        ids = _read_ids(png)
        labels = np.full(ids.shape, int(ignore), np.uint8 if int(ignore) < 256 else np.uint16)
        for pair in filter(None, classes.split("&")):
            segment, category = map(int, pair.split("="))
            labels[ids == segment] = category
        file = io.BytesIO()
        Image.fromarray(labels).save(file, "PNG", compress_level=0)
        file.seek(0)
        return file


# --------------------------------------------------------------------------------------- things


def things_path(panoptic_json: str | os.PathLike, panoptic_root: str | os.PathLike) -> str:
    """Virtual path of a COCO instance file with the things of a panoptic file, for ``json_file``.

    ``PathManager.get_local_path``, called by Detectron2's COCOEvaluator, writes the file on first
    use to ``$DETECTRON2_DATASETS/by_path``.
    """
    return f"{_THINGS}{panoptic_json}?{panoptic_root}"


def write_things(panoptic_json: Path, panoptic_root: Path, target: Path) -> None:
    """Write the things of a panoptic file as COCO instances, atomically.

    Category ids and crowds are kept; masks become run lengths.
    """
    content = json.loads(panoptic_json.read_text())
    things = {c["id"]: c for c in content["categories"] if c["isthing"]}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    images, instances = [], []
    for annotation in content["annotations"]:
        ids = _read_ids(panoptic_root / annotation["file_name"])
        image_id = annotation["image_id"]
        height, width = ids.shape
        images.append(
            {"id": image_id, "file_name": files[image_id], "height": height, "width": width}
        )
        for segment in annotation["segments_info"]:
            if segment["category_id"] not in things:
                continue
            code = mask_util.encode(np.asfortranarray(ids == segment["id"], dtype=np.uint8))
            instances.append(
                {
                    "id": len(instances) + 1,  # to pycocotools, 0 means no match
                    "image_id": image_id,
                    "category_id": segment["category_id"],
                    "iscrowd": int(segment["iscrowd"]),
                    "area": int(mask_util.area(code)),
                    "bbox": mask_util.toBbox(code).tolist(),
                    "segmentation": {**code, "counts": code["counts"].decode()},
                }
            )
    draft = target.with_suffix(f".{os.getpid()}")
    draft.write_text(
        json.dumps({"images": images, "annotations": instances, "categories": [*things.values()]})
    )
    os.replace(draft, target)


def _cache_file(panoptic_json: Path, panoptic_root: Path) -> Path:
    """Cache file, named by a hash of the contents of the JSON file and its PNGs."""
    content = json.loads(panoptic_json.read_text())
    files = [panoptic_json, *(panoptic_root / a["file_name"] for a in content["annotations"])]
    digest = hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()[:12]
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    return root / "by_path" / f"{panoptic_json.stem}-{digest}.json"


class _ThingsHandler(PathHandler):
    """Opens the paths of `things_path`."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_THINGS]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        source, _, root = path.removeprefix(_THINGS).rpartition("?")
        target = _cache_file(Path(source), Path(root))
        with file_lock(str(target)):
            if force or not target.is_file():
                logger.info("Writing the instance masks of %s to %s", source, target)
                write_things(Path(source), Path(root), target)
        return str(target)

    def _open(
        self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any
    ) -> IO[str] | IO[bytes]:
        return open(self._get_local_path(path, **kwargs), mode, buffering)


PathManager.register_handler(_SemanticHandler())
PathManager.register_handler(_ThingsHandler())
