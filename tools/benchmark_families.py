#!/usr/bin/env python
"""One real model of every family: exactness, GFLOPs and speed on a CPU, as a table.

Models have random weights and the sizes of published ones: SAM ViT-B at 1024², DINOv2-L at 518²,
Mask2Former Swin-B at 1024², … They are measured one after another, plain and expedited in turns,
with one image. Each takes a few minutes and up to 6 GB of memory. Results are kept in the output
folder, so the same command continues after an interruption.

Examples::

    python tools/benchmark_families.py --threads 1
    python tools/benchmark_families.py --threads 1 --models DINOv3 SWAG --repeats 1

With several budgets, large models with windows are measured at each: ViTDet, Swin-L, SAM's ViT-H::

    python tools/benchmark_families.py --budget 0.7 0.5 0.35 --repeats 3 --output output/large
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from expedit_d2.analysis.timing import processor
from expedit_d2.cli.options import ToolParser, at_least
from expedit_d2.comparison import Store
from expedit_d2.comparison.origin import versions
from expedit_d2.comparison.store import fingerprint
from expedit_d2.engine import one_sentence
from expedit_d2.families import (
    FAMILIES,
    LARGE,
    BudgetRow,
    Family,
    Row,
    budget_table,
    measure,
    measure_budgets,
    table,
)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser("benchmark_families.py", __doc__)
    option = parser.add_argument
    option("--models", nargs="+", metavar="NAME", help="models whose names contain this (all)")
    option(
        "--budget",
        nargs="+",
        type=float,
        default=[0.5],
        metavar="SHARE",
        help="of the blocks' GFLOPs (0.5)",
    )
    option("--repeats", type=at_least(1), default=5, help="timed rounds (%(default)s)")
    option("--warmup", type=at_least(0), default=1, help="rounds before these (%(default)s)")
    option("--threads", type=at_least(1), help="CPU threads of torch (its own choice)")
    option("--output", default="output/families", help="folder of the results (%(default)s)")
    return parser.parse_args(arguments)


def chosen(parts: list[str] | None, families: Sequence[Family]) -> list[Family]:
    """The families whose names contain one of these parts, in upper or lower case; None: all.

    Raises:
        ValueError: if there is none.
    """
    found = [
        family
        for family in families
        if parts is None or any(part.lower() in str(family).lower() for part in parts)
    ]
    if not found:
        known = "; ".join(map(str, families))
        raise ValueError(f"--models {' '.join(parts)} is in no name of: {known}")
    return found


def main(args: argparse.Namespace) -> list[Row] | list[BudgetRow]:
    several = len(args.budget) > 1
    families, store = chosen(args.models, LARGE if several else FAMILIES), Store(args.output)
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
            if several:
                measured = measure_budgets(family, args.budget, args.repeats, args.warmup)
            else:
                measured = [measure(family, args.budget[0], args.repeats, args.warmup)]
            store.put(key, {"rows": [asdict(row) for row in measured]}, str(family))
            gc.collect()  # traced models, before the next one is built
        kind = BudgetRow if several else Row
        rows += [kind(**row) for row in store.get(key)["rows"]]
        print(f"{family}: {rows[-1].setting}", flush=True)
    text = (
        f"{conditions['processor']}, {conditions['threads']} threads, torch {torch.__version__}, "
        f"batch 1, medians of {args.repeats} rounds in turns, budget "
        f"{', '.join(f'{budget:g}' for budget in args.budget)}\n\n"
        f"{(budget_table if several else table)(rows)}\n"
    )
    print(f"\n{text}")
    (Path(args.output) / "table.md").write_text(text, encoding="utf-8")
    return rows


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    args = parse_arguments(arguments)
    with one_sentence(
        "benchmark_families.py", "what was measured is kept; the same command continues from here"
    ):
        main(args)


if __name__ == "__main__":
    run()
