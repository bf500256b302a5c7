"""Measuring one model with one setting after the other, each thing once."""

from __future__ import annotations

import contextlib
import copy
import datetime
import io
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset
from torch import nn
from tqdm import tqdm

from ..analysis.flops import count_flops
from ..analysis.launches import count_launches
from ..analysis.memory import peak_memory
from ..analysis.timing import Timing, interleaved, processor
from ..api import expedite
from ..evaluation import Agreement, main_metrics
from ..settings import Settings
from .rows import PLAIN, Comparison, Conditions, Row
from .store import Store, fingerprint
from .subject import Subject

__all__ = ["DTYPES", "Options", "Session", "compare", "expedited_copy", "share_weights"]

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        dtype: of the forward, by autocast unless it is "float32".
        timed_images: at batch 1, after one that is not timed; 0: no speed and no memory.
        batch: images in a batch for the throughput; 1: none.
        progress: show progress bars.

    Raises:
        ValueError: for values out of range.
    """

    dtype: str = "float32"
    timed_images: int = 20
    batch: int = 4
    progress: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")
        for name, least in (("timed_images", 0), ("batch", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters and buffers are those of the model itself."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def expedited_copy(model: nn.Module, settings: Settings | None) -> nn.Module:
    """A copy with the same weights and these settings; None: the model itself.

    Raises:
        ValueError: for settings that do not fit the model.
    """
    if settings is None:
        return model
    twin = share_weights(model)
    values = dict(vars(settings))
    expedite(twin, values.pop("alpha"), **values)
    return twin


class Session:
    """Measures a subject's plain model and its settings; what is in the store is not run again."""

    def __init__(
        self, subject: Subject, options: Options | None = None, store: Store | None = None
    ) -> None:
        """
        Args:
            subject: what is measured.
            options: how.
            store: where results are kept; None: in memory.
        """
        self.subject = subject
        self.options = options or Options()
        self.store = store or Store(None)
        self._timed: list[list[dict[str, Any]]] = []

    def conditions(self) -> Conditions:
        """How rows are taken now."""
        return Conditions(
            device=processor(self.subject.device.type),
            threads=torch.get_num_threads(),
            dtype=self.options.dtype,
            torch=torch.__version__,
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            timed_images=min(self.options.timed_images, len(self.subject)),
            batch=self.options.batch,
            command=shlex.join(["python", *sys.argv]),
        )

    def comparison(self, rows: Sequence[Row], unfinished: Sequence[str] = ()) -> Comparison:
        """Rows of this subject, the plain model's first."""
        subject = self.subject
        return Comparison(
            model=subject.name,
            dataset=subject.dataset,
            images=len(subject),
            conditions=self.conditions(),
            rows=list(rows),
            unfinished=list(unfinished),
        )

    def row(self, name: str, settings: Settings | None) -> Row:
        """Everything about one setting; None is the plain model."""
        values = self._stored("quality", settings, {}, self._evaluate, name)
        if self.options.timed_images:
            now = asdict(self.conditions())
            where = {key: now[key] for key in ("device", "threads", "torch", "timed_images")}
            where["batch"] = self.options.batch
            values |= self._stored("speed", settings, where, self._measure_speed, name)
        return Row.from_dict({**_NOTHING, **values, "name": name, "settings": _plain(settings)})

    def _key(self, kind: str, settings: Settings | None, where: Mapping[str, Any]) -> str:
        device = self.subject.device.type
        parts = (kind, self.subject.fingerprint, _plain(settings), self.options.dtype, device)
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
            model = expedited_copy(self.subject.model, settings)
            self.store.put(key, measure(name, model), f"{self.subject.name}: {name}, {kind}")
        else:
            self.store.reused += 1
        return dict(self.store.get(key))

    @contextlib.contextmanager
    def _forwarding(self) -> Iterator[None]:
        dtype = getattr(torch, self.options.dtype)
        mixed = torch.autocast(self.subject.device.type, dtype, enabled=dtype != torch.float32)
        with torch.no_grad(), mixed:
            yield

    def _reference(self) -> Agreement:
        """What the plain model puts out: kept from the first run, also over an interruption."""
        key = self._key("reference", None, {})
        reference = Agreement()
        kept = self.store.get_object(key)
        if kept is None:
            self._run(PLAIN, self.subject.model, reference)
            self.store.put_object(key, reference.kept)
        else:
            reference.kept = kept
        return reference

    def _run(self, name: str, model: nn.Module, agreement: Agreement) -> dict[str, Any]:
        """The results of the task's evaluator, and the agreement."""
        subject = self.subject
        evaluators = [agreement]
        if subject.evaluator is not None:
            evaluators.append(subject.evaluator())
        bar = tqdm(
            subject.images(),
            total=len(subject),
            desc=name,
            unit="image",
            leave=False,
            disable=not self.options.progress,
        )
        # pycocotools prints its own tables.
        with contextlib.redirect_stdout(io.StringIO()), self._forwarding():
            return inference_on_dataset(model, bar, DatasetEvaluators(evaluators))

    def _evaluate(self, name: str, model: nn.Module) -> dict[str, Any]:
        if model is self.subject.model:
            agreement = Agreement()
            results = self._run(name, model, agreement)
            self.store.put_object(self._key("reference", None, {}), agreement.kept)
        else:
            results = self._run(name, model, Agreement(self._reference()))
        with self._forwarding():
            launches = count_launches(model, self._inputs(1)[0]).total()
        return {
            "launches": launches,
            "metrics": main_metrics(results),
            "agreement": results["agreement"],
            "flops": asdict(count_flops(model, self._inputs(1)[0])),
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def _inputs(self, count: int) -> list[list[dict[str, Any]]]:
        """The first images as the model takes them, each alone; labels and the like left out."""
        if len(self._timed) < min(count, len(self.subject)):
            wanted = ("image", "height", "width")
            self._timed = [
                [{key: item[key] for key in wanted if key in item} for item in batch]
                for batch in self.subject.images(count)
            ]
        return self._timed[:count]

    def _measure_speed(self, name: str, model: nn.Module) -> dict[str, Any]:
        """Speed in turns with the plain model's, and memory on the first image."""
        plain, batch = self.subject.model, self.options.batch
        images = self._inputs(max(self.options.timed_images, batch if batch > 1 else 1))
        singles = images[: self.options.timed_images]
        models = {PLAIN: plain} if model is plain else {PLAIN: plain, name: model}
        latency = self._time(name, models, singles, len(singles))
        values = {"latency": asdict(latency[name]), "baseline": asdict(latency[PLAIN])}
        with self._forwarding():
            values["peak_memory"] = peak_memory(lambda: model(singles[0]), self.subject.device)
        if batch > 1:
            items = [item for one in islice(cycle(images), batch) for item in one]
            rounds = max(3, -(-len(singles) // batch))
            seconds = self._time(f"{name}, in batches of {batch}", models, [items], rounds)
            values["throughput"] = len(items) / seconds[name].median
            values["baseline_throughput"] = len(items) / seconds[PLAIN].median
        return values

    def _time(
        self,
        label: str,
        models: Mapping[str, nn.Module],
        inputs: Sequence[list[dict[str, Any]]],
        rounds: int,
    ) -> dict[str, Timing]:
        """Seconds of one forward of each model, all of them on the same input in a round."""

        def forward(model: nn.Module, turn: Iterator[list[dict[str, Any]]]) -> None:
            model(next(turn))

        runs = {name: partial(forward, model, cycle(inputs)) for name, model in models.items()}
        with self._forwarding():
            return interleaved(
                runs, rounds, progress=self.options.progress, label=f"timing {label}"
            )


_NOTHING = {
    "latency": None,
    "baseline": None,
    "throughput": None,
    "baseline_throughput": None,
    "peak_memory": None,
}


def _plain(settings: Settings | None) -> dict[str, Any] | None:
    return None if settings is None else asdict(settings)


def compare(
    subject: Subject,
    settings: Mapping[str, Settings],
    options: Options | None = None,
    store: Store | None = None,
    save: Callable[[Comparison], None] = lambda comparison: None,
) -> Comparison:
    """The plain model and the same model with each setting.

    An interruption (``KeyboardInterrupt``) ends it early: the result has the rows that are
    finished, and names the other settings.

    Args:
        subject: the model and its data.
        settings: name to settings.
        options: how to measure.
        store: keeps results, so that the same call again goes on where this one stopped.
        save: given the comparison so far, after each row.

    Returns:
        The plain model's row, then one for each setting in order.

    Raises:
        ValueError: for settings that do not fit the model, or a setting named as the plain model.
        KeyboardInterrupt: if not even the plain model is finished.
    """
    if PLAIN in settings:
        raise ValueError(f"a setting must not be named {PLAIN!r}, as the plain model is")
    for setting in settings.values():
        expedited_copy(subject.model, setting)  # what does not fit should fail now
    session = Session(subject, options, store)
    names = [PLAIN, *settings]
    rows: list[Row] = []
    try:
        for name in names:
            rows.append(session.row(name, settings.get(name)))
            save(session.comparison(rows, names[len(rows) :]))
    except KeyboardInterrupt:
        if not rows:
            raise
    return session.comparison(rows, names[len(rows) :])
