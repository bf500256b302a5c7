"""What the command lines of tools that measure have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from detectron2.utils.logger import setup_logger

from expedit_d2.comparison import Options, Subject
from expedit_d2.comparison.session import DTYPES
from expedit_d2.data import register_collage

from .subjects import load_subject

__all__ = ["add_measuring_options", "measuring_options", "prepare"]

EMBEDDED = Path(__file__).resolve().parent.parent / "configs" / "embedded" / "segmenter.yaml"


def add_measuring_options(parser: argparse.ArgumentParser, output: str) -> None:
    """The model, its data, how to measure, and ``output``, the folder of the results."""
    option = parser.add_argument
    option("--config-file", default=str(EMBEDDED), help="YAML or LazyConfig (embedded Segmenter)")
    option("--images", metavar="FOLDER_OR_PATTERN", help="images without labels")
    option("--first", type=int, metavar="N", help="only the first images, without metrics")
    option("--timed", type=int, default=20, help="images to time; 0: no speed (%(default)s)")
    option("--batch", type=int, default=4, help="images in a batch; 1: none (%(default)s)")
    option("--dtype", choices=DTYPES, default="float32", help="by autocast (%(default)s)")
    option("--threads", type=int, help="CPU threads of torch (its own choice)")
    option("--output", default=output, help="folder of the results (%(default)s)")
    option("opts", nargs="*", help="config overrides: KEY VALUE, or key=value for a LazyConfig")


def measuring_options(args: argparse.Namespace) -> Options:
    """How to measure.

    Raises:
        ValueError: for values out of range.
    """
    return Options(args.dtype, args.timed, args.batch)


def prepare(args: argparse.Namespace) -> Subject:
    """The model and its data, with as many threads and as few log lines as are wanted.

    Raises:
        ValueError, FileNotFoundError: as `load_subject`.
    """
    setup_logger(name="detectron2").setLevel("ERROR")  # the progress bars say enough
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be 1 or more, got {args.threads}")
        torch.set_num_threads(args.threads)
    register_collage()
    return load_subject(args.config_file, args.opts, args.images, args.first)
