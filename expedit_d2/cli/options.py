"""Options that several command lines have; nothing heavy is imported for them."""

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
    "add_trust_option",
    "at_least",
    "height_width",
]

EMBEDDED = "configs/embedded/small_segmenter.yaml"


class ToolParser(argparse.ArgumentParser):
    """A parser that shows a description as it is, and says in one line what is wrong."""

    def __init__(self, tool: str, description: str) -> None:
        """
        Args:
            tool: how it is called.
            description: what it does.
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
    """The type of an option that takes ``HEIGHTxWIDTH``, in pixels."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH in pixels, got {text!r}")
    height, width = map(int, text.split("x"))
    return height, width


def _config_path(name: str) -> str:
    from ..files.shipped import find_config

    return str(find_config(name)) if name else name


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Whether files may run code while they are read; the value is for `code_in_files`."""
    parser.add_argument(
        "--run-code-in-files",
        action="store_true",
        help="read weights and configs in the old way, which runs any code that is in them; only "
        "for files of people you trust",
    )


def add_config_options(
    parser: argparse.ArgumentParser,
    help: str = "YAML or LazyConfig",
    default: str | None = None,
    group: argparse._ActionsContainer | None = None,
) -> None:
    """The config, what overrides it, modules to import before it is read, and trust in its files.

    Args:
        parser: of a tool that reads a config.
        help: on ``--config-file``.
        default: of ``--config-file``, which is required without one.
        group: of options that exclude each other, which ``--config-file`` is one of.
    """
    option = parser.add_argument
    (group or parser).add_argument(
        "--config-file",
        type=_config_path,
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
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        metavar="LIBRARY:NAME",
        help="a ViT of another library, whose features are compared: hf:NAME or hf:FOLDER, "
        "timm:NAME, torchvision:NAME, sam:FILE",
    )
    add_config_options(parser, "YAML or LazyConfig (the small Segmenter)", EMBEDDED, model)
    option(
        "--size",
        type=height_width,
        metavar="HxW",
        help="with --model: images are resized to that, multiples of the patch (the model's own)",
    )
    option(
        "--random-weights",
        action="store_true",
        help="with --model: do not look for trained weights; GFLOPs and speed are the same",
    )
    option("--images", metavar="FOLDER_OR_PATTERN", help="images without labels")
    option("--first", type=at_least(1), metavar="N", help="only the first images, without metrics")
    option(
        "--timed", type=at_least(0), default=20, help="images to time; 0: no speed (%(default)s)"
    )
    option("--batch", type=at_least(1), default=4, help="images in a batch; 1: none (%(default)s)")
    option("--dtype", choices=DTYPES, default="float32", help="by autocast (%(default)s)")
    option("--threads", type=at_least(1), help="CPU threads of torch (its own choice)")
    option("--output", default=output, help="folder of the results (%(default)s)")
