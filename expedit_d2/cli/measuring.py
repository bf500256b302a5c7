"""Model, data and measurement options for `expedit compare` and `expedit tune`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from detectron2.utils.logger import setup_logger

from ..comparison import Options, Store, Workload
from ..data import register_collage
from ..engine import check_file, check_folder
from .workloads import load_workload, model_workload

__all__ = [
    "check_model_options",
    "measuring_options",
    "prepare",
    "prepare_benchmark",
    "workload_of_model",
]


def prepare_benchmark(args: argparse.Namespace) -> None:
    """Check ``--device`` and ``--json``, and set the number of threads.

    Raises:
        ValueError: if the device is not available.
        OSError: if the file cannot be written.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU; give --device cpu")
    if args.json is not None:
        check_file(args.json, "--json")
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def measuring_options(args: argparse.Namespace) -> Options:
    return Options(args.dtype, args.timed, args.batch)


def prepare(args: argparse.Namespace) -> tuple[Workload, Store]:
    """The model with its data, and the store of results; also sets threads and logging.

    Raises:
        ValueError, OSError: from `load_workload` and `model_workload`, or for an output folder that
            cannot be written to, or has results of something else.
    """
    setup_logger(name="detectron2").setLevel("ERROR")  # there are progress bars
    check_folder(args.output, "--output")
    store = Store(args.output)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    register_collage()
    if args.model is None:
        check_model_options(args)
        return load_workload(args.config_file, args.opts, args.images, args.first), store
    return workload_of_model(args, args.first), store


def workload_of_model(args: argparse.Namespace, limit: int | None = None) -> Workload:
    """The workload of ``--model`` and its options; ``limit`` and errors are `model_workload`'s."""
    check_model_options(args)
    torch.manual_seed(0)  # the same random weights when the command is resumed
    return model_workload(args.model, args.images, limit, args.size, args.random_weights)


def check_model_options(
    args: argparse.Namespace, options: Sequence[str] = ("size", "random_weights")
) -> None:
    """
    Raises:
        ValueError: for an option of --model without it, or of a config with it.
    """
    if args.model is not None:
        if args.opts:
            raise ValueError(
                f"--model has no config, so it takes no overrides, got {args.opts[0]!r}"
            )
        return
    for name in options:
        if getattr(args, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} needs --model; a config sets this itself")
