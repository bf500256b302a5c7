"""Whether files may run code while they are read, which the user must allow.

Loading pickles and some YAML tags can run arbitrary code. By default files are read as data only,
and others are refused. The option ``--run-code-in-files`` of the commands, or the environment
variable for any program, allows unrestricted loading.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["REMEDY", "VARIABLE", "code_in_files", "runs_code"]

VARIABLE = "EXPEDIT_RUN_CODE_IN_FILES"
#: End of the error message for a refused file.
REMEDY = f"if you trust whoever made it, set {VARIABLE}=1"


def runs_code() -> bool:
    """Whether files may run code."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


@contextmanager
def code_in_files(allowed: bool) -> Iterator[None]:
    """Let files run code inside the context, also in subprocesses; False changes nothing."""
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
