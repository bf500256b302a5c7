"""Speed of expedited backbones on a GPU within a time limit, in order of importance.

A *unit* is a model at a batch size and dtype in one of three modes, with settings that are timed
interleaved with the plain model. In mode "graph" a CUDA graph is replayed, so that the time of
launches does not count; the plain model has fused attention there too. Compilation is slow, so a
compiled unit has a single setting. The results of each unit are written when it finishes.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..api import expedite
from ..compat import cpu_attention
from ..cuda_graph import capture
from ..fused import fuse_attention
from ..methods import METHOD_REGISTRY
from .gpu_models import BenchmarkModel
from .launches import count_launches
from .memory import peak_memory
from .timing import DTYPES, interleaved, synchronize

__all__ = [
    "BATCHES",
    "MODES",
    "PLAIN",
    "PRECISIONS",
    "Unit",
    "check",
    "measure",
    "plan",
    "settings",
    "table",
]

Shape = tuple[int, ...]

PLAIN = "plain"
BUDGETS = (0.5, 0.7)
#: The published operator.
PUBLISHED = {
    "method": "expedit",
    "temperature": 0.02,
    "normalize": "l2",
    "size_aware": False,
    "residual": False,
    "neighbor_window": 0,
}
# In order of importance.
BATCHES = (1, 8, 32)
MODES = ("eager", "graph", "compiled")
PRECISIONS = (*DTYPES[1:], DTYPES[0])

# Seconds for the timed rounds of a unit, and limits for their number.
_SECONDS = 4.0
_ROUNDS = (3, 20)


def settings() -> dict[str, dict[str, Any]]:
    """Settings to compare with the plain model, by name, in order of importance."""
    by_name = {}
    for budget in BUDGETS:
        for method in sorted(METHOD_REGISTRY, key=lambda name: name != "merge"):
            by_name[f"{method} {budget}"] = {"budget": budget, "method": method}
        by_name[f"published {budget}"] = {"budget": budget, **PUBLISHED}
    return by_name


@dataclass(frozen=True)
class Unit:
    """The plain model and the `settings` called ``names``, timed interleaved."""

    model: str
    batch: int
    dtype: str
    mode: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        names = "" if len(self.names) > 1 else f", {self.names[0]}"
        return f"{self.model}, batch {self.batch}, {self.dtype}, {self.mode}{names}"


def plan(
    models: Sequence[str],
    batches: Sequence[int] = BATCHES,
    dtypes: Sequence[str] = PRECISIONS,
    names: Sequence[str] | None = None,
    modes: Sequence[str] = MODES,
) -> list[Unit]:
    """All units in order of importance: the sum of the positions of its properties in their lists.

    Args:
        models, batches, dtypes, names: in order of importance.
        modes: of `MODES`.
    """
    names = tuple(settings() if names is None else names)
    ranked = []
    for (i, model), (j, batch), (k, dtype) in product(*map(enumerate, (models, batches, dtypes))):
        rank = i + j + 3 * k
        for mode in ("eager", "graph"):
            if mode in modes:
                ranked.append((rank, Unit(model, batch, dtype, mode, names)))
        if "compiled" in modes:
            ranked += (
                (rank + 1 + 2 * place, Unit(model, batch, dtype, "compiled", (name,)))
                for place, name in enumerate(names)
            )
    return [unit for _, unit in sorted(ranked, key=lambda item: item[0])]


def _shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the model that shares its weights."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _prepared(
    entry: BenchmarkModel, model: nn.Module, names: Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The plain and the expedited models by name, and the errors of settings that are refused."""
    models, refused = {PLAIN: model}, {}
    for name in names:
        expedited = _shared_copy(model)
        try:
            expedite(expedited, outputs=(entry.depth - 1,), **settings()[name])
            models[name] = expedited
        except ValueError as error:
            refused[name] = str(error)
    return models, refused


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# The attention kernel of the CPU, which torch counts only on GPUs.
_MORE_FLOPS = {cpu_attention(): _attention}


def _gflops(model: nn.Module, x: Tensor) -> float:
    with FlopCounterMode(display=False, custom_mapping=_MORE_FLOPS) as counter:
        model(x)
    return counter.get_total_flops() / 2e9  # one FLOP is one multiply-add


