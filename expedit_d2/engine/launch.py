"""Detectron2's `launch` for one or several processes, with a clean exit."""

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
    """Run ``main(*args)`` in one or several processes per machine: one per GPU, or gloo on the CPU.

    Detectron2 does not destroy the process group, so gloo's threads may still run while a process
    exits, which occasionally aborts it. Here the group is destroyed, and each of several processes
    exits without Python's teardown, during which aborts were still seen.

    Args:
        main: a function of a module.
        num_processes: processes per machine.
        args: arguments of ``main``.
        **options: further arguments of `detectron2.engine.launch`.

    Raises:
        ValueError: for fewer than one process, or more than GPUs.
        ProcessRaisedException: for an error in one of several processes, see `errors.explain`.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    if num_processes < 1 or (gpus is not None and num_processes > max(gpus, 1)):
        most = "" if gpus is None else f" and at most {gpus}, the GPUs of this machine"
        raise ValueError(f"--num-gpus must be 1 or more{most}, got {num_processes}")
    # Do not log which processes are terminated after an error.
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
        # The parent process receives only the text of an error.
        raise ExplainedError(sentence) from None
    if not alone:
        comm.synchronize()
        dist.destroy_process_group()
        if multiprocessing.parent_process() is not None:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
