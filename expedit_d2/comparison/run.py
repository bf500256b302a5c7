"""Run a comparison, setting by setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ..engine.interrupt import check_interrupt, interruptible
from ..settings import Settings
from .options import Options
from .rows import PLAIN, Comparison, Row
from .session import Session, expedited_copy
from .store import Store
from .workload import Workload

__all__ = ["compare"]


def compare(
    workload: Workload,
    settings: Mapping[str, Settings],
    options: Options | None = None,
    store: Store | None = None,
    save: Callable[[Comparison], None] = lambda comparison: None,
) -> Comparison:
    """Measure the plain model and each setting.

    After an interruption (Ctrl-C, ``KeyboardInterrupt``) the result has the finished rows and names
    the other settings. Settings that fail on an image are named with the reason; the others go on.

    Args:
        workload: the model and its data.
        settings: settings by name.
        options: measurement options.
        store: saves results, so that the same call resumes after an interruption.
        save: called with the comparison so far after each row.

    Returns:
        The plain model's row, then one row per setting in order.

    Raises:
        ValueError: for settings that do not fit the model, a setting with the name of the plain
            model, or if the plain model fails on an image.
        KeyboardInterrupt: before the plain model is finished.
    """
    _check(workload.model, settings)
    session = Session(workload, options, store)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    pending = [PLAIN, *settings]
    with interruptible():
        try:
            if session.options.time_together:
                session.time_together({PLAIN: None, **settings})
            while pending:
                check_interrupt()
                name = pending[0]
                try:
                    rows.append(session.row(name, settings.get(name)))
                except ValueError as error:
                    if name == PLAIN:
                        raise
                    failed[name] = str(error)
                pending.pop(0)
                save(session.comparison(rows, pending, failed))
        except KeyboardInterrupt:
            if not rows:
                raise
    return session.comparison(rows, pending, failed)


def _check(model: nn.Module, settings: Mapping[str, Settings]) -> None:
    """Fail early for settings that do not fit.

    Raises:
        ValueError: names all such settings and the reasons.
    """
    if PLAIN in settings:
        raise ValueError(f"a setting must not be named {PLAIN!r}, the name of the plain model")
    problems = []
    for name, setting in settings.items():
        try:
            expedited_copy(model, setting)
        except ValueError as error:
            problems.append(f"setting {name!r}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
