#!/usr/bin/env python
"""Compare a plain model with reduced ones: metrics, agreement, GFLOPs, speed and memory.

Examples::

    # the embedded Segmenter with the settings that lie beside its config; no downloads
    python tools/compare.py

    # a model of your own, its labelled data, and two settings
    python tools/compare.py --config-file my_model.yaml \
        --setting "alpha=8 ratio=0.7" --setting "half: budget=0.5" \
        -- MODEL.WEIGHTS my_model.pth DATASETS.TEST "('my/instances.json@images',)"

    # images without labels: agreement with the plain model, GFLOPs, speed and memory
    python tools/compare.py --config-file my_vitdet.py --images "photos/*.jpg" \
        --setting "alpha=4 ratio=0.7" -- train.init_checkpoint=my_model.pth

Results are kept in the output folder as they come: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from expedit_d2.comparison import (
    Comparison,
    Store,
    compare,
    parse_setting,
    save_tables,
    table_stem,
    to_terminal,
)
from expedit_d2.engine.interrupt import interruptible
from expedit_d2.report import draw_pictures, headline_row, write_report
from expedit_d2.settings import Settings
from projects.arguments import add_measuring_options, measuring_options, prepare
from projects.subjects import setting_of, settings_beside


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option(
        "--setting",
        action="append",
        default=[],
        metavar='"[NAME:] KEY=VALUE ..."',
        help="fields of MODEL.EXPEDIT; lists as 0,1,2 or 0-6; may be given several times",
    )
    option("--expedit", nargs="+", default=[], metavar="CONFIG", help="use their MODEL.EXPEDIT")
    option("--pictures", type=int, default=3, help="images to draw in the report (%(default)s)")
    add_measuring_options(parser, "output/compare")
    return parser.parse_args(arguments)


def all_settings(args: argparse.Namespace) -> dict[str, Settings]:
    """By name, as asked for; otherwise the config's own, and those of the files beside it.

    Raises:
        ValueError: if there is none, or two of one name.
    """
    given: list[tuple[str, Settings | None]] = [parse_setting(text) for text in args.setting]
    stem = Path(args.config_file).stem
    for path in args.expedit:
        given.append((Path(path).stem.removeprefix(f"{stem}_"), setting_of(path)))
    if not given:
        given = [*settings_beside(args.config_file).items()]
        own = setting_of(args.config_file, args.opts)
        given += [("expedit", own)] if own is not None else []
    if not given:
        raise ValueError('there is no setting to compare; give --setting "budget=0.6"')
    settings: dict[str, Settings] = {}
    for name, setting in given:
        if setting is None:
            raise ValueError(
                f"{name}: its MODEL.EXPEDIT has no ALPHA and no BUDGET, so nothing to compare"
            )
        if name in settings:
            raise ValueError(f"two settings are named {name!r}; give them names")
        settings[name] = setting
    return settings


def main(args: argparse.Namespace) -> Comparison:
    """Compare, and write tables and the report.

    Raises:
        ValueError, FileNotFoundError: for what is wrong, before anything is measured.
        KeyboardInterrupt: before the plain model is finished, or while pictures are drawn; what
            was measured is written by then.
    """
    options, settings = measuring_options(args), all_settings(args)
    if args.pictures < 0:
        raise ValueError(f"--pictures must be 0 or more, got {args.pictures}")
    output = Path(args.output)
    store = Store(output)
    subject = prepare(args)
    stem = table_stem(output, subject.name, args.config_file)
    comparison = compare(
        subject, settings, options, store, save=lambda so_far: save_tables(so_far, stem)
    )
    files = [*save_tables(comparison, stem), write_report([comparison], [], f"{stem}.html")]
    print(f"\n{to_terminal(comparison)}\n\nAll of it: {', '.join(map(str, files))}")
    if store.reused:
        print(f"{store.reused} results were measured before; remove {output} to measure them again")
    # Pictures tell something also where no setting can be recommended.
    drawn = [row for row in (headline_row(comparison), *comparison.rows[1:]) if row is not None]
    if drawn and args.pictures and not comparison.unfinished:
        with interruptible():
            pictures = draw_pictures(subject, drawn[0], args.pictures)
        write_report([comparison], pictures, f"{stem}.html")
    return comparison


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    args = parse_arguments(arguments)
    try:
        comparison = main(args)
    except (ValueError, OSError, KeyError) as error:
        sys.exit(f"compare.py: {error.args[0] if isinstance(error, KeyError) else error}")
    except KeyboardInterrupt:
        print("compare.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    if comparison.unfinished:
        print("compare.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    if comparison.failed:
        failed = "; ".join(f"{name}: {why}" for name, why in comparison.failed.items())
        print(
            f"compare.py: these settings failed, the others are finished: {failed}", file=sys.stderr
        )
        sys.exit(2)


if __name__ == "__main__":
    run()
