"""`expedit report`; its options are in `commands`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..comparison import Comparison
from ..engine import check_file, one_sentence
from ..report import read_pictures, write_report
from .commands import parser_of


def parse_arguments(arguments: list[str] | None, prog: str = "report.py") -> argparse.Namespace:
    return parser_of("report", prog).parse_args(arguments)


def read_comparison(path: str) -> Comparison:
    """
    Raises:
        ValueError: if the file is not a comparison.
        OSError: if it cannot be read.
    """
    try:
        return Comparison.from_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path!r} is not the JSON of a comparison: {error}") from None


def run(arguments: list[str] | None = None, prog: str = "report.py") -> None:
    """Parse the arguments and run; expected errors end with one sentence."""
    args = parse_arguments(arguments, prog)
    with one_sentence(prog):
        check_file(args.output, "--output")
        comparisons = [read_comparison(path) for path in args.results]
        path = write_report(comparisons, read_pictures(args.pictures), args.output)
    print(f"report: {path}")
