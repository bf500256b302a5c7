"""Data sets by path: what ``DATASETS.TRAIN`` and ``DATASETS.TEST`` may say besides names.

One form for all of them, the labels first::

    LABELS[@IMAGES[@PNGS]]

- ``instances.json`` or ``instances.json@images``: a COCO instance file;
- ``panoptic.json``, ``panoptic.json@images`` or ``panoptic.json@images@pngs``: a COCO panoptic
  file, recognised by its content; ``panoptic.json@@pngs`` leaves the images to be found;
- ``labels`` or ``labels@images``: a folder of PNGs, at any depth, whose pixels are class ids, 255
  ignored, and of images under the same names. The classes are those of ``classes.txt`` (a name a
  line) or ``classes.json`` (a list of names) in it, or as many as the largest id says.

Folders that are not given are looked for near the labels, in COCO's layout and others; those that
are may start from the folder of the labels.
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
    """Registers every name that is a path in one of the forms above.

    Panoptic records have ``pan_seg_file_name``, ``segments_info`` and ``sem_seg_file_name``, the
    last one drawn on the fly; their metadata give PQ, mask AP (of the things) and mIoU. Metadata of
    a folder have ``counted_classes``, true where nothing lists its classes. Names that are
    registered already, or that are no path, are left alone: a path is a name that ends in
    ``.json``, contains ``@`` or is a folder.

    Files are checked as far as that takes no time: all of a JSON file's content, that every image
    and label is there, and the sizes in their headers.

    Args:
        names: the values of ``DATASETS.TRAIN`` or ``DATASETS.TEST``.
        key: of the config, for messages.

    Raises:
        FileNotFoundError: when labels, images or PNGs are not there.
        ValueError: when they are of another format, broken, or do not fit each other.
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
    """Labels, None when the name is not a path, and what follows the first ``@`` after them."""
    if ".json@" in name:
        file, given = name.split(".json@", 1)
        return Path(file + ".json").expanduser(), given
    whole = Path(name).expanduser()
    if name.endswith(".json") or whole.is_dir():
        return whole, ""
    folder, at, given = name.partition("@")
    return (Path(folder).expanduser() if at else None), given
