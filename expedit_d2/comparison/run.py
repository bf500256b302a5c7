"""One setting after the other, to the end or to an interruption."""

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
    """The plain model and the same model with each setting.

    An interruption (Ctrl-C, ``KeyboardInterrupt``) ends it early: the result has the rows that are
    finished, and names the other settings. A setting that fails on an image is named with the
    reason, and the others are finished.

    Args:
        workload: the model and its data.
        settings: name to settings.
        options: how to measure.
        store: keeps results, so that the same call continues where this one stopped.
        save: called with the comparison so far, after each row.

    Returns:
        The plain model's row, then one for each setting in order.

    Raises:
        ValueError: for settings that do not fit the model, a setting named like the plain model, or
            if the plain model fails on an image.
        KeyboardInterrupt: if not even the plain model is finished.
    """
    _check(workload.model, settings)
    session = Session(workload, options, store)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    left = [PLAIN, *settings]
    with interruptible():
        try:
            while left:
                check_interrupt()
                name = left[0]
                try:
                    rows.append(session.row(name, settings.get(name)))
                except ValueError as error:
                    if name == PLAIN:
                        raise
                    failed[name] = str(error)
                left.pop(0)
                save(session.comparison(rows, left, failed))
        except KeyboardInterrupt:
            if not rows:
                raise
    return session.comparison(rows, left, failed)


def _check(model: nn.Module, settings: Mapping[str, Settings]) -> None:
    """Fail early for settings that do not fit.

    Raises:
        ValueError: names every setting that does not fit, and why.
    """
    if PLAIN in settings:
        raise ValueError(f"a setting must not be named {PLAIN!r}, as the plain model is")
    problems = []
    for name, setting in settings.items():
        try:
            expedited_copy(model, setting)
        except ValueError as error:
            problems.append(f"setting {name!r}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
