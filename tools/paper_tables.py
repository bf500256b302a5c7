#!/usr/bin/env python
"""Print the published tables of Expedit next to the counts and measurements of this package.

GFLOPs take a minute or two and little memory. Speed is that of one forward pass of the transformer
and decoder on one window, batch 1, plain and expedited models in turns; a ViT-L on a few CPU cores
needs a quarter of a minute for each. The JSON file is written after each row.

Examples::

    python tools/paper_tables.py --no-timing
    python tools/paper_tables.py --models Segmenter --datasets ADE20K --json tables.json
    python tools/paper_tables.py --device cuda --dtype float16 --repeats 50
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from expedit_d2.analysis.timing import DTYPES
from expedit_d2.cli.options import ToolParser, at_least
from expedit_d2.engine import check_file, choose_device, one_sentence
from expedit_d2.paper import (
    Result,
    Table,
    count_row,
    select_tables,
    time_table,
    to_text,
    write_json,
)

Save = Callable[[list[Result]], None]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser("paper_tables.py", __doc__)
    option = parser.add_argument
    option("--models", nargs="+", metavar="NAME", help="Segmenter, DPT, …; default: all")
    option("--datasets", nargs="+", metavar="NAME", help="ADE20K, KITTI, …; default: all")
    option("--no-timing", action="store_true", help="GFLOPs only")
    option("--repeats", type=at_least(1), default=3, help="timed rounds after a warm-up round (3)")
    option("--threads", type=at_least(1), help="CPU threads (PyTorch's own choice)")
    option("--device", choices=["cpu", "cuda"], help="where to time (cuda, if there is one)")
    option("--dtype", choices=DTYPES, default="float32", help="for timing, by autocast (float32)")
    option("--json", type=Path, metavar="FILE", help="also write the rows here")
    return parser.parse_args(arguments)


def count_all(tables: list[Table], results: list[Result], save: Save) -> None:
    """Append the result of every row, saving after each."""
    rows = [(table, row) for table in tables for row in table.rows]
    for table, row in tqdm(rows, desc="counting", unit="row"):
        results.append(count_row(table, row))
        save(results)


def time_all(
    tables: list[Table], results: list[Result], save: Save, args: argparse.Namespace
) -> None:
    """Fill in the measured speed-ups, table by table, saving after each."""
    start = 0
    for table in tqdm(tables, desc="timing", unit="table"):
        seconds = time_table(table, args.repeats, args.device, getattr(torch, args.dtype))
        for index, taken in enumerate(seconds, start):
            speedup = seconds[0].median / taken.median
            results[index] = replace(results[index], speedup_measured=speedup)
        start += len(seconds)
        save(results)


def conditions(args: argparse.Namespace) -> str:
    """A sentence on how the speed-ups were measured."""
    if args.no_timing:
        return "Speed was not measured (--no-timing)."
    where = f"the CPU (threads: {torch.get_num_threads()})"
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    return (
        f"Measured: one forward pass (Mask2Former: of its backbone) on {where}, {args.dtype}, "
        f"batch 1, medians (repeats: {args.repeats}) of calls in turns, torch {torch.__version__}; "
        "published: ratios of FPS on the authors' GPU."
    )


def main(args: argparse.Namespace) -> None:
    if args.json is not None:
        check_file(args.json, "--json")
        args.json.parent.mkdir(parents=True, exist_ok=True)
    tables = select_tables(args.models, args.datasets)
    setup_logger(name="detectron2").setLevel("ERROR")  # the progress bars say enough
    found = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = choose_device(args.device or found, "--device")
    if args.threads:
        torch.set_num_threads(args.threads)
    save = partial(write_json, path=args.json) if args.json else lambda results: None
    results: list[Result] = []
    try:
        count_all(tables, results, save)
        if not args.no_timing:
            time_all(tables, results, save, args)
    finally:  # also after an interruption
        if results:
            print(f"\n{to_text(results)}\n{conditions(args)}")


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; expected errors end with one sentence."""
    args = parse_arguments(arguments)
    with one_sentence("paper_tables.py", "the table has the rows that are done"):
        main(args)


if __name__ == "__main__":
    run()
