"""Measure one model with several settings."""

from __future__ import annotations

import contextlib
import copy
import datetime
import io
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset
from torch import nn
from tqdm import tqdm

from ..analysis.flops import count_flops
from ..analysis.launches import count_launches
from ..analysis.memory import peak_memory
from ..analysis.timing import Ratio, processor, rounds, summarize
from ..api import apply
from ..engine.interrupt import check_interrupt
from ..evaluation import Agreement, watch_finite
from ..predictions import main_metrics
from ..settings import Settings
from .options import Options
from .reading import read_dataclass
from .rows import PLAIN, Comparison, Conditions, Row
from .store import Store, fingerprint
from .workload import Workload, image_name

__all__ = ["Session", "expedited_copy", "share_weights"]


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def expedited_copy(model: nn.Module, settings: Settings | None) -> nn.Module:
    """A copy of a model with shared weights and these settings; None: the model itself.

    Raises:
        ValueError: for settings that do not fit the model.
    """
    return _expedited(model, settings)[0]


def _expedited(model: nn.Module, settings: Settings | None) -> tuple[nn.Module, Settings | None]:
    """`expedited_copy`, and its settings after a budget has chosen."""
    if settings is None:
        return model, None
    expedited = share_weights(model)
    return expedited, apply(expedited, settings).settings


