"""Ctrl-C that is never lost, and that ends work where it can be ended.

By default Ctrl-C raises ``KeyboardInterrupt`` wherever the program happens to be. If that is in a
``__del__`` or another place whose exceptions are only printed, the program runs on. Here the first
Ctrl-C only leaves a mark, which `check_interrupt` turns into the exception, between two images
for instance; a second one raises it at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["check_interrupt", "interruptible"]

_MESSAGE = b"\nEnding after this step; Ctrl-C once more ends at once.\n"


class _State:
    """Of the process: signals come to its main thread alone."""

    active = False
    pending = False


@contextmanager
def interruptible() -> Iterator[None]:
    """Defer the first Ctrl-C inside to the next `check_interrupt`, at the latest to the end.

    May be nested; the outermost one counts. In other threads than the main one, and where Ctrl-C
    is ignored, nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if _State.active or not main or before in (signal.SIG_IGN, None):
        yield
        return
    process = os.getpid()

    def mark(number: int, frame: FrameType | None) -> None:
        if _State.pending:
            raise KeyboardInterrupt
        _State.pending = True
        if os.getpid() == process:  # workers of data loaders are given this handler, too
            os.write(2, _MESSAGE)

    signal.signal(signal.SIGINT, mark)
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
        KeyboardInterrupt: if Ctrl-C was pressed inside of `interruptible` since the last time.
    """
    if _State.pending:
        _State.pending = False
        raise KeyboardInterrupt
