"""What the command lines of the tools have in common."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NoReturn

import torch
from detectron2.utils.logger import setup_logger

from ..analysis.timing import DTYPES
from ..comparison import Options, Store, Subject
from ..data import register_collage
from ..engine import check_file, check_folder
from ..engine.errors import end
from ..files import add_trust_option
from ..files.shipped import find_config
from .subjects import load_subject

__all__ = [
    "ToolParser",
    "add_config_options",
    "add_measuring_options",
    "at_least",
    "height_width",
    "measuring_options",
    "prepare",
    "prepare_benchmark",
]

EMBEDDED = "configs/embedded/segmenter.yaml"


class ToolParser(argparse.ArgumentParser):
    """A parser that shows a tool's docstring as it is, and says in one line what is wrong."""

    def __init__(self, tool: str, description: str) -> None:
        """
        Args:
            tool: file name of the tool.
            description: its docstring.
        """
        super().__init__(
            prog=tool,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        end(self.prog, f"{message}; --help lists the options")


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from ``least`` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number, {least} or more, got {text!r}"
            )
        return value

    return number


def height_width(text: str) -> tuple[int, int]:
    """The type of an option for a size: "640x480" to (640, 480)."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH in pixels, got {text!r}")
    height, width = map(int, text.split("x"))
    return height, width


def add_config_options(
    parser: argparse.ArgumentParser, help: str = "YAML or LazyConfig", default: str | None = None
) -> None:
    """The config, what overrides it, modules to import before it is read, and trust in its files.

    Args:
        parser: of a tool that reads a config.
        help: on ``--config-file``.
        default: of ``--config-file``, which is required without one.
    """
    option = parser.add_argument
    option(
        "--config-file",
        type=lambda name: str(find_config(name)) if name else name,
        metavar="FILE",
        required=default is None,
        default=default,
        help=f"{help}; or the name of one that comes with the package, such as {EMBEDDED}",
    )
    option(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module, or a .py file, that registers models or data sets of yours, imported "
        "before the config is read; may be given several times",
    )
    option(
        "opts",
        nargs="*",
        metavar="OVERRIDE",
        help="config overrides: KEY VALUE, or key=value for a LazyConfig",
    )
    add_trust_option(parser)


def add_measuring_options(parser: argparse.ArgumentParser, output: str) -> None:
    """The model, its data, how to measure, and ``output``, the folder of the results."""
    option = parser.add_argument
    add_config_options(parser, "YAML or LazyConfig (embedded Segmenter)", EMBEDDED)
    option("--images", metavar="FOLDER_OR_PATTERN", help="images without labels")
    option("--first", type=at_least(1), metavar="N", help="only the first images, without metrics")
    option(
        "--timed", type=at_least(0), default=20, help="images to time; 0: no speed (%(default)s)"
    )
    option("--batch", type=at_least(1), default=4, help="images in a batch; 1: none (%(default)s)")
    option("--dtype", choices=DTYPES, default="float32", help="by autocast (%(default)s)")
    option("--threads", type=at_least(1), help="CPU threads of torch (its own choice)")
    option("--output", default=output, help="folder of the results (%(default)s)")


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


def prepare(args: argparse.Namespace) -> tuple[Subject, Store]:
    """The model and its data, with as many threads and as few log lines as are wanted.

    Returns:
        them, and where results are kept.

    Raises:
        ValueError, OSError: as `load_subject`, or for an output folder that cannot be written to,
            or holds results of something else.
    """
    setup_logger(name="detectron2").setLevel("ERROR")  # the progress bars say enough
    check_folder(args.output, "--output")
    store = Store(args.output)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    register_collage()
    return load_subject(args.config_file, args.opts, args.images, args.first), store
