"""The published rows: numbers as printed, and our config for each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from torch import nn

from ..api import apply
from ..files.shipped import SHIPPED
from ..projects import load_cfg
from ..settings import Settings

__all__ = ["Row", "Table", "load_tables", "select_tables"]

HERE = Path(__file__).resolve().parent

# As in configs/expedit/published.yaml, without its keys for windowed models.
_PUBLISHED = {"iterations": 5, "window": 5, "neighbors": 20, "size_aware": False}


@dataclass(frozen=True)
class Row:
    """One row of a published table.

    Attributes:
        alpha: as printed; ALPHA in our configs, the number of blocks before clustering, is one more
            for DPT and up to one less for Swin-L. None: the plain model.
        grid: clusters (h, w) as printed, of a window for Swin-L. KITTI's 28 x 28 exceed its 22 rows
            of tokens; the config has 14 x 56, the same number.
        gflops: as printed; see `rules`.
        fps: as printed, on the authors' GPU; only ratios are comparable.
        config: path under ``projects``; "" for models of torchvision.
    """

    alpha: int | None
    grid: tuple[int, int] | None
    gflops: float
    fps: float
    config: str = ""


@dataclass(frozen=True)
class Table:
    """A published table: the row of the plain model, then those with Expedit.

    Attributes:
        model, dataset: identify the table.
        section: in the paper.
        backbone: of the model.
        size: (height, width) in pixels of the image or window that is counted and timed.
        backbone_alone: whether the numbers are of the backbone only.
        opts: config overrides, alternating keys and values.
        rows: the rows.
        torchvision: name of the model in `torchvision.models`; None if configs define it.
    """

    model: str
    dataset: str
    section: str
    backbone: str
    size: tuple[int, int]
    backbone_alone: bool
    opts: tuple[Any, ...]
    rows: tuple[Row, ...]
    torchvision: str | None = None

    @property
    def plain(self) -> Row:
        return self.rows[0]

    def cfg(self, row: Row, device: str) -> CfgNode:
        """The config of a row."""
        return load_cfg(SHIPPED / "projects" / row.config, [*self.opts, "MODEL.DEVICE", device])

    def settings(self, row: Row, device: str) -> Settings | None:
        """Settings of a row; None for a plain model of torchvision."""
        if self.torchvision is None:
            return Settings.from_node(self.cfg(row, device).MODEL.EXPEDIT)
        return None if row is self.plain else Settings(alpha=row.alpha, grid=row.grid, **_PUBLISHED)

    def build(self, row: Row, device: str) -> tuple[nn.Module, Any]:
        """The model of a row with random weights, in evaluation mode, and a random input."""
        if self.torchvision is not None:
            with torch.device(device):
                model = torchvision.models.get_model(self.torchvision, image_size=self.size[0])
                image = torch.rand(1, 3, *self.size)
            settings = self.settings(row, device)
            if settings is not None:
                apply(model, settings)
            return model.eval(), image
        cfg = self.cfg(row, device)
        with torch.device(device):
            image = 255 * torch.rand(3, *self.size)
            if self.backbone_alone:
                return build_backbone(cfg).eval(), image[None]
            return build_model(cfg).eval(), [{"image": image}]


def load_tables() -> list[Table]:
    """All tables, in the order of output."""
    tables = []
    for entry in json.loads((HERE / "tables.json").read_text()):
        rows = tuple(
            Row(**line | {"grid": line["grid"] and tuple(line["grid"])}) for line in entry["rows"]
        )
        lists = {"size": tuple(entry["size"]), "opts": tuple(entry["opts"]), "rows": rows}
        tables.append(Table(**entry | lists))
    return tables


def select_tables(
    models: Sequence[str] | None = None, datasets: Sequence[str] | None = None
) -> list[Table]:
    """The tables of the given models and data sets; None: all.

    Raises:
        ValueError: for an unknown name, or if no table has this combination.
    """
    tables = load_tables()
    for option, field, names in (
        ("--models", "model", models),
        ("--datasets", "dataset", datasets),
    ):
        known = list(dict.fromkeys(getattr(table, field) for table in tables))
        for name in names or ():
            if name not in known:
                raise ValueError(f"{option} must be among {known}, got {name!r}")
    selected = [
        table
        for table in tables
        if (not models or table.model in models) and (not datasets or table.dataset in datasets)
    ]
    if not selected:
        raise ValueError(f"no table has --models {models} and --datasets {datasets}")
    return selected
