"""Whether a data set and a model have the same classes, asked before anything runs.

Detectron2 numbers the classes of a data set from 0, and so does a model: they mean the same only if
there are as many. Where they differ, Detectron2 stops at the end of the inference, or says nothing
and gives metrics of other classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.data import MetadataCatalog

__all__ = ["check_classes", "check_ids", "check_labels", "class_names"]

# What data sets of Detectron2's evaluator types have labels of; others may have any.
_WITHOUT_INSTANCES = frozenset(("sem_seg", "cityscapes_sem_seg", "depth"))


def class_names(dataset: str, of: str) -> Sequence[str] | None:
    """Names of a data set's classes by contiguous id; None if its metadata do not have them.

    Args:
        dataset: a registered data set.
        of: "thing" for instances, "stuff" for pixels, which have a class of any kind.
    """
    return MetadataCatalog.get(dataset).get(f"{of}_classes")


def check_labels(dataset: str, key: str, of: str) -> None:
    """Refuse a data set that is known to have no labels of a kind.

    Args:
        dataset: a registered data set.
        key: of the config, which names it.
        of: see `class_names`.

    Raises:
        ValueError: if it has none.
    """
    kind = MetadataCatalog.get(dataset).get("evaluator_type")
    if of == "thing" and kind in _WITHOUT_INSTANCES:
        raise ValueError(
            f"{key}: {dataset!r} has no instances (its labels are of the kind {kind!r}), which the "
            "model is about: give a COCO instance file or panoptic file"
        )
    things, stuff = class_names(dataset, "thing"), class_names(dataset, "stuff")
    if of == "stuff" and stuff is None and (things is not None or kind == "depth"):
        raise ValueError(
            f"{key}: {dataset!r} has no classes of pixels (its labels are of the kind {kind!r}), "
            "which the model is about: give a folder of label PNGs or a COCO panoptic file"
        )


def check_classes(dataset: str, key: str, of: str, classes: int, classes_key: str) -> None:
    """Refuse a data set that has not as many classes as the model.

    A folder of labels that lists no classes may have fewer: the model knows better than the largest
    id of its pixels. Nothing is said where the metadata of a data set have no classes.

    Args:
        dataset: a registered data set.
        key: of the config, which names it.
        of: see `class_names`.
        classes: of the model.
        classes_key: of the config, which says so.

    Raises:
        ValueError: with both numbers.
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
    """Refuse label pixels that are not a class.

    Args:
        file: that has them.
        labels: (H, W).
        classes: their number.
        ignore_label: of pixels without a class.
        whose: classes they are, for the message.

    Raises:
        ValueError: if there is such a pixel.
    """
    largest = labels.max(initial=0, where=labels != ignore_label)
    if largest >= classes:
        raise ValueError(
            f"{file} has the label {int(largest)}, but {whose} has {classes} classes: labels must "
            f"be below that, or {ignore_label}"
        )
