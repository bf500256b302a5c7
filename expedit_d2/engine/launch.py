"""One process or several, by Detectron2's own `launch`, and all of them leave in good order."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import detectron2.engine
import torch
import torch.distributed as dist
from detectron2.utils import comm

from .errors import ExplainedError, explain

__all__ = ["launch"]


def launch(main: Callable[..., Any], num_processes: int, args: tuple = (), **options: Any) -> None:
    """Run ``main(*args)`` in several processes on each machine: a GPU each, or gloo on the CPU.

    Detectron2 leaves the process group as it is. Gloo's threads may then be running while a process
    ends, which now and then aborts it after its work. So the group is taken down, and each of
    several processes ends without Python's own teardown, during which that was still seen.

    Args:
        main: a function of a module, run by every process.
        num_processes: on each machine.
        args: for it.
        **options: further arguments of `detectron2.engine.launch`.

    Raises:
        ValueError: for fewer than one process, or more than there are GPUs.
        ProcessRaisedException: for an error in one of several processes; `errors.explain` knows it.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    if num_processes < 1 or (gpus is not None and num_processes > max(gpus, 1)):
        most = "" if gpus is None else f" and at most {gpus}, the GPUs of this machine"
        raise ValueError(f"--num-gpus must be 1 or more{most}, got {num_processes}")
    # It says which processes it ends after an error; the error itself says enough.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    detectron2.engine.launch(_run, num_processes, args=(main, args), **options)


def _run(main: Callable[..., Any], args: tuple) -> None:
    alone = not (dist.is_available() and dist.is_initialized())
    try:
        main(*args)
    except Exception as error:
        sentence = None if alone else explain(error)
        if sentence is None:
            raise
        # Only text reaches the process that started this one.
        raise ExplainedError(sentence) from None
    if not alone:
        comm.synchronize()
        dist.destroy_process_group()
        if multiprocessing.parent_process() is not None:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
