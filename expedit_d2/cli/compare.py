"""`expedit compare`; its options are in `commands`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..comparison import (
    Comparison,
    check_finished,
    compare,
    parse_setting,
    save_tables,
    table_stem,
    to_terminal,
)
from ..engine import import_modules, one_sentence
from ..engine.interrupt import interruptible
from ..files import code_in_files
from ..report import draw_pictures, headline_row, write_report
from ..settings import Settings
from .commands import parser_of
from .measuring import measuring_options, prepare
from .workloads import needed_setting, setting_of, settings_beside


def parse_arguments(arguments: list[str] | None, prog: str = "compare.py") -> argparse.Namespace:
    return parser_of("compare", prog).parse_args(arguments)


def all_settings(args: argparse.Namespace) -> dict[str, Settings]:
    """Settings by name: the given ones, or the config's own and those of the files next to it; with
    ``--model`` a budget of 0.5.

    Raises:
        ValueError: if there are none, or two have the same name.
    """
    given = [parse_setting(text) for text in args.setting]
    stem = Path(args.config_file).stem
    for path in args.expedit:
        given.append((Path(path).stem.removeprefix(f"{stem}_"), needed_setting(path)))
    if not given and args.model is not None:
        given = [("budget50", Settings(budget=0.5))]
    if not given:
        given = [*settings_beside(args.config_file).items()]
        own = setting_of(args.config_file, args.opts)
        given += [("expedit", own)] if own is not None else []
    if not given:
        raise ValueError('there are no settings to compare; give --setting "budget=0.6"')
    settings: dict[str, Settings] = {}
    for name, setting in given:
        if name in settings:
            raise ValueError(f"two settings are named {name!r}; give them different names")
        settings[name] = setting
    return settings


def main(args: argparse.Namespace) -> Comparison:
    """Compare, and write tables and the report.

    Raises:
        ValueError, OSError: for invalid arguments or files, before anything is measured.
        KeyboardInterrupt: while the plain model runs, or while pictures are drawn; results so far
            are saved.
    """
    import_modules(args.imports)
    options, settings = measuring_options(args), all_settings(args)
    workload, store = prepare(args)
    output = Path(args.output)
    stem = table_stem(output, workload.name, workload.config_file)
    comparison = compare(
        workload, settings, options, store, save=lambda so_far: save_tables(so_far, stem)
    )
    files = [*save_tables(comparison, stem), write_report([comparison], [], f"{stem}.html")]
    print(f"\n{to_terminal(comparison)}\n\nSaved to {', '.join(map(str, files))}")
    if store.reused:
        print(f"{store.reused} results were measured before; remove {output} to measure them again")
    # Without a recommended setting, draw the first one.
    drawn = [row for row in (headline_row(comparison), *comparison.rows[1:]) if row is not None]
    if drawn and args.pictures and not comparison.unfinished:
        with interruptible():
            pictures = draw_pictures(workload, drawn[0], args.pictures)
        write_report([comparison], pictures, f"{stem}.html")
    return comparison


def run(arguments: list[str] | None = None, prog: str = "compare.py") -> None:
    """Parse the arguments and run; expected errors end with one sentence."""
    args = parse_arguments(arguments, prog)
    with (
        code_in_files(args.run_code_in_files),
        one_sentence(prog, "results so far are saved; the same command resumes"),
    ):
        check_finished([main(args)])
