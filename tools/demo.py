#!/usr/bin/env python
"""Evaluate the embedded models plain and with Expedit, print a table for each, draw what happens.

Needs no download: the images are rendered, the weights are in the repository.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger

from expedit_d2.comparison import Comparison, Options, Subject, compare, to_markdown, to_terminal
from expedit_d2.data import register_collage
from expedit_d2.settings import Settings
from expedit_d2.visualize import save_panels, side_by_side
from projects.subjects import load_subject, setting_of

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "embedded"


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


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", help="embedded models; default: all of them")
    parser.add_argument("--config-file", help="a plain model of your own instead")
    parser.add_argument(
        "--expedit",
        nargs="+",
        metavar="YAML",
        default=[],
        help="with --config-file: configs whose MODEL.EXPEDIT is compared with it",
    )
    parser.add_argument("--pictures", type=int, default=4, help="images to draw")
    parser.add_argument("--timed", type=int, default=20, help="images to time")
    parser.add_argument("--output", default="output/demo", help="folder of the results")
    parser.add_argument("opts", nargs="*", help="config overrides, as KEY VALUE pairs")
    return parser.parse_args(arguments)


def draw(subject: Subject, setting: Settings, count: int) -> list[dict[str, np.ndarray]]:
    """Panels of the first images; of the output that says most, where there are several."""
    metadata = MetadataCatalog.get(subject.dataset)
    rows = []
    for inputs in subject.images(count):
        rows += side_by_side(subject.model, setting, inputs[0], metadata, subject.color)[-1:]
    return rows


def run_case(case: Case, args: argparse.Namespace) -> Comparison:
    """Evaluate and draw one model."""
    name = case.plain.stem
    settings: dict[str, Settings] = {}
    for path in case.expedit:
        setting, key = setting_of(path, args.opts), path.stem.removeprefix(f"{name}_")
        if setting is None:
            raise ValueError(
                f"--expedit: MODEL.EXPEDIT of {str(path)!r} has no ALPHA and no BUDGET"
            )
        if key in settings:
            raise ValueError(f"--expedit: two files are named {path.name!r}")
        settings[key] = setting
    subject = load_subject(case.plain, args.opts)
    comparison = compare(subject, settings, Options(timed_images=args.timed, batch=1))
    print(f"\n{to_terminal(comparison)}\n")
    if comparison.unfinished:
        raise KeyboardInterrupt
    drawn = [row.settings for row in comparison.rows[1:]]
    if drawn and args.pictures:
        panels = draw(subject, drawn[0], args.pictures)
        save_panels(panels, Path(args.output) / f"{name}.png")
    return comparison


def main(args: argparse.Namespace) -> None:
    setup_logger(name="detectron2").setLevel("ERROR")  # the progress bars say enough
    register_collage()
    for name in ("pictures", "timed"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must be 0 or more, got {getattr(args, name)}")
    if args.config_file:
        if not args.expedit:
            raise ValueError(
                "--config-file needs --expedit: configs whose MODEL.EXPEDIT to compare"
            )
        cases = [Case(Path(args.config_file), [Path(path) for path in args.expedit])]
    else:
        cases = embedded_cases(args.models)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    tables, failed = [], []
    for case in cases:
        comparison = run_case(case, args)
        tables.append(f"{comparison.model}\n\n{to_markdown(comparison)}")
        failed += [f"{name}: {why}" for name, why in comparison.failed.items()]
        # After each of them, so that an interruption leaves what is done.
        (output / "tables.md").write_text("\n".join(tables), encoding="utf-8")
    print(f"tables and pictures: {output}")
    if failed:
        raise ValueError(f"these settings failed, the others are finished: {'; '.join(failed)}")


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    args = parse_arguments(arguments)
    try:
        main(args)
    except (ValueError, OSError, KeyError) as error:
        sys.exit(f"demo.py: {error}")


if __name__ == "__main__":
    run()