class Session:
    """Measures the plain model and settings of a workload, unless results are in the store."""

    def __init__(
        self, workload: Workload, options: Options | None = None, store: Store | None = None
    ) -> None:
        """
        Args:
            workload: the model and its data.
            options: measurement options.
            store: of results; None: in memory.
        """
        self.workload = workload
        self.options = options or Options()
        self.store = store or Store(None)
        self._timed: list[list[dict[str, Any]]] = []
        self._image: str | None = None  # the current image
        self._plain_is_warm = False  # it has run, so its cached values are there
        self._new: set[str] = set()  # keys of speeds that this session has put into the store

    @cached_property
    def _fingerprint(self) -> str:
        """Of the workload, which must not change during a session."""
        return self.workload.fingerprint

    def conditions(self) -> Conditions:
        """Conditions of the measurements."""
        return Conditions(
            device=processor(self.workload.device.type),
            threads=torch.get_num_threads(),
            dtype=self.options.dtype,
            torch=torch.__version__,
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            timed_images=min(self.options.timed_images, len(self.workload)),
            batch=self.options.batch,
            command=shlex.join(["python", *sys.argv]),
        )

    def comparison(
        self,
        rows: Sequence[Row],
        unfinished: Sequence[str] = (),
        failed: Mapping[str, str] | None = None,
    ) -> Comparison:
        """Rows of this workload, the plain model's first."""
        workload = self.workload
        return Comparison(
            model=workload.name,
            dataset=workload.dataset,
            images=len(workload),
            conditions=self.conditions(),
            rows=list(rows),
            unfinished=list(unfinished),
            failed=dict(failed or {}),
            config_file=str(Path(workload.config_file).resolve()) if workload.config_file else "",
        )

    def row(self, name: str, settings: Settings | None) -> Row:
        """The row of one setting; None for the plain model.

        Raises:
            ValueError: if the model fails; names the image.
        """
        values = self._stored("quality", settings, {}, self._evaluate, name)
        if self.options.timed_images:
            values |= self._stored("speed", settings, self._where_timed, self._speed, name)
        return read_dataclass(Row, {**values, "name": name, "settings": _plain(settings)}, name)

    def time_together(self, settings: Mapping[str, Settings | None]) -> None:
        """Measure the speed of several settings in turns with each other and the plain model.

        `row` measures those that are not in the store, one after the other. If a model fails here,
        nothing is measured: `row` will name it.
        """
        if not self.options.timed_images:
            return
        keys = {name: self._key("speed", s, self._where_timed) for name, s in settings.items()}
        missing = [name for name, key in keys.items() if self.store.get(key) is None]
        if len(missing) < 2:
            return
        try:
            models = {name: expedited_copy(self.workload.model, settings[name]) for name in missing}
            speeds = self._measure_speeds(models)
        except ValueError:
            return
        for name, values in speeds.items():
            self.store.put(keys[name], values, f"{self.workload.name}: {name}, speed")
            self._new.add(keys[name])

    @cached_property
    def _where_timed(self) -> dict[str, Any]:
        """What the speed depends on, beside the model and its settings."""
        now = asdict(self.conditions())
        where = {key: now[key] for key in ("device", "threads", "torch", "timed_images")}
        return {**where, "batch": self.options.batch}

    def _speed(self, name: str, model: nn.Module) -> dict[str, Any]:
        return self._measure_speeds({name: model})[name]

    def _key(self, kind: str, settings: Settings | None, where: Mapping[str, Any]) -> str:
        device = self.workload.device.type
        parts = (kind, self._fingerprint, _plain(settings), self.options.dtype, device)
        return fingerprint(*parts, where)

    def _stored(
        self,
        kind: str,
        settings: Settings | None,
        where: Mapping[str, Any],
        measure: Callable[[str, nn.Module], dict[str, Any]],
        name: str,
    ) -> dict[str, Any]:
        key = self._key(kind, settings, where)
        if self.store.get(key) is None:
            model, resolved = _expedited(self.workload.model, settings)
            try:
                values = measure(name, model)
            except ValueError as error:
                image, self._image = self._image, None
                if image is None:
                    raise
                raise ValueError(f"image {image}: {error}") from error
            if kind == "quality":
                values["resolved"] = _plain(resolved)
            self.store.put(key, values, f"{self.workload.name}: {name}, {kind}")
        elif key not in self._new:
            self.store.reused += 1
        return dict(self.store.get(key))

    @contextlib.contextmanager
    def _forwarding(self) -> Iterator[None]:
        dtype = getattr(torch, self.options.dtype)
        mixed = torch.autocast(self.workload.device.type, dtype, enabled=dtype != torch.float32)
        with torch.no_grad(), mixed:
            yield

    def _reference(self) -> Agreement:
        """Outputs of the plain model, computed once and stored."""
        key = self._key("reference", None, {})
        arrays = self.store.get_arrays(key)
        if arrays is not None:
            with contextlib.suppress(ValueError):  # a file of another kind
                return Agreement.from_arrays(arrays)
        reference = Agreement()
        self._run(PLAIN, self.workload.model, reference)
        self.store.put_arrays(key, reference.to_arrays())
        return reference

    def _images(self) -> Iterator[list[dict[str, Any]]]:
        """The workload's images; remembers the current one for error messages."""
        for batch in self.workload.images():
            check_interrupt()
            self._image = image_name(batch[0])
            yield batch
        self._image = None
        check_interrupt()

    def _run(self, name: str, model: nn.Module, agreement: Agreement) -> dict[str, Any]:
        """Results of the task's evaluator, and the agreement."""
        evaluators = [agreement]
        if self.workload.evaluator is not None:
            evaluators.append(self.workload.evaluator())
        bar = tqdm(
            self._images(),
            total=len(self.workload),
            desc=name,
            unit="image",
            leave=False,
            disable=None if self.options.progress else True,  # None: disabled unless in a terminal
        )
        # Without the tables of pycocotools.
        quiet = contextlib.redirect_stdout(io.StringIO())
        with quiet, self._forwarding(), watch_finite(model) as agreement.watch:
            results = inference_on_dataset(model, bar, DatasetEvaluators(evaluators))
        self._plain_is_warm |= model is self.workload.model
        return results

    def _evaluate(self, name: str, model: nn.Module) -> dict[str, Any]:
        if model is self.workload.model:
            agreement = Agreement()
            results = self._run(name, model, agreement)
            self.store.put_arrays(self._key("reference", None, {}), agreement.to_arrays())
        else:
            results = self._run(name, model, Agreement(self._reference()))
        outputs = results["outputs"]
        image = outputs["worst_image"]
        with self._forwarding():
            launches = count_launches(model, self._inputs(1)[0], warm=True).total()
        return {
            "launches": launches,
            "metrics": main_metrics(results),
            "agreement": results["agreement"],
            "not_finite": outputs["not_finite"],
            "worst": None if image is None else [image, outputs["worst_agreement"]],
            "flops": asdict(count_flops(model, self._inputs(1)[0])),
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def _inputs(self, count: int) -> list[list[dict[str, Any]]]:
        """The first images as inputs of the model at batch 1, without labels."""
        if len(self._timed) < min(count, len(self.workload)):
            keys = ("image", "height", "width")
            self._timed = [
                [{key: item[key] for key in keys if key in item} for item in batch]
                for batch in self.workload.images(count)
            ]
        return self._timed[:count]

    def _measure_speeds(self, models: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
        """Of each model its speed, measured in turns with the others and the plain model, and its
        memory on the first image."""
        batch = self.options.batch
        images = self._inputs(max(self.options.timed_images, batch if batch > 1 else 1))
        singles = images[: self.options.timed_images]
        plain = self.workload.model
        with self._forwarding():
            # This is also the forward before those that are timed.
            memory = {
                name: peak_memory(partial(model, singles[0]), self.workload.device)
                for name, model in models.items()
            }
            if not self._plain_is_warm and PLAIN not in models:
                plain(singles[0])
            self._plain_is_warm = True
        seconds = self._time("timing", models, singles, len(singles), warmup=0)
        values = {
            name: {
                "peak_memory": memory[name],
                "latency": asdict(summarize(seconds[name])),
                "baseline": asdict(summarize(seconds[PLAIN])),
                "ratio": asdict(Ratio.of(seconds[PLAIN], seconds[name])),
            }
            for name in models
        }
        if batch > 1:
            items = [item for one in islice(cycle(images), batch) for item in one]
            repeats = max(3, -(-len(singles) // batch))
            seconds = self._time("timing batches", models, [items], repeats)
            for name in models:
                of_model, of_plain = seconds[name], seconds[PLAIN]
                values[name] |= {
                    "throughput": len(items) / summarize(of_model).median,
                    "baseline_throughput": len(items) / summarize(of_plain).median,
                    "batched_ratio": asdict(Ratio.of(of_plain, of_model)),
                }
        return values

    def _time(
        self,
        label: str,
        models: Mapping[str, nn.Module],
        inputs: Sequence[list[dict[str, Any]]],
        repeats: int,
        warmup: int = 1,
    ) -> dict[str, list[float]]:
        """Seconds of forward passes of models and the plain one, on the same input per round."""

        def forward(model: nn.Module, turn: Iterator[list[dict[str, Any]]]) -> None:
            check_interrupt()
            model(next(turn))

        models = {PLAIN: self.workload.model, **models}
        runs = {name: partial(forward, model, cycle(inputs)) for name, model in models.items()}
        label = f"{label} {', '.join(models)}"
        with self._forwarding():
            return rounds(runs, repeats, warmup, self.options.progress, label=label)


def _plain(settings: Settings | None) -> dict[str, Any] | None:
    return None if settings is None else asdict(settings)
