#!/usr/bin/env python
"""Evaluate the embedded models plain and with Expedit, print a table for each, draw what happens.

Needs no download: the images are rendered, the weights are in the repository.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger

from expedit_d2.cli.options import ToolParser, add_config_options, at_least
from expedit_d2.cli.workloads import load_workload, needed_setting
from expedit_d2.comparison import (
    Comparison,
    Options,
    Workload,
    check_finished,
    compare,
    to_markdown,
    to_terminal,
)
from expedit_d2.data import register_collage
from expedit_d2.engine import check_folder, import_modules, one_sentence
from expedit_d2.files import code_in_files
from expedit_d2.files.shipped import SHIPPED
from expedit_d2.settings import Settings
from expedit_d2.visualize import save_panels, side_by_side

CONFIGS = SHIPPED / "configs" / "embedded"


@dataclass(frozen=True)
class Case:
    """A plain model's config, and those whose ``MODEL.EXPEDIT`` is compared with it."""

    plain: Path
    expedit: Sequence[Path]


def embedded_cases(names: Sequence[str] | None) -> list[Case]:
    """``model.yaml`` is plain, ``model_setting.yaml`` has Expedit.

    Raises:
        ValueError: for a name that there is no config for.
    """
    cases = {
        path.stem: Case(path, sorted(CONFIGS.glob(f"{path.stem}_*.yaml")))
        for path in sorted(CONFIGS.glob("*.yaml"), reverse=True)
        if "_" not in path.stem
    }
    for name in names or ():
        if name not in cases:
            raise ValueError(f"--models must be among {sorted(cases)}, got {name!r}")
    return [cases[name] for name in names or cases]


def own_case(config_file: str, expedit: Sequence[str]) -> Case:
    """
    Raises:
        ValueError: without a config that has Expedit, or for two of one name.
    """
    if not expedit:
        raise ValueError("--config-file needs --expedit, configs whose MODEL.EXPEDIT is compared")
    stems = [Path(path).stem for path in expedit]
    for stem in stems:
        if stems.count(stem) > 1:
            raise ValueError(f"--expedit: two configs are named {stem!r}; rename one of them")
    return Case(Path(config_file), [Path(path) for path in expedit])


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser("demo.py", __doc__)
    option = parser.add_argument
    option("--models", nargs="+", metavar="NAME", help="embedded models; default: all of them")
    option(
        "--expedit",
        nargs="+",
        metavar="CONFIG",
        default=[],
        help="with --config-file: configs whose MODEL.EXPEDIT is compared with it",
    )
    option("--pictures", type=at_least(0), default=4, help="images to draw (%(default)s)")
    option("--timed", type=at_least(0), default=20, help="images to time (%(default)s)")
    option("--output", default="output/demo", help="folder of the results (%(default)s)")
    add_config_options(parser, "a plain model of your own instead, YAML or LazyConfig", "")
    args = parser.parse_args(arguments)
    if args.expedit and not args.config_file:
        parser.error("--expedit goes with --config-file, the plain model")
    return args


def settings_of(case: Case, opts: Sequence[str]) -> dict[str, Settings]:
    """By what their file names add to the plain model's.

    Raises:
        ValueError, FileNotFoundError: for a config that is none, or has no setting.
    """
    stem = f"{case.plain.stem}_"
    return {path.stem.removeprefix(stem): needed_setting(path, opts) for path in case.expedit}


def draw(workload: Workload, setting: Settings, count: int) -> list[dict[str, np.ndarray]]:
    """Panels of the first images; of the output that says most, where there are several."""
    metadata = MetadataCatalog.get(workload.dataset)
    rows = []
    for inputs in workload.images(count):
        rows += side_by_side(workload.model, setting, inputs[0], metadata, workload.color)[-1:]
    return rows


def run_case(case: Case, args: argparse.Namespace) -> Comparison:
    """Evaluate and draw one model."""
    name, settings = case.plain.stem, settings_of(case, args.opts)
    workload = load_workload(case.plain, args.opts)
    comparison = compare(workload, settings, Options(timed_images=args.timed, batch=1))
    print(f"\n{to_terminal(comparison)}\n")
    if comparison.unfinished:
        raise KeyboardInterrupt
    drawn = [row.settings for row in comparison.rows[1:]]
    if drawn and args.pictures:
        panels = draw(workload, drawn[0], args.pictures)
        save_panels(panels, Path(args.output) / f"{name}.png")
    return comparison


def main(args: argparse.Namespace) -> None:
    setup_logger(name="detectron2").setLevel("ERROR")  # the progress bars say enough
    import_modules(args.imports)
    check_folder(args.output, "--output")
    register_collage()
    if args.config_file:
        cases = [own_case(args.config_file, args.expedit)]
    else:
        cases = embedded_cases(args.models)
    for case in cases:
        settings_of(case, args.opts)  # what is wrong should be said now
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    comparisons: list[Comparison] = []
    for case in cases:
        comparisons.append(run_case(case, args))
        tables = [f"{done.model}\n\n{to_markdown(done)}" for done in comparisons]
        # After each of them, so that an interruption leaves what is done.
        (output / "tables.md").write_text("\n".join(tables), encoding="utf-8")
    print(f"tables and pictures: {output}")
    check_finished(comparisons)


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    args = parse_arguments(arguments)
    with (
        code_in_files(args.run_code_in_files),
        one_sentence("demo.py", f"the models that are finished are in {args.output}"),
    ):
        main(args)


if __name__ == "__main__":
    run()
