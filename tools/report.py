#!/usr/bin/env python
"""Write one HTML page on saved comparisons: plots, table, conditions and pictures.

Examples::

    python tools/report.py output/compare/segmenter.json --output report.html

    python tools/report.py a.json b.json --pictures output/pictures --output report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from expedit_d2.cli.arguments import ToolParser
from expedit_d2.comparison import Comparison
from expedit_d2.engine import check_file, one_sentence
from expedit_d2.report import read_pictures, write_report


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser("report.py", __doc__)
    parser.add_argument("results", nargs="+", help="JSON files of comparisons")
    parser.add_argument("--pictures", nargs="+", default=[], help="image files, or folders of them")
    parser.add_argument("--output", default="report.html", help="the page")
    return parser.parse_args(arguments)


def read_comparison(path: str) -> Comparison:
    """
    Raises:
        ValueError: if the file holds something else.
        OSError: if it cannot be read.
    """
    try:
        return Comparison.from_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path!r} is not the JSON of a comparison: {error}") from None


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    args = parse_arguments(arguments)
    with one_sentence("report.py"):
        check_file(args.output, "--output")
        comparisons = [read_comparison(path) for path in args.results]
        path = write_report(comparisons, read_pictures(args.pictures), args.output)
    print(f"report: {path}")


if __name__ == "__main__":
    run()
