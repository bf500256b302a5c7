#!/usr/bin/env python
"""Find the setting for a target: what to keep of the metrics, an agreement, or a speed-up.

Many settings run on a few images, for agreement with the plain model and GFLOPs. The best few run
on all images, with metrics and timing. The winner is written as a small config.

Examples::

    # the embedded Segmenter: as fast as possible with 99 % of its mIoU
    python tools/tune.py --keep 99

    # a model of your own: at least 1.4 times faster, the output as close as possible
    python tools/tune.py --faster 1.4 --config-file my_model.yaml -- MODEL.WEIGHTS my_model.pth

    # images without labels
    python tools/tune.py --agreement 98 --images photos --config-file my_model.yaml

Results are kept in the output folder as they come: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from expedit_d2.adapters import find_host
from expedit_d2.cli.arguments import (
    ToolParser,
    add_measuring_options,
    at_least,
    measuring_options,
    prepare,
)
from expedit_d2.cli.subjects import write_winner
from expedit_d2.comparison import (
    Target,
    Tuning,
    candidates,
    save_tables,
    table_stem,
    to_terminal,
    tune,
)
from expedit_d2.comparison.columns import spell_settings
from expedit_d2.engine import import_modules, one_sentence
from expedit_d2.files import code_in_files


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser("tune.py", __doc__)
    option = parser.add_argument
    option("--keep", type=float, metavar="PERCENT", help="of every metric, or of --metric")
    option("--metric", help="as in the tables: PQ, mIoU, 'box AP'")
    option("--agreement", type=float, metavar="PERCENT", help="with the plain model's output")
    option("--faster", type=float, metavar="TIMES", help="than the plain model, at batch 1")
    option("--sweep", type=at_least(1), default=8, help="images of the sweep (%(default)s)")
    option(
        "--confirm",
        type=at_least(1),
        default=6,
        help="settings to run on everything (%(default)s)",
    )
    add_measuring_options(parser, "output/tune")
    return parser.parse_args(arguments)


def report(tuning: Tuning) -> None:
    """Print what was found."""
    if tuning.front:
        front = replace(tuning.sweep, rows=[tuning.sweep.plain, *tuning.front])
        print(f"\nNo other setting of the sweep is better than these:\n\n{to_terminal(front)}")
    if tuning.skipped:
        name, why = next(iter(tuning.skipped.items()))
        print(f"\nLeft out: {len(tuning.skipped)} settings, such as {name}: {why}")
    if tuning.confirmed:
        print(f"\nOn everything:\n\n{to_terminal(tuning.confirmed)}")


def main(args: argparse.Namespace) -> Tuning:
    import_modules(args.imports)
    target = Target(args.keep, args.metric, args.agreement, args.faster)
    options = measuring_options(args)
    subject, store = prepare(args)
    settings = candidates(find_host(subject.model))
    tuning = tune(subject, settings, target, args.sweep, args.confirm, options, store)
    stem = table_stem(Path(args.output), subject.name, args.config_file)
    if tuning.sweep:
        save_tables(tuning.sweep, f"{stem}_sweep")
    if tuning.confirmed:
        save_tables(tuning.confirmed, stem)
    report(tuning)
    if tuning.winner is not None:
        spelled = spell_settings(tuning.winner)
        settings = tuning.winner.settings
        file, command = write_winner(settings, args.config_file, args.opts, stem, spelled)
        print(f"\nFor {target}: {spelled}\n{file}, to be run with\n  {command}")
    elif not tuning.interrupted:
        print(f"\nNo setting was found for {target}.")
    return tuning


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    args = parse_arguments(arguments)
    with (
        code_in_files(args.run_code_in_files),
        one_sentence("tune.py", "what was measured is kept; the same command goes on from here"),
    ):
        tuning = main(args)
        if tuning.interrupted:
            raise KeyboardInterrupt
    if tuning.winner is None:
        sys.exit(1)


if __name__ == "__main__":
    run()
