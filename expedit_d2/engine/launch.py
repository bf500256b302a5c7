"""One process or several, by Detectron2's own `launch`, and all of them leave in good order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import detectron2.engine
import torch.distributed as dist
from detectron2.utils import comm

__all__ = ["launch"]


def launch(main: Callable[..., Any], num_processes: int, args: tuple = (), **options: Any) -> None:
    """Run ``main(*args)`` in several processes on each machine: a GPU each, or gloo on the CPU.

    Detectron2 leaves the process group as it is. Gloo's threads may then be running while a process
    ends, which now and then aborts it behind its work.

    Args:
        main: a function of a module, run by every process.
        num_processes: on each machine.
        args: for it.
        **options: further arguments of `detectron2.engine.launch`.
    """
    detectron2.engine.launch(_run, num_processes, args=(main, args), **options)


def _run(main: Callable[..., Any], args: tuple) -> None:
    main(*args)
    if dist.is_available() and dist.is_initialized():
        comm.synchronize()
        dist.destroy_process_group()
