"""Data sets by path, as values of ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

They are given as::

    LABELS[@IMAGES[@PNGS]]

- ``instances.json`` or ``instances.json@images``: a COCO instance file;
- ``panoptic.json``, ``panoptic.json@images`` or ``panoptic.json@images@pngs``: a COCO panoptic
  file, recognised by its content; ``panoptic.json@@pngs`` gives only the folder of the PNGs;
- ``labels`` or ``labels@images``: a folder of PNGs, at any depth, whose pixels are class ids (255
  is ignored), and a folder of images with the same names. Class names are read from ``classes.txt``
  (one per line) or ``classes.json`` (a list) in the folder of labels; without these, classes are
  numbered up to the largest id.

Folders that are not given are searched for near the labels, in COCO's and other layouts. Given
folders may be relative to the current folder or to the folder of the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog

from .coco_files import register_coco
from .label_folder import register_folder

__all__ = ["register_by_path"]

_VALID = (
    "valid are a registered name, `instances.json[@images]`, `panoptic.json[@images[@pngs]]` or "
    "`label_folder[@images]`, each a path"
)


def register_by_path(names: Sequence[str], key: str = "DATASETS.TEST or DATASETS.TRAIN") -> None:
    """Register all names that are paths in one of the forms above.

    Panoptic records have ``pan_seg_file_name``, ``segments_info`` and ``sem_seg_file_name``
    (rendered on the fly), and metadata for PQ, mask AP (of the things) and mIoU. Metadata of a
    label folder have ``counted_classes``, true if no file lists its classes. Registered names, and
    names that are not paths, are ignored: a path ends in ``.json``, contains ``@`` or is a folder.

    Only fast checks are made: the content of JSON files, the existence of all images and labels,
    and the sizes in their headers.

    Args:
        names: values of ``DATASETS.TRAIN`` or ``DATASETS.TEST``.
        key: config key, for error messages.

    Raises:
        FileNotFoundError: if labels, images or PNGs are missing.
        ValueError: if they have the wrong format, are broken, or do not match each other.
    """
    for name in names:
        if name in DatasetCatalog.list():
            continue
        labels, given = _split(name)
        if labels is None:
            continue
        try:
            if labels.suffix == ".json":
                register_coco(name, labels, given)
            else:
                register_folder(name, labels, given)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{key} names {name!r}, but {error}; {_VALID}") from error
        except ValueError as error:
            raise ValueError(f"{key} names {name!r}, but {error}") from error


def _split(name: str) -> tuple[Path | None, str]:
    """Path of the labels (None if the name is not a path), and what follows the ``@`` after it."""
    if ".json@" in name:
        file, given = name.split(".json@", 1)
        return Path(file + ".json").expanduser(), given
    whole = Path(name).expanduser()
    if name.endswith(".json") or whole.is_dir():
        return whole, ""
    folder, at, given = name.partition("@")
    return (Path(folder).expanduser() if at else None), given
