"""Check before a run that a data set and a model have the same classes.

Detectron2 numbers the classes of data sets and models from 0, so they can match only if their
numbers are equal. Otherwise Detectron2 fails after the inference, or silently evaluates the wrong
classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.data import MetadataCatalog

__all__ = ["check_classes", "check_ids", "check_labels", "class_names"]

# Evaluator types of Detectron2 whose data sets have no instances.
_WITHOUT_INSTANCES = frozenset(("sem_seg", "cityscapes_sem_seg", "depth"))


def class_names(dataset: str, of: str) -> Sequence[str] | None:
    """Class names of a data set by contiguous id; None if its metadata lack them.

    Args:
        dataset: a registered data set.
        of: "thing" for instances, "stuff" for the classes of pixels, which include things.
    """
    return MetadataCatalog.get(dataset).get(f"{of}_classes")


def check_labels(dataset: str, key: str, of: str) -> None:
    """Refuse a data set that is known to lack labels of a kind.

    Args:
        dataset: a registered data set.
        key: config key that names it, for error messages.
        of: see `class_names`.

    Raises:
        ValueError: if it lacks them.
    """
    kind = MetadataCatalog.get(dataset).get("evaluator_type")
    if of == "thing" and kind in _WITHOUT_INSTANCES:
        raise ValueError(
            f"{key}: {dataset!r} has no instances (its evaluator_type is {kind!r}), which the "
            "model predicts: give a COCO instance file or panoptic file"
        )
    things, stuff = class_names(dataset, "thing"), class_names(dataset, "stuff")
    if of == "stuff" and stuff is None and (things is not None or kind == "depth"):
        raise ValueError(
            f"{key}: {dataset!r} has no classes of pixels (its evaluator_type is {kind!r}), which "
            "the model predicts: give a folder of label PNGs or a COCO panoptic file"
        )


def check_classes(dataset: str, key: str, of: str, classes: int, classes_key: str) -> None:
    """Refuse a data set whose number of classes differs from the model's.

    A label folder without a list of classes may have fewer, as its largest id may not occur. Data
    sets whose metadata have no classes are accepted.

    Args:
        dataset: a registered data set.
        key: config key that names it, for error messages.
        of: see `class_names`.
        classes: number of classes of the model.
        classes_key: config key of that number, for error messages.

    Raises:
        ValueError: if the numbers differ; names both.
    """
    names = class_names(dataset, of)
    if names is None or len(names) == classes:
        return
    if MetadataCatalog.get(dataset).get("counted_classes", False) and len(names) < classes:
        return
    kind = "thing classes" if of == "thing" and class_names(dataset, "stuff") else "classes"
    raise ValueError(
        f"{key}: {dataset!r} has {len(names)} {kind}, but the model has {classes} ({classes_key}); "
        "they must be the same classes in the same order"
    )


def check_ids(file: str, labels: np.ndarray, classes: int, ignore_label: int, whose: str) -> None:
    """Refuse labels that are not class ids.

    Args:
        file: file of the labels, for error messages.
        labels: (H, W).
        classes: number of classes.
        ignore_label: label of pixels without a class.
        whose: what has these classes, for error messages.

    Raises:
        ValueError: if a label is neither a class id nor ``ignore_label``.
    """
    largest = labels.max(initial=0, where=labels != ignore_label)
    if largest >= classes:
        raise ValueError(
            f"{file} has the label {int(largest)}, but {whose} has {classes} classes: labels must "
            f"be below that, or {ignore_label}"
        )
