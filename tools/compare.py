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
from pathlib import Path

from expedit_d2.cli.arguments import (
    ToolParser,
    add_measuring_options,
    at_least,
    measuring_options,
    prepare,
)
from expedit_d2.cli.subjects import needed_setting, setting_of, settings_beside
from expedit_d2.comparison import (
    Comparison,
    check_finished,
    compare,
    parse_setting,
    save_tables,
    table_stem,
    to_terminal,
)
from expedit_d2.engine import import_modules, one_sentence
from expedit_d2.engine.interrupt import interruptible
from expedit_d2.files import code_in_files
from expedit_d2.report import draw_pictures, headline_row, write_report
from expedit_d2.settings import Settings


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser("compare.py", __doc__)
    option = parser.add_argument
    option(
        "--setting",
        action="append",
        default=[],
        metavar='"[NAME:] KEY=VALUE ..."',
        help="fields of MODEL.EXPEDIT; lists as 0,1,2 or 0-6; may be given several times",
    )
    option("--expedit", nargs="+", default=[], metavar="CONFIG", help="use their MODEL.EXPEDIT")
    option(
        "--pictures", type=at_least(0), default=3, help="images to draw in the report (%(default)s)"
    )
    add_measuring_options(parser, "output/compare")
    return parser.parse_args(arguments)


def all_settings(args: argparse.Namespace) -> dict[str, Settings]:
    """By name, as asked for; otherwise the config's own, and those of the files beside it.

    Raises:
        ValueError: if there is none, or two of one name.
    """
    given = [parse_setting(text) for text in args.setting]
    stem = Path(args.config_file).stem
    for path in args.expedit:
        given.append((Path(path).stem.removeprefix(f"{stem}_"), needed_setting(path)))
    if not given:
        given = [*settings_beside(args.config_file).items()]
        own = setting_of(args.config_file, args.opts)
        given += [("expedit", own)] if own is not None else []
    if not given:
        raise ValueError('there is no setting to compare; give --setting "budget=0.6"')
    settings: dict[str, Settings] = {}
    for name, setting in given:
        if name in settings:
            raise ValueError(f"two settings are named {name!r}; give them names")
        settings[name] = setting
    return settings


def main(args: argparse.Namespace) -> Comparison:
    """Compare, and write tables and the report.

    Raises:
        ValueError, OSError: for what is wrong, before anything is measured.
        KeyboardInterrupt: before the plain model is finished, or while pictures are drawn; what
            was measured is written by then.
    """
    import_modules(args.imports)
    options, settings = measuring_options(args), all_settings(args)
    subject, store = prepare(args)
    output = Path(args.output)
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
    with (
        code_in_files(args.run_code_in_files),
        one_sentence("compare.py", "what was measured is kept; the same command goes on from here"),
    ):
        check_finished([main(args)])


if __name__ == "__main__":
    run()
