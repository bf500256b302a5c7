"""From the options that `expedit compare` and `expedit tune` share to what they measure."""

from __future__ import annotations

import argparse

import torch
from detectron2.utils.logger import setup_logger

from ..comparison import Options, Store, Workload
from ..data import register_collage
from ..engine import check_file, check_folder
from .workloads import load_workload, model_workload

__all__ = ["measuring_options", "prepare", "prepare_benchmark"]


def prepare_benchmark(args: argparse.Namespace) -> None:
    """Check ``--device`` and ``--json``, and take as many threads as are wanted.

    Raises:
        ValueError: without the device.
        OSError: for a file that cannot be written.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU; give --device cpu")
    if args.json is not None:
        check_file(args.json, "--json")
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def measuring_options(args: argparse.Namespace) -> Options:
    """How to measure."""
    return Options(args.dtype, args.timed, args.batch)


def prepare(args: argparse.Namespace) -> tuple[Workload, Store]:
    """The model and its data, with as many threads and as few log lines as are wanted.

    Returns:
        them, and where results are kept.

    Raises:
        ValueError, OSError: as `load_workload` and `model_workload`, or for an output folder that
            cannot be written to, or holds results of something else.
    """
    setup_logger(name="detectron2").setLevel("ERROR")  # the progress bars say enough
    check_folder(args.output, "--output")
    store = Store(args.output)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    register_collage()
    if args.model is None:
        check_model_options(args)
        return load_workload(args.config_file, args.opts, args.images, args.first), store
    if args.opts:
        raise ValueError(f"overrides are of a config, and --model has none, got {args.opts[0]!r}")
    torch.manual_seed(0)  # so that random weights are the same when the command is resumed
    workload = model_workload(args.model, args.images, args.first, args.size, args.random_weights)
    return workload, store


def check_model_options(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: for an option of --model without it.
    """
    for option, given in (("--size", args.size), ("--random-weights", args.random_weights)):
        if given:
            raise ValueError(f"{option} goes with --model; a config says such things itself")
