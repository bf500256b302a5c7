#!/usr/bin/env python
"""One real model of every family: exactness, GFLOPs and speed on a CPU, as a table.

Models have random weights and the sizes of published ones: SAM ViT-B at 1024², DINOv2-L at 518²,
Mask2Former Swin-B at 1024², … They are measured one after another, plain and expedited in turns,
with one image. Each takes a few minutes and up to 6 GB of memory. Finished ones are kept in the
output folder, so the same command goes on after an interruption.

Examples::

    python tools/benchmark_families.py --threads 1
    python tools/benchmark_families.py --threads 1 --models DINOv3 SWAG --repeats 1
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict
from pathlib import Path

import torch

from expedit_d2.analysis.timing import processor
from expedit_d2.cli.options import ToolParser, at_least
from expedit_d2.comparison import Store
from expedit_d2.comparison.origin import versions
from expedit_d2.comparison.store import fingerprint
from expedit_d2.engine import one_sentence
from expedit_d2.families import FAMILIES, Family, Row, measure, table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser("benchmark_families.py", __doc__)
    option = parser.add_argument
    option("--models", nargs="+", metavar="NAME", help="those with this in their names (all)")
    option("--budget", type=float, default=0.5, help="of the blocks' GFLOPs (%(default)s)")
    option("--repeats", type=at_least(1), default=5, help="timed rounds (%(default)s)")
    option("--warmup", type=at_least(0), default=1, help="rounds before these (%(default)s)")
    option("--threads", type=at_least(1), help="CPU threads of torch (its own choice)")
    option("--output", default="output/families", help="folder of the results (%(default)s)")
    return parser.parse_args(arguments)


def chosen(parts: list[str] | None) -> list[Family]:
    """The families with one of these in their names, in any case; None: all.

    Raises:
        ValueError: if there is none.
    """
    found = [
        family
        for family in FAMILIES
        if parts is None or any(part.lower() in str(family).lower() for part in parts)
    ]
    if not found:
        known = "; ".join(map(str, FAMILIES))
        raise ValueError(f"--models {' '.join(parts)} is in no name of: {known}")
    return found


def main(args: argparse.Namespace) -> list[Row]:
    families, store = chosen(args.models), Store(args.output)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    conditions = {
        "processor": processor("cpu"),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "budget": args.budget,
        "repeats": args.repeats,
        "warmup": args.warmup,
    }
    rows = []
    for family in families:
        if not family.available:
            print(f"{family}: left out, {family.package} is not installed", flush=True)
            continue
        key = fingerprint(str(family), conditions)
        if store.get(key) is None:
            row = measure(family, args.budget, args.repeats, args.warmup)
            store.put(key, asdict(row), str(family))
            gc.collect()  # of traced models, before the next one is built
        rows.append(Row(**store.get(key)))
        print(f"{family}: {rows[-1].setting}", flush=True)
    text = (
        f"{conditions['processor']}, {conditions['threads']} threads, torch {torch.__version__}, "
        f"batch 1, medians of {args.repeats} rounds in turns, budget {args.budget:g}\n\n"
        f"{table(rows)}\n"
    )
    print(f"\n{text}")
    (Path(args.output) / "table.md").write_text(text, encoding="utf-8")
    return rows


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    args = parse_arguments(arguments)
    with one_sentence(
        "benchmark_families.py", "what was measured is kept; the same command goes on from here"
    ):
        main(args)


if __name__ == "__main__":
    run()
