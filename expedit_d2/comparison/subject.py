"""What is compared: a plain model, the images it runs on, and how its output is judged."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from PIL import Image
from torch import nn

from ..data.images import DataError, check_image
from .store import fingerprint

__all__ = ["Subject", "find_images", "register_images"]

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent.parent
#: Code that numbers depend on: results of other versions of it are not taken over.
_CODE = ("*.py", "methods/*.py", "adapters/*.py", "backbones/*.py")


@dataclass(frozen=True)
class Subject:
    """A plain model and its data.

    Attributes:
        name: for tables, such as the name of the config.
        model: plain, in evaluation mode, on its device.
        dataset: name of the data set.
        loader: Detectron2's test loader, batch 1; it has a length.
        make_evaluator: makes the task's evaluator, anew for each setting; None without labels.
        config: a text that differs where the model or its input does.
        color: "RGB" or "BGR", of the images.
        limit: only the first images; these have agreement and no metrics, as Detectron2's
            evaluators want the whole set. None: all of them.
    """

    name: str
    model: nn.Module
    dataset: str
    loader: Iterable[list[dict[str, Any]]]
    make_evaluator: Callable[[], DatasetEvaluator] | None
    config: str = ""
    color: str = "BGR"
    limit: int | None = None

    def __len__(self) -> int:
        return len(self.loader) if self.limit is None else min(self.limit, len(self.loader))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def images(self, count: int | None = None) -> Iterable[list[dict[str, Any]]]:
        """The first images, each in a batch of its own; all of the subject's for None."""
        return islice(self.loader, len(self) if count is None else min(count, len(self)))

    @property
    def evaluator(self) -> Callable[[], DatasetEvaluator] | None:
        """`make_evaluator` where there are metrics."""
        whole = self.limit is None or self.limit >= len(self.loader)
        return self.make_evaluator if whole else None

    @cached_property
    def fingerprint(self) -> str:
        """Of code, config, weights, data set and number of images."""
        code = hashlib.sha256()
        for pattern in _CODE:
            for path in sorted(_PACKAGE.glob(pattern)):
                code.update(path.read_bytes())
        weights = hashlib.sha256()
        for key, tensor in self.model.state_dict().items():
            weights.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            weights.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        judged = self.evaluator is not None
        return fingerprint(
            code.hexdigest(), self.config, weights.hexdigest(), self.dataset, len(self), judged
        )


def find_images(where: str) -> list[str]:
    """Image files in a folder, or those that a pattern names, in order.

    Raises:
        FileNotFoundError: if there is none.
    """
    if has_magic(where) and not Path(where).exists():
        files = [path for path in glob(where, recursive=True) if Path(path).is_file()]
    elif Path(where).is_dir():
        known = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        paths = (path for path in Path(where).iterdir() if path.suffix.lower() in known)
        files = [str(path) for path in paths]
    else:
        files = [where] if Path(where).is_file() else []
    if not files:
        raise FileNotFoundError(f"there are no images at {where!r}")
    return sorted(files)


def register_images(where: str, limit: int | None = None) -> str:
    """Register images without labels as a data set; returns its name, which tells them apart.

    Images that cannot be read are left out and logged, and the name says how many there are.

    Args:
        where: a folder or a pattern.
        limit: only the first images that can be read; None: all of them.

    Raises:
        FileNotFoundError: if there is no image.
        ValueError: if none can be read.
    """
    files: list[str] = []
    unreadable: list[str] = []
    for path in find_images(where):
        if len(files) == limit:
            break
        try:
            check_image(path)
            files.append(path)
        except DataError as error:
            logger.warning("left out: %s", error)
            unreadable.append(str(error))
    if not files:
        raise ValueError(f"no image at {where!r} can be read: {unreadable[0]}")
    records = [{"file_name": path, "image_id": path} for path in files]
    stamps = [(path, Path(path).stat().st_size) for path in files]
    left_out = f", {len(unreadable)} unreadable left out" if unreadable else ""
    name = f"{where} ({fingerprint(stamps)[:8]}{left_out})"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, lambda: [dict(record) for record in records])
    return name
