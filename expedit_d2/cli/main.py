"""The command `expedit COMMAND`."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from importlib.util import find_spec

from .. import __version__
from ..ending import end
from .commands import COMMANDS, parser_of
from .options import ToolParser

__all__ = ["main"]

_HEAD = """Faster large vision transformers for dense prediction, without fine-tuning.

  {commands}

`expedit COMMAND --help` shows the options of a command, with examples."""

_NO_DETECTRON2 = (
    "Detectron2 is not installed, and pip cannot find it by its name: run tools/install.py of this "
    "project's repository, or pip install git+https://github.com/facebookresearch/detectron2; "
    "`expedite` in Python works without it"
)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; expected errors end with one sentence and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    summaries = {
        name: (inspect.getdoc(command) or "").partition("\n")[0]
        for name, command in COMMANDS.items()
    }
    lines = [f"{name:<9}{summary}" for name, summary in summaries.items()]
    parser = ToolParser("expedit", _HEAD.format(commands="\n  ".join(lines)))
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="see above")
    command = parser.parse_args(arguments[:1]).command
    prog, rest = f"expedit {command}", arguments[1:]
    parser_of(command, prog).parse_args(rest)  # show help and errors before importing torch
    if find_spec("detectron2") is None:
        end(prog, _NO_DETECTRON2)
    import_module(f".{command}", __package__).run(rest, prog)
