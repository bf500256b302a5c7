"""How every tool ends that does not do what it was asked to; needs neither torch nor Detectron2."""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["end"]


def end(tool: str, sentence: str, status: int = 2) -> NoReturn:
    """Say on stderr why a tool ends, and leave with a status; the exception's text says it too."""
    text = f"{tool}: {sentence}"
    sys.stdout.flush()
    print(text, file=sys.stderr)
    left = SystemExit(text)
    left.code = status  # so that Python does not print the text once more
    raise left from None
