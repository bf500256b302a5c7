"""`expedit draw`; its options are in `commands`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from ..comparison import Workload
from ..comparison.session import expedited_copy
from ..data import register_collage
from ..engine import check_folder, import_modules, launch, one_sentence
from ..files import code_in_files
from ..settings import Settings, parse_setting
from ..visualize import save_panels, side_by_side
from .commands import parser_of
from .measuring import check_model_options, workload_of_model
from .workloads import load_workload, needed_setting


def parse_arguments(arguments: list[str] | None, prog: str = "draw.py") -> argparse.Namespace:
    return parser_of("draw", prog).parse_args(arguments)


def load(args: argparse.Namespace) -> tuple[Workload, Settings]:
    """The plain model with its images, and the settings to compare with.

    Raises:
        ValueError, OSError: for invalid configs, weights or images, or settings that do not fit the
            model.
    """
    if args.model is None:
        check_model_options(args, ("size", "random_weights", "setting"))
        settings = needed_setting(args.config_file, args.opts)
        workload = load_workload(args.config_file, args.opts, args.images)
    else:
        _, settings = parse_setting(args.setting or "budget=0.5")
        workload = workload_of_model(args)
    expedited_copy(workload.model, settings)
    return workload, settings


def main(args: argparse.Namespace) -> list[Path]:
    """Draw this process's share of the images; returns the paths of the pictures."""
    setup_logger(name="detectron2").setLevel("ERROR")
    import_modules(args.imports)
    check_folder(args.output, "--output")
    register_collage()
    workload, settings = load(args)
    inputs, metadata = workload.loader.dataset, MetadataCatalog.get(workload.dataset)
    count = len(inputs) if args.images else min(args.count, len(inputs))
    pictures: list[Path] = []
    skipped: list[str] = []
    numbers = range(comm.get_rank(), count, comm.get_world_size())
    for number in tqdm(numbers, unit="image", disable=not comm.is_main_process()):
        try:
            item = inputs[number]
            rows = side_by_side(workload.model, settings, item, metadata, workload.color)
        except (ValueError, OSError) as error:  # continue with the other images
            skipped.append(str(error))
            continue
        # Files in different folders may have the same name.
        path = Path(args.output) / f"{number:03d}_{Path(item['file_name']).stem}.png"
        save_panels(rows, path)
        pictures.append(path)
    # The loader has already skipped and reported unreadable files.
    unreadable = len(metadata.get("unreadable", ()))
    skipped = [message for some in comm.all_gather(skipped) for message in some]
    if len(skipped) == count:
        raise ValueError(f"none of the {count} images could be drawn; the first: {skipped[0]}")
    if comm.is_main_process():
        for message in skipped:
            print(f"skipped: {message}", file=sys.stderr)
        rest = f", {len(skipped) + unreadable} skipped" if skipped or unreadable else ""
        print(f"{count - len(skipped)} pictures in {args.output}{rest}")
    return pictures


def run(arguments: list[str] | None = None, prog: str = "draw.py") -> None:
    """Parse the arguments and run; expected errors end with one sentence."""
    args = parse_arguments(arguments, prog)
    with (
        code_in_files(args.run_code_in_files),
        one_sentence(prog, f"the pictures so far are in {args.output}"),
    ):
        launch(main, args.num_gpus, dist_url="auto", args=(args,))
