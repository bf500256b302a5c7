#!/usr/bin/env python
"""Draw a model's predictions on images: plain, with Expedit, and where the two differ.

Examples::

    # your images
    python tools/draw.py --images photos/*.jpg --config-file my_model.yaml \
        MODEL.WEIGHTS my_model.pth MODEL.EXPEDIT.ALPHA 8 MODEL.EXPEDIT.RATIO 0.7

    # all images of a folder, on four GPUs (or four processes, where there is no GPU)
    python tools/draw.py --images photos --num-gpus 4 --config-file my_model.yaml

    # the first four images of the config's test data set
    python tools/draw.py --config-file configs/embedded/mask2former_a6_3x3.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from PIL import Image
from tqdm import tqdm

from expedit_d2.data import register_by_path, register_collage
from expedit_d2.data.images import MAX_PIXELS, DataError, read_image
from expedit_d2.engine import launch
from expedit_d2.settings import Settings
from expedit_d2.visualize import save_panels, side_by_side
from projects import load_cfg, load_model

#: Of the images that are taken from a folder, in lower case.
EXTENSIONS = frozenset(
    extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN
)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="YAML with MODEL.EXPEDIT")
    parser.add_argument(
        "--images",
        nargs="+",
        help="files, and folders of images, which are reduced if they have more than 2 megapixels; "
        "default: of DATASETS.TEST",
    )
    parser.add_argument("--count", type=int, default=4, help="images of the data set")
    parser.add_argument("--output", default="output/pictures", help="folder of the pictures")
    parser.add_argument(
        "--num-gpus", type=int, default=1, help="processes that share the images, one on each GPU"
    )
    parser.add_argument("opts", nargs="*", help="config overrides, as KEY VALUE pairs")
    return parser.parse_args(arguments)


def image_files(args: argparse.Namespace, dataset: str) -> list[str]:
    if not args.images:
        return [record["file_name"] for record in islice(DatasetCatalog.get(dataset), args.count)]
    files = []
    for path in map(Path, args.images):
        if path.is_dir():
            found = sorted(str(p) for p in path.iterdir() if p.suffix.lower() in EXTENSIONS)
            if not found:
                raise FileNotFoundError(f"--images: there are no images in {str(path)!r}")
            files += found
        elif path.is_file():
            files.append(str(path))
        else:
            raise FileNotFoundError(f"--images: there is no file {str(path)!r}")
    return files


def load_inputs(
    cfg: CfgNode, files: Iterable[tuple[int, str]], unreadable: list[str]
) -> Iterator[tuple[int, dict]]:
    """Model inputs, resized as for evaluation, of numbered files; notes those it cannot read."""
    resize = T.ResizeShortestEdge(
        [cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST
    )  # a range of one size
    for number, path in files:
        try:
            image = read_image(path, cfg.INPUT.FORMAT, MAX_PIXELS)
        except DataError as error:
            unreadable.append(str(error))
            continue
        height, width = image.shape[:2]
        image = resize.get_transform(image).apply_image(image)
        pixels = torch.as_tensor(image.transpose(2, 0, 1).copy())
        yield number, {"image": pixels, "height": height, "width": width, "file_name": path}


def main(args: argparse.Namespace) -> list[Path]:
    """Draw this process's share of the images; returns the pictures' paths."""
    setup_logger(name="detectron2").setLevel("ERROR")
    register_collage()
    cfg = load_cfg(args.config_file, args.opts)
    settings = Settings.from_node({**cfg.MODEL.EXPEDIT, "ENABLED": True})
    cfg.MODEL.EXPEDIT.ENABLED = False
    register_by_path(cfg.DATASETS.TEST)
    dataset = cfg.DATASETS.TEST[0]
    files = image_files(args, dataset)
    model = load_model(cfg)
    pictures: list[Path] = []
    unreadable: list[str] = []
    numbers = range(comm.get_rank(), len(files), comm.get_world_size())
    items = load_inputs(cfg, [(number, files[number]) for number in numbers], unreadable)
    bar = tqdm(items, total=len(numbers), unit="image", disable=not comm.is_main_process())
    for number, item in bar:
        rows = side_by_side(model, settings, item, MetadataCatalog.get(dataset), cfg.INPUT.FORMAT)
        # Files of the same name may come from several folders.
        path = Path(args.output) / f"{number:03d}_{Path(item['file_name']).stem}.png"
        save_panels(rows, path)
        pictures.append(path)
    skipped = [sentence for part in comm.gather(unreadable) for sentence in part]
    if comm.is_main_process():
        for sentence in skipped:
            print(f"skipped: {sentence}", file=sys.stderr)
        if len(skipped) == len(files):
            raise ValueError(f"none of the {len(files)} images can be read: {skipped[0]}")
        left_out = f", {len(skipped)} images skipped" if skipped else ""
        print(f"{len(files) - len(skipped)} pictures in {args.output}{left_out}")
    return pictures


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    args = parse_arguments(arguments)
    try:
        launch(main, args.num_gpus, dist_url="auto", args=(args,))
    except (ValueError, OSError, KeyError) as error:
        sys.exit(f"draw.py: {error}")


if __name__ == "__main__":
    run()
