"""Whether files may run code while they are read. They may not, unless the user allows it.

Pickles and some YAML tags are small programs, which run when read in the usual way. Here they are
read as data; what cannot be read so is refused. The option ``--run-code-in-files`` of a tool, or
the environment variable for any of them and for other programs, restores the usual way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["REMEDY", "VARIABLE", "code_in_files", "runs_code"]

VARIABLE = "EXPEDIT_RUN_CODE_IN_FILES"
#: The end of a sentence that refuses a file.
REMEDY = f"if you trust whoever made it, set {VARIABLE}=1"


def runs_code() -> bool:
    """Whether files may run code."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


@contextmanager
def code_in_files(allowed: bool) -> Iterator[None]:
    """Let files run code for a while; False changes nothing.

    It is stored in the environment, so that processes started meanwhile know it too.
    """
    before = os.environ.get(VARIABLE)
    if allowed:
        os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if before is not None:
            os.environ[VARIABLE] = before
        else:
            os.environ.pop(VARIABLE, None)
