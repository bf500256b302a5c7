"""Workloads: a plain model, its images, and its evaluator."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from ..data.images import DataError, check_image, find_images
from ..files import digest_tensors
from ..files.shipped import CODE
from ..predictions import PREDICTIONS
from .origin import code_digest, data_digest, sources, versions
from .store import fingerprint

__all__ = ["Workload", "image_name", "register_images"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workload:
    """A plain model and its data.

    Attributes:
        name: in tables, such as the name of the config.
        model: the plain model, in evaluation mode, on its device.
        dataset: name of the data set.
        loader: Detectron2's test loader, batch 1; it has a length.
        make_evaluator: creates the task's evaluator; None without labels.
        config: text that identifies the model and its preprocessing.
        color: "RGB" or "BGR", of the images.
        limit: number of images; without metrics, as Detectron2's evaluators need the whole data
            set. None: all.
    """

    name: str
    model: nn.Module
    dataset: str
    loader: Iterable[list[dict[str, Any]]]
    make_evaluator: Callable[[], DatasetEvaluator] | None
    config: str = ""
    color: str = "BGR"
    limit: int | None = None
    records: Callable[[], Sequence[Mapping[str, Any]]] | None = None
    code: tuple[Path, ...] = ()
    config_file: str = ""

    def __len__(self) -> int:
        return len(self.loader) if self.limit is None else min(self.limit, len(self.loader))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def images(self, count: int | None = None) -> Iterable[list[dict[str, Any]]]:
        """The first images at batch 1; None: all of the workload."""
        return islice(self.loader, len(self) if count is None else min(count, len(self)))

    @property
    def evaluator(self) -> Callable[[], DatasetEvaluator] | None:
        """`make_evaluator` if there are metrics."""
        whole = self.limit is None or self.limit >= len(self.loader)
        return self.make_evaluator if whole else None

    @property
    def fingerprint(self) -> str:
        """Hash of all that results depend on: code, libraries, config, weights, data and limit."""
        weights = hashlib.sha256()
        digest_tensors(weights, self.model.state_dict())
        classes = {type(part) for part in (*self.model.modules(), *PREDICTIONS.values())}
        return fingerprint(
            code_digest({*CODE, *self.code, *sources(classes)}),
            versions(),
            self.config,
            weights.hexdigest(),
            self.dataset,
            self._data_digest(),
            len(self),
            self.evaluator is not None,
        )

    def _data_digest(self) -> str:
        if self.records is not None:
            records = list(self.records())
        else:
            known = self.dataset in DatasetCatalog.list()
            records = DatasetCatalog.get(self.dataset) if known else []
        if len(records) == len(self.loader):  # else it is not known which are the first
            records = records[: len(self)]
        names = [name for name in self.dataset.split(", ") if name in MetadataCatalog.list()]
        return data_digest(records, [MetadataCatalog.get(name).as_dict() for name in names])


def image_name(item: Mapping[str, Any]) -> str:
    """Name of one input of a model, for messages."""
    return str(item.get("file_name", item.get("image_id", "without a name")))


def register_images(where: str | Sequence[str], limit: int | None = None) -> str:
    """Register images without labels as a data set.

    Images that cannot be read are left out and logged. They are ``unreadable`` in the
    metadata, and the name says how many there are.

    Args:
        where: files, folders or patterns; one, or several in this order.
        limit: only the first images that can be read; None: all of them.

    Returns:
        The name, which is unique to these images.

    Raises:
        FileNotFoundError: for a place without images.
        ValueError: if no image can be read.
    """
    places = [where] if isinstance(where, str) else list(where)
    files: list[str] = []
    unreadable: list[str] = []
    for path in [path for place in places for path in find_images(place)]:
        if len(files) == limit:
            break
        try:
            check_image(path)
            files.append(path)
        except DataError as error:
            unreadable.append(str(error))
            if comm.is_main_process():
                logger.warning("skipped: %s", error)
    if not files:
        listed = ", ".join(map(repr, places))
        raise ValueError(f"no image at {listed} can be read: {unreadable[0]}")
    records = [{"file_name": path, "image_id": path} for path in files]
    stamps = [(path, Path(path).stat().st_size) for path in files]
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    skipped = f", {len(unreadable)} unreadable skipped" if unreadable else ""
    name = f"{places[0]}{more} ({fingerprint(stamps)[:8]}{skipped})"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, lambda: [dict(record) for record in records])
        MetadataCatalog.get(name).set(unreadable=tuple(unreadable))
    return name
