#!/usr/bin/env python
"""Draw a model's predictions on images: plain, with Expedit, and where the two differ.

Examples::

    # your images
    python tools/draw.py --images photos/*.jpg --config-file my_model.yaml \
        MODEL.WEIGHTS my_model.pth MODEL.EXPEDIT.ALPHA 8 MODEL.EXPEDIT.RATIO 0.7

    # all images of a folder, on four GPUs (or four processes, where there is no GPU)
    python tools/draw.py --images photos --num-gpus 4 --config-file my_model.yaml

    # a LazyConfig, as ViTDet's official ones are
    python tools/draw.py --images photos --config-file my_vitdet.py \
        train.init_checkpoint=my_model.pth expedit.alpha=4 expedit.ratio=0.7

    # the first four images of the config's test data set
    python tools/draw.py --config-file configs/embedded/mask2former_a6_3x3.yaml
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from expedit_d2.cli.arguments import ToolParser, add_config_options, at_least
from expedit_d2.cli.subjects import load_subject, needed_setting
from expedit_d2.comparison import Subject
from expedit_d2.comparison.session import expedited_copy
from expedit_d2.data import register_collage
from expedit_d2.engine import check_folder, import_modules, launch, one_sentence
from expedit_d2.files import code_in_files
from expedit_d2.settings import Settings
from expedit_d2.visualize import save_panels, side_by_side


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser("draw.py", __doc__)
    option = parser.add_argument
    option(
        "--images",
        nargs="+",
        help="files, and folders of images, which are reduced if they have more than 2 megapixels; "
        "default: of the test data",
    )
    option("--count", type=at_least(1), default=4, help="images of the data set (%(default)s)")
    option("--output", default="output/pictures", help="folder of the pictures (%(default)s)")
    option(
        "--num-gpus",
        type=at_least(1),
        default=1,
        help="processes that share the images, one on each GPU (%(default)s)",
    )
    add_config_options(parser, "YAML or LazyConfig with MODEL.EXPEDIT")
    return parser.parse_args(arguments)


def load(args: argparse.Namespace) -> tuple[Subject, Settings]:
    """The plain model on the images, and the settings to draw beside it.

    Raises:
        ValueError, OSError: if something is wrong with the config, weights or images, or the
            settings do not fit the model.
    """
    settings = needed_setting(args.config_file, args.opts)
    subject = load_subject(args.config_file, args.opts, args.images)
    expedited_copy(subject.model, settings)
    return subject, settings


def main(args: argparse.Namespace) -> list[Path]:
    """Draw this process's share of the images; returns the pictures' paths."""
    setup_logger(name="detectron2").setLevel("ERROR")
    import_modules(args.imports)
    check_folder(args.output, "--output")
    register_collage()
    subject, settings = load(args)
    inputs, metadata = subject.loader.dataset, MetadataCatalog.get(subject.dataset)
    count = len(inputs) if args.images else min(args.count, len(inputs))
    pictures: list[Path] = []
    skipped: list[str] = []
    numbers = range(comm.get_rank(), count, comm.get_world_size())
    for number in tqdm(numbers, unit="image", disable=not comm.is_main_process()):
        try:
            item = inputs[number]
            rows = side_by_side(subject.model, settings, item, metadata, subject.color)
        except (ValueError, OSError) as error:  # of this image: the others go on
            skipped.append(str(error))
            continue
        # Files of the same name may come from several folders.
        path = Path(args.output) / f"{number:03d}_{Path(item['file_name']).stem}.png"
        save_panels(rows, path)
        pictures.append(path)
    # Those that cannot be read at all are left out, and named, before.
    unreadable = len(metadata.get("unreadable", ()))
    skipped = [message for some in comm.all_gather(skipped) for message in some]
    if len(skipped) == count:
        raise ValueError(f"none of {count} images could be drawn; the first: {skipped[0]}")
    if comm.is_main_process():
        for message in skipped:
            print(f"left out: {message}", file=sys.stderr)
        left_out = f", {len(skipped) + unreadable} left out" if skipped or unreadable else ""
        print(f"{count - len(skipped)} pictures in {args.output}{left_out}")
    return pictures


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    args = parse_arguments(arguments)
    with (
        code_in_files(args.run_code_in_files),
        one_sentence("draw.py", f"the pictures so far are in {args.output}"),
    ):
        launch(main, args.num_gpus, dist_url="auto", args=(args,))


if __name__ == "__main__":
    run()
