"""What one family's row of the table says: exactness, GFLOPs and speed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

from ..adapters import TransformerSpec
from ..adapters.versions import VERSIONS
from ..analysis.flops import count_flops
from ..analysis.timing import Ratio, rounds
from ..api import apply
from ..budget import within_budget
from ..comparison import share_weights
from ..compat import tree_flatten
from ..fused import fuse_attention
from ..methods import METHOD_REGISTRY
from ..settings import Settings, describe
from .models import Family

__all__ = ["Row", "measure", "table"]

#: What is timed; the last two where a library's own attention is not fused.
PLAIN, FEWER, PLAIN_FUSED, FEWER_FUSED = MODELS = (
    *("plain", "expedited"),
    *("plain, fused", "expedited, fused"),
)
#: Every token its own cluster.
_IDENTITY = {"ratio": 1.0, "method": "expedit", "temperature": 1e6, "neighbors": 1}


@dataclass(frozen=True)
class Row:
    """One family's measurements; where there are several numbers, by the names of `MODELS`.

    Attributes:
        model, size, package: of the family.
        version: of its library.
        methods: those that its adapter can do.
        setting: what the budget chose.
        restored: whether outputs after ``remove()`` are the plain model's, bit for bit.
        errors: largest difference of the outputs, relative to their largest value, where nothing is
            lost: with merges that keep all tokens, ``"merge"``, and a grid of all, ``"grid"``.
        gflops: of the whole model.
        block_gflops: of the blocks of its transformer.
        seconds: of each round.
    """

    model: str
    size: int
    package: str
    version: str
    methods: tuple[str, ...]
    setting: str
    restored: bool
    errors: dict[str, float]
    gflops: dict[str, float]
    block_gflops: dict[str, float]
    seconds: dict[str, list[float]]


def _methods(spec: TransformerSpec) -> tuple[str, ...]:
    stage, _ = spec.longest_stage
    whole = stage.window is None or not any(side % stage.window for side in stage.size)
    return tuple(
        name
        for name, method in METHOD_REGISTRY.items()
        if (spec.unstructured or not method.unstructured)
        and (stage.inside or not method.inside)
        and (whole or not method.whole_windows)
    )


def _tensors(output: Any) -> list[Tensor]:
    leaves, _ = tree_flatten(output)
    return [leaf for leaf in leaves if torch.is_tensor(leaf) and leaf.is_floating_point()]


def _error(actual: Any, expected: Any) -> float:
    """The largest difference of any output, relative to its largest value."""
    pairs = zip(_tensors(actual), _tensors(expected), strict=True)
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in pairs)


@torch.no_grad()
def measure(family: Family, budget: float, repeats: int, warmup: int = 1) -> Row:
    """Measure a family on the CPU, plain and expedited models in turns.

    Args:
        family: its library must be installed.
        budget: share of the GFLOPs of the blocks.
        repeats: timed rounds.
        warmup: rounds before these.

    Raises:
        ValueError: for a budget that the model cannot meet.
    """
    model, spec, x = family.prepare()
    for parameter in model.parameters():  # libraries begin with zeros here and there
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    settings = within_budget(Settings(budget=budget), spec)
    expected = model(x)
    flops, errors = {PLAIN: count_flops(model, x)}, {}

    whole = {
        "merge": Settings(alpha=settings.alphas, method="merge", keep=1.0),
        "grid": Settings(alpha=min(settings.alphas), scope=spec.scopes[0], **_IDENTITY),
    }
    for name, lossless in whole.items():
        with apply(model, lossless):
            errors[name] = _error(model(x), expected)
    with apply(model, settings):
        flops[FEWER] = count_flops(model, x)
    restored = all(map(torch.equal, _tensors(model(x)), _tensors(expected)))
    del expected

    models = {PLAIN: model, FEWER: share_weights(model)}
    apply(models[FEWER], settings)
    if spec.fused is not None:  # else it is fused as it is
        models |= {name: share_weights(model) for name in (PLAIN_FUSED, FEWER_FUSED)}
        fuse_attention(models[PLAIN_FUSED])
        apply(models[FEWER_FUSED], replace(settings, fused_attention=True))
    calls = {name: partial(each, x) for name, each in models.items()}
    return Row(
        model=family.model,
        size=family.size,
        package=family.package,
        version=_version(family),
        methods=_methods(spec),
        setting=describe(settings, method=True),
        restored=restored,
        errors=errors,
        gflops={name: counted.total / 1e9 for name, counted in flops.items()},
        block_gflops={name: counted.blocks / 1e9 for name, counted in flops.items()},
        seconds=rounds(calls, repeats, warmup, progress=True, label=str(family)),
    )


def _version(family: Family) -> str:
    """Of its library; Detectron2's distributions have other names than its package."""
    try:
        return metadata.version(family.package)
    except metadata.PackageNotFoundError:
        return import_module(family.module).__version__


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    head = ["model", "library", "methods", "restored", "error", "GFLOPs", "speed-up", "fused"]
    lines = [[*head], ["---"] * len(head), *map(_cells, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cells(row: Row) -> list[str]:
    plain, fewer = row.gflops[PLAIN], row.gflops[FEWER]
    fused = PLAIN_FUSED in row.seconds
    return [
        f"{row.model}, {row.size}²",
        f"{row.package} {_oldest(row.package)}{row.version}",
        ", ".join(row.methods),
        "bit for bit" if row.restored else "**no**",
        f"{max(row.errors.values()):.0e}",
        f"{plain:.0f} → {fewer:.0f}",
        _speed_up(row.seconds[PLAIN], row.seconds[FEWER]),
        _speed_up(row.seconds[PLAIN_FUSED], row.seconds[FEWER_FUSED]) if fused else "",
    ]


def _oldest(package: str) -> str:
    """The oldest version that fits, as the beginning of a range; "" if it is the only one."""
    oldest = re.match(r">=([\d.]+)", VERSIONS.get(package, ""))
    return f"{oldest[1]} to " if oldest else ""


def _speed_up(slow: Sequence[float], fast: Sequence[float]) -> str:
    ratio = Ratio.of(slow, fast)
    return f"{ratio.median:.2f}×" + (" (uneven)" if ratio.is_wide else "")
