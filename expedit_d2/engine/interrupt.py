"""Deferred Ctrl-C, which is never lost and stops work only at safe points.

By default Ctrl-C raises ``KeyboardInterrupt`` anywhere. In a ``__del__`` or another place whose
exceptions are only printed, it is lost. Here the first Ctrl-C sets a flag, and `check_interrupt`
raises the exception, for instance between two images; a second Ctrl-C raises it at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["check_interrupt", "interruptible"]

_MESSAGE = b"\nStopping after this step; press Ctrl-C again to stop at once.\n"


class _State:
    """State of the process, as signals are handled by its main thread."""

    active = False
    pending = False


@contextmanager
def interruptible() -> Iterator[None]:
    """Defer the first Ctrl-C inside the context to the next `check_interrupt`, or to its end.

    May be nested; only the outermost context has an effect. Nothing changes outside the main
    thread, or if Ctrl-C is ignored.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if _State.active or not main or before in (signal.SIG_IGN, None):
        yield
        return
    process = os.getpid()

    def handler(number: int, frame: FrameType | None) -> None:
        if _State.pending:
            raise KeyboardInterrupt
        _State.pending = True
        if os.getpid() == process:  # workers of data loaders inherit this handler
            os.write(2, _MESSAGE)

    signal.signal(signal.SIGINT, handler)
    _State.active = True
    try:
        yield
        check_interrupt()
    finally:
        signal.signal(signal.SIGINT, before)
        _State.active = _State.pending = False


def check_interrupt() -> None:
    """
    Raises:
        KeyboardInterrupt: if Ctrl-C was pressed inside `interruptible` since the last check.
    """
    if _State.pending:
        _State.pending = False
        raise KeyboardInterrupt
