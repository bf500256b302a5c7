"""Validate the content of COCO files before Detectron2 and pycocotools read them.

Both ignore some errors, which then corrupt the metrics, and raise obscure exceptions for others,
some only after the whole inference; broken run lengths keep pycocotools busy for minutes. Only the
JSON is checked, each annotation once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["instances_problem", "panoptic_problem", "run_lengths"]

Content = Mapping[str, Any]

# Pixels; pycocotools takes very long for larger coordinates.
_FAR = 1e5


def instances_problem(content: Content) -> str | None:
    """What is wrong with an instance file, or None.

    Args:
        content: the JSON, with ``images`` and ``categories``; test sets have no ``annotations``.
    """
    problem = _images_problem(content, ("id", "file_name", "height", "width"))
    if problem or "annotations" not in content:
        return problem
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for image_id, size in sizes.items():
        if not all(type(side) is int and side > 0 for side in size):
            return (
                f"image {image_id!r} has height and width {size}, which must be positive integers"
            )
    if not isinstance(content["annotations"], list):
        return "its annotations are not a list"
    classes = {category["id"] for category in content["categories"]}
    seen: set[Any] = set()
    for number, annotation in enumerate(content["annotations"]):
        try:
            problem = _annotation_problem(annotation, sizes, classes)
            if annotation["id"] in seen:
                problem = "has the same id as another annotation"
            seen.add(annotation["id"])
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError):
            return f"annotation number {number} is malformed: {str(annotation)[:200]}"
        if problem:
            return f"annotation {annotation['id']!r} of image {annotation['image_id']!r} {problem}"
    return None


def panoptic_problem(content: Content) -> str | None:
    """What is wrong with a panoptic file, or None."""
    problem = _images_problem(content, ("id", "file_name"))
    if problem:
        return problem
    for category in content["categories"]:
        if "isthing" not in category:
            return f"the category {category['name']!r} has no 'isthing'"
    classes = {c["id"] for c in content["categories"]}
    images = {image["id"]: image["file_name"] for image in content["images"]}
    seen: set[str] = set()
    for number, annotation in enumerate(content["annotations"]):
        try:
            problem = _segments_problem(annotation, images, classes, seen)
        except (TypeError, KeyError, AttributeError):
            return f"annotation number {number} is malformed: {str(annotation)[:200]}"
        if problem:
            return problem
    return None


def _images_problem(content: Content, keys: Sequence[str]) -> str | None:
    """What is wrong with images and categories, or None."""
    for what, needed in (("images", keys), ("categories", ("id", "name"))):
        try:
            for number, item in enumerate(content[what]):
                for key in needed:
                    if key not in item:
                        return f"number {number} of its {what} has no {key!r}"
            duplicate = _duplicate(item["id"] for item in content[what])
        except TypeError:
            return f"its {what} are malformed"
        if duplicate:
            return f"two of its {what} have the id {duplicate[0]!r}"
    for image in content["images"]:
        if not isinstance(image["file_name"], str):
            return f"image {image['id']!r} has the file_name {image['file_name']!r}"
    return None


def _duplicate(values: Iterable[Any]) -> list[Any]:
    """A list with the first value that occurs twice, or an empty list."""
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            return [value]
        seen.add(value)
    return []


def _annotation_problem(
    annotation: Mapping[str, Any], sizes: Mapping[Any, tuple[int, int]], classes: set[Any]
) -> str | None:
    size = sizes.get(annotation["image_id"])
    if size is None:
        return "belongs to an image that is not among the images"
    if annotation["category_id"] not in classes:
        return f"has category_id {annotation['category_id']!r}, which is not among the categories"
    box = annotation["bbox"]
    if len(box) != 4 or not math.isfinite(sum(box)):
        return f"has the box {box}, which must be four numbers: x, y, width and height"
    if box[2] < 0 or box[3] < 0:
        return f"has a box of negative size, {box}, which must be x, y, width and height"
    if annotation.get("ignore"):
        return "has a true 'ignore', which Detectron2 does not support: remove the annotation"
    shape = annotation.get("segmentation")
    if not shape:
        return None
    return _mask_problem(shape, size) if isinstance(shape, dict) else _polygon_problem(shape)


def _polygon_problem(polygons: Sequence[Sequence[float]]) -> str | None:
    for polygon in polygons:
        if len(polygon) % 2 or len(polygon) < 6:
            return (
                f"has a polygon of {len(polygon)} numbers, which must be x and y of three points "
                "or more"
            )
        # A sum is finite only if all of its terms are.
        if not math.isfinite(sum(polygon)) or max(polygon) > _FAR or min(polygon) < -_FAR:
            return "has a polygon with a point far outside of any image"
    return None


# --------------------------------------------------------------------------------- run lengths


def _mask_problem(mask: Mapping[str, Any], size: tuple[int, int]) -> str | None:
    if tuple(mask["size"]) != size:
        return f"has a mask of {tuple(mask['size'])}, but its image has {size} (height, width)"
    counts = mask["counts"]
    if isinstance(counts, str):
        counts = run_lengths(counts)
        if counts is None:
            return "has a broken run-length mask: its string is not pycocotools' encoding"
        total, least = int(counts.sum()), int(counts.min())
    else:
        if not all(type(count) is int for count in counts):
            return "has a run-length mask whose counts are not all integers"
        total, least = sum(counts), min(counts, default=0)
    if least < 0 or total != size[0] * size[1]:
        return (
            f"has a broken run-length mask: its counts must not be negative and must add up to the "
            f"{size[0] * size[1]} pixels of the image, got {total}"
        )
    return None


def run_lengths(code: str) -> np.ndarray | None:
    """Run lengths (R,) int64 of a compressed mask; None if the string is not a valid encoding.

    Each character has five bits of a number, low bits first, and a continuation bit; the highest
    bit of the last character is the sign. From the fourth number on, runs are stored as differences
    from the run two before.
    """
    try:
        bits = np.frombuffer(code.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not bits.size or bits.min() < 0 or bits.max() > 63 or bits[-1] & 32:
        return None
    ends = np.flatnonzero(bits & 32 == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 7:  # more than 32 bits
        return None
    shifts = 5 * (np.arange(bits.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((bits & 31) << shifts, starts)
    runs -= np.where(bits[ends] & 16, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


# ------------------------------------------------------------------------------------- panoptic


def _segments_problem(
    annotation: Mapping[str, Any],
    images: Mapping[Any, str],
    classes: set[Any],
    seen: set[str],
) -> str | None:
    """What is wrong with the segments of an image; ``seen`` has the names of previous images."""
    image_id = annotation["image_id"]
    if image_id not in images:
        return f"an annotation has image_id {image_id!r}, which is not among the images"
    if not isinstance(annotation["file_name"], str):
        return f"the annotation of image {image_id!r} has file_name {annotation['file_name']!r}"
    for segment in annotation["segments_info"]:
        for key in ("id", "category_id", "area", "iscrowd"):
            if key not in segment:
                return f"a segment of image {image_id!r} has no {key!r}"
        if segment["category_id"] not in classes:
            return (
                f"a segment of image {image_id!r} has category_id {segment['category_id']!r}, "
                "which is not among the categories"
            )
    duplicate = _duplicate(segment["id"] for segment in annotation["segments_info"])
    if duplicate:
        return f"two segments of image {image_id!r} have the id {duplicate[0]!r}"
    # Detectron2 writes all predictions to one folder, with these names.
    stem = Path(images[image_id]).stem
    if stem in seen:
        return f"two annotations have images named {stem!r}"
    seen.add(stem)
    return None
