"""`expedit tune`; its options are in `commands`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from ..adapters import find_transformer
from ..comparison import (
    Target,
    Tuning,
    candidates,
    save_tables,
    table_stem,
    to_terminal,
    tune,
)
from ..comparison.columns import describe_settings
from ..engine import import_modules, one_sentence
from ..files import code_in_files
from .commands import parser_of
from .measuring import measuring_options, prepare
from .workloads import write_tuned_config


def parse_arguments(arguments: list[str] | None, prog: str = "tune.py") -> argparse.Namespace:
    return parser_of("tune", prog).parse_args(arguments)


def report(tuning: Tuning) -> None:
    """Print the results."""
    if tuning.front:
        front = replace(tuning.sweep, rows=[tuning.sweep.plain, *tuning.front])
        print(f"\nPareto front of the sweep:\n\n{to_terminal(front)}")
    if tuning.skipped:
        name, why = next(iter(tuning.skipped.items()))
        print(f"\nSkipped {len(tuning.skipped)} settings, such as {name}: {why}")
    if tuning.confirmed:
        print(f"\nOn all images:\n\n{to_terminal(tuning.confirmed)}")


def main(args: argparse.Namespace) -> Tuning:
    import_modules(args.imports)
    target = Target(args.keep, args.metric, args.agreement, args.faster)
    options = measuring_options(args)
    workload, store = prepare(args)
    settings = candidates(find_transformer(workload.model))
    tuning = tune(workload, settings, target, args.sweep, args.confirm, options, store)
    stem = table_stem(Path(args.output), workload.name, workload.config_file)
    if tuning.sweep:
        save_tables(tuning.sweep, f"{stem}_sweep")
    if tuning.confirmed:
        save_tables(tuning.confirmed, stem)
    report(tuning)
    if tuning.best is not None:
        description = describe_settings(tuning.best)
        settings = tuning.best.settings
        if args.model is not None:
            print(f"\nFor {target}: {description}\nUse it with `expedite` in Python.")
            return tuning
        file, command = write_tuned_config(settings, args.config_file, args.opts, stem, description)
        print(f"\nFor {target}: {description}\nSaved to {file}; evaluate it with\n  {command}")
    elif not tuning.interrupted:
        print(f"\nFound no setting for {target}.")
    return tuning


def run(arguments: list[str] | None = None, prog: str = "tune.py") -> None:
    """Parse the arguments and run; expected errors end with one sentence."""
    args = parse_arguments(arguments, prog)
    with (
        code_in_files(args.run_code_in_files),
        one_sentence(prog, "results so far are saved; the same command resumes"),
    ):
        tuning = main(args)
        if tuning.interrupted:
            raise KeyboardInterrupt
    if tuning.best is None:
        sys.exit(1)
