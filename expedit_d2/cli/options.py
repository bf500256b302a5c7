"""Options shared by several commands, without heavy imports."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NoReturn

from ..dtypes import DTYPES
from ..ending import end

__all__ = [
    "ToolParser",
    "add_config_options",
    "add_measuring_options",
    "add_model_options",
    "add_trust_option",
    "at_least",
    "height_width",
]

EMBEDDED = "configs/embedded/small_segmenter.yaml"


class ToolParser(argparse.ArgumentParser):
    """A parser with a preformatted description and one-line errors."""

    def __init__(self, tool: str, description: str) -> None:
        """
        Args:
            tool: program name.
            description: shown by ``--help``.
        """
        super().__init__(
            prog=tool,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        end(self.prog, f"{message}; --help lists the options")


def at_least(least: int) -> Callable[[str], int]:
    """Option type for integers of at least ``least``."""

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
    """Option type for ``HEIGHTxWIDTH`` in pixels."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH in pixels, got {text!r}")
    height, width = map(int, text.split("x"))
    return height, width


def _config_path(name: str) -> str:
    from ..files.shipped import find_config

    return str(find_config(name)) if name else name


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--run-code-in-files``, the argument of `code_in_files`."""
    parser.add_argument(
        "--run-code-in-files",
        action="store_true",
        help="let weights and configs run code that they contain while they are read; only for "
        "files from people you trust",
    )


def add_config_options(
    parser: argparse.ArgumentParser,
    help: str = "YAML or LazyConfig",
    default: str | None = None,
    group: argparse._ActionsContainer | None = None,
) -> None:
    """Add the config, its overrides, modules to import before it is read, and trust in files.

    Args:
        parser: of a command that reads a config.
        help: of ``--config-file``.
        default: of ``--config-file``, which is required without it and without a group.
        group: mutually exclusive group to add ``--config-file`` to.
    """
    option = parser.add_argument
    (group or parser).add_argument(
        "--config-file",
        type=_config_path,
        metavar="FILE",
        required=default is None and group is None,
        default=default,
        help=f"{help}; or the name of one in the package, such as {EMBEDDED}",
    )
    option(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module or .py file that registers your models or data sets, imported before the "
        "config is read; can be repeated",
    )
    option(
        "opts",
        nargs="*",
        metavar="OVERRIDE",
        help="config overrides: KEY VALUE, or key=value for a LazyConfig",
    )
    add_trust_option(parser)


def add_model_options(
    parser: argparse.ArgumentParser,
    help: str = "YAML or LazyConfig",
    default: str | None = None,
    size: str = "with --model: resize images, in whole patches (default: the model's)",
) -> None:
    """Add the model, of another library or of a config, with all of `add_config_options`.

    Args:
        parser: of a command that takes both.
        help: of ``--config-file``.
        default: of ``--config-file``; None: one of the two must be given.
        size: help of ``--size``.
    """
    model = parser.add_mutually_exclusive_group(required=default is None)
    model.add_argument(
        "--model",
        metavar="LIBRARY:NAME",
        help="a ViT of another library, for its features: hf:NAME or hf:FOLDER, timm:NAME, "
        "torchvision:NAME, sam:FILE",
    )
    add_config_options(parser, help, default, model)
    parser.add_argument("--size", type=height_width, metavar="HxW", help=size)
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="with --model: do not load trained weights; GFLOPs and speed are the same",
    )


def add_measuring_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the model, its data, measurement options, and ``output``, the folder for results."""
    option = parser.add_argument
    add_model_options(parser, "YAML or LazyConfig (the small Segmenter)", EMBEDDED)
    option("--images", metavar="FOLDER_OR_PATTERN", help="images without labels")
    option("--first", type=at_least(1), metavar="N", help="only the first N images, no metrics")
    option("--timed", type=at_least(0), default=20, help="images to time; 0: none (%(default)s)")
    option(
        "--batch", type=at_least(1), default=4, help="batch size to time besides 1 (%(default)s)"
    )
    option("--dtype", choices=DTYPES, default="float32", help="of autocast (%(default)s)")
    option("--threads", type=at_least(1), help="CPU threads of PyTorch (default: PyTorch's)")
    option("--output", default=output, help="folder for the results (%(default)s)")