def _first(out: Any) -> Tensor:
    return next(iter(out.values())) if isinstance(out, dict) else out


@torch.inference_mode()
def measure(entry: BenchmarkModel, unit: Unit, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of one unit, the plain model's first.

    A row has the properties of the unit, ``name``, and either ``seconds`` (median, low and high),
    ``speed_up`` over the plain model, ``gflops``, ``gflops_ratio`` (of the plain model to this: the
    speed-up expected from arithmetic alone), ``memory`` in bytes and, if eager, ``launches``; or
    ``error``.
    """
    head = {name: value for name, value in asdict(unit).items() if name != "names"}
    torch.manual_seed(0)
    plain = entry.build().eval().to(device, getattr(torch, unit.dtype))
    if unit.mode == "graph":  # Detectron2's own attention makes indices on the CPU in every call
        fuse_attention(plain)
    models, refused = _prepared(entry, plain, unit.names)
    x = torch.randn(unit.batch, 3, entry.size, entry.size, device=device)
    x = x.to(getattr(torch, unit.dtype))
    if unit.mode == "compiled":
        torch.compiler.reset()
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        try:
            rows[name] = {"gflops": _gflops(model, x[:1]) * unit.batch}
            if unit.mode == "compiled":
                model = torch.compile(model)
            call = partial(model, x)
            call()
            synchronize()
            rows[name]["memory"] = peak_memory(call, device)
            if unit.mode == "eager":
                rows[name]["launches"] = count_launches(model, x).total()
            calls[name] = partial(capture(model, x), x) if unit.mode == "graph" else call
        except Exception as error:  # one failing setting must not stop the others
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    times = {}
    if PLAIN in calls:
        began = time.perf_counter()
        interleaved(calls, 1, warmup=1)
        once = (time.perf_counter() - began) / 2
        rounds = min(max(int(_SECONDS / once), _ROUNDS[0]), _ROUNDS[1])
        times = interleaved(calls, rounds, warmup=0)
    for name in (PLAIN, *unit.names):
        row = {**head, "name": name}
        if name in times:
            row |= rows[name]
            row["seconds"] = asdict(times[name])
            row["speed_up"] = times[PLAIN].median / times[name].median
            row["gflops_ratio"] = rows[PLAIN]["gflops"] / rows[name]["gflops"]
        else:
            row["error"] = refused.get(name, f"the plain model failed: {refused.get(PLAIN)}")
        yield row
    models.clear()
    calls.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.inference_mode()
def check(
    label: str, entry: BenchmarkModel, device: torch.device, names: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Compare the outputs on a device with those on the CPU, both in fp32.

    ``deviation`` is the 99th percentile of the relative error of the tokens: if two clusters are
    equally near, devices may choose differently.
    """
    torch.manual_seed(0)
    model = entry.build().eval()
    x = torch.randn(2, 3, entry.size, entry.size)
    models, _ = _prepared(entry, model, tuple(settings() if names is None else names))
    for name, model in models.items():
        expected = _first(model(x)).double()
        actual = _first(copy.deepcopy(model).to(device)(x.to(device))).double().cpu()
        axis = 1 if expected.dim() == 4 else -1
        errors = (actual - expected).norm(dim=axis) / expected.norm(dim=axis)
        yield {"model": label, "name": name, "deviation": errors.flatten().quantile(0.99).item()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `measure` as a Markdown table."""
    head = ("model", "batch", "type", "", "setting", "ms", "speed-up", "by GFLOPs", "MiB")
    lines = [
        "| " + " | ".join((*head, "launches")) + " |",
        "|" + "---|" * 5 + "---:|" * 5,
    ]
    for row in rows:
        cells = [row[key] for key in ("model", "batch", "dtype", "mode", "name")]
        if "error" in row:
            cells += ["", "", "", "", row["error"].replace("|", "/")]
        else:
            cells += [
                f"{1e3 * row['seconds']['median']:.2f}",
                f"{row['speed_up']:.2f}",
                f"{row['gflops_ratio']:.2f}",
                f"{row['memory'] / 2**20:.1f}",
                row.get("launches", ""),
            ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
