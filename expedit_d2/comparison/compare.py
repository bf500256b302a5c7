"""The plain model beside expedited ones: metrics, agreement, FLOPs and speed in one table."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, inference_on_dataset
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from ..analysis.flops import Flops, count_flops
from ..analysis.timing import Timing, interleaved
from ..api import expedite
from ..evaluation import Agreement, main_metrics
from ..settings import Settings

__all__ = ["Row", "compare", "share_weights", "to_table"]

PLAIN = "plain"


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes:
        name: of the setting; ``PLAIN`` is the model as it is.
        metrics: headline metric of each task, in percent.
        agreement: of each kind of output with the plain model's, in percent.
        flops: of one forward on the first image.
        seconds: of one forward at batch 1, over several images.
    """

    name: str
    metrics: dict[str, float]
    agreement: dict[str, float]
    flops: Flops
    seconds: Timing


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters and buffers are those of the model itself."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def compare(
    model: nn.Module,
    settings: Mapping[str, Settings],
    loader: Sequence[list[dict]],
    make_evaluator: Callable[[], DatasetEvaluator],
    timed_images: int = 10,
    progress: bool = True,
) -> list[Row]:
    """Evaluate a plain model, and the same model with each setting.

    Timing is interleaved: every image goes through all models in turn before the next one does.

    Args:
        model: a plain Detectron2 model in evaluation mode.
        settings: name to settings.
        loader: Detectron2's test loader, batch 1.
        make_evaluator: makes the task's evaluator, anew for each setting.
        timed_images: how many images are timed.
        progress: show progress bars.

    Returns:
        The plain model's row, then one for each setting in order.
    """
    models = {PLAIN: model}
    for name, setting in settings.items():
        values = dict(vars(setting))
        models[name] = share_weights(model)
        expedite(models[name], values.pop("alpha"), **values)

    reference = Agreement()
    results = {}
    for name, candidate in models.items():
        agreement = reference if name == PLAIN else Agreement(reference)
        bar = tqdm(loader, desc=f"evaluating {name}", unit="image", disable=not progress)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its own tables
            results[name] = inference_on_dataset(
                candidate, bar, DatasetEvaluators([make_evaluator(), agreement])
            )

    images = [inputs for inputs, _ in zip(loader, range(max(1, timed_images)), strict=False)]
    seconds = time_models(models, images, progress)
    return [
        Row(
            name=name,
            metrics=main_metrics(results[name]),
            agreement=results[name]["agreement"],
            flops=count_flops(candidate, _images_only(images[0])),
            seconds=seconds[name],
        )
        for name, candidate in models.items()
    ]


def time_models(
    models: Mapping[str, nn.Module], images: Sequence[Any], progress: bool = True
) -> dict[str, Timing]:
    """Seconds of one forward of each model, interleaved over the images."""

    def forward(model: nn.Module) -> Callable[[], None]:
        turn = iter(_endless(images))

        def run() -> None:
            with torch.no_grad():
                model(next(turn))

        return run

    runs = {name: forward(model) for name, model in models.items()}
    return interleaved(runs, repeats=len(images), warmup=1, progress=progress)


def _endless(items: Sequence[Any]) -> Iterable[Any]:
    while True:
        yield from items


def _images_only(inputs: list[dict]) -> list[dict]:
    return [{"image": item["image"]} for item in inputs]


def to_table(rows: Sequence[Row], style: str = "simple") -> str:
    """The comparison as text; ``style`` is one of tabulate's formats.

    "kept" is relative to the plain model, "saved" too; the speed-up is a ratio of medians.
    """
    plain = rows[0]
    metrics = list(plain.metrics)
    head = ["setting"]
    for metric in metrics:
        head += [metric, "kept"]
    head += [f"agree, {task}" for task in plain.agreement]
    head += ["GFLOPs ViT", "saved", "GFLOPs all", "saved", "FPS", "speed-up"]
    lines = []
    for row in rows:
        line: list[str] = [row.name]
        for metric in metrics:
            line += [
                f"{row.metrics[metric]:.1f}",
                _percent(row.metrics[metric], plain.metrics[metric]),
            ]
        line += [f"{row.agreement[task]:.1f}" for task in plain.agreement]
        for part in ("transformer", "total"):
            now, was = getattr(row.flops, part), getattr(plain.flops, part)
            line += [f"{now / 1e9:.2f}", f"{100 * (1 - now / was):.0f} %"]
        line.append(f"{1 / row.seconds.median:.2f}")
        line.append(f"{plain.seconds.median / row.seconds.median:.2f}x")
        lines.append(line)
    return tabulate(lines, head, tablefmt=style, disable_numparse=True, stralign="right")


def _percent(value: float, of: float) -> str:
    return f"{100 * value / of:.1f} %" if of > 0 else "-"
