#!/usr/bin/env python
"""Evaluate the embedded ViTDet plain and with Expedit, print a table, draw what happens.

Needs no download: the images are rendered, the weights are in the repository.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.utils.logger import setup_logger
from torch import nn

from expedit_d2.adapters import find_host
from expedit_d2.api import expedite
from expedit_d2.comparison import compare, to_table
from expedit_d2.data import register_by_path, register_collage
from expedit_d2.engine import Trainer, choose_device, load_weights
from expedit_d2.settings import Settings
from expedit_d2.visualize import cluster_labels, draw_clusters, draw_instances, save_panels
from projects import get_cfg

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "embedded"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default=str(CONFIGS / "vitdet.yaml"), help="plain model")
    parser.add_argument(
        "--expedit",
        nargs="+",
        metavar="YAML",
        default=[str(path) for path in sorted(CONFIGS.glob("vitdet_*.yaml"))],
        help="configs whose MODEL.EXPEDIT is compared with the plain model",
    )
    parser.add_argument("--pictures", type=int, default=4, help="images to draw")
    parser.add_argument("--draw", default="a6_3x3", help="which of the settings is drawn")
    parser.add_argument("--timed", type=int, default=20, help="images to time")
    parser.add_argument("--output", default="output/demo", help="folder of the results")
    parser.add_argument("opts", nargs="*", help="config overrides, as KEY VALUE pairs")
    return parser.parse_args(arguments)


def load_config(path: str, opts: list[str]) -> CfgNode:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config file {path!r}")
    cfg = get_cfg()
    cfg.merge_from_file(path)
    cfg.merge_from_list(opts)
    cfg.MODEL.DEVICE = choose_device(cfg.MODEL.DEVICE)
    # A relative path means the repository, wherever this is started from.
    if not Path(cfg.MODEL.WEIGHTS).exists() and (ROOT / cfg.MODEL.WEIGHTS).is_file():
        cfg.MODEL.WEIGHTS = str(ROOT / cfg.MODEL.WEIGHTS)
    return cfg


def draw(
    model: nn.Module,
    setting: Settings,
    name: str,
    loader: list,
    dataset: str,
    count: int,
    path: Path,
    color_format: str,
) -> None:
    """Input, clusters, and detections without and with Expedit, for the first images."""
    metadata = MetadataCatalog.get(dataset)
    window = find_host(model).window
    entering: list[torch.Tensor] = []
    rows = []
    for inputs, _ in zip(loader, range(count), strict=False):
        image = convert_image_to_rgb(inputs[0]["image"].permute(1, 2, 0), color_format)
        image = image.astype(np.uint8)
        with torch.no_grad():
            plain = model(inputs)[0]["instances"]
            values = dict(vars(setting))
            with expedite(model, values.pop("alpha"), **values) as handle:
                reduce = next(iter(handle.blocks.methods.values())).reduce
                hook = reduce.register_forward_pre_hook(
                    lambda module, args: entering.append(args[0].features)
                )
                ours = model(inputs)[0]["instances"]
                hook.remove()
        labels = cluster_labels(entering.pop(), setting, window)[0].cpu().numpy()
        rows.append(
            {
                "image": image,
                f"clusters, {name}": draw_clusters(image, labels),
                "plain": draw_instances(image, plain, metadata),
                f"with Expedit, {name}": draw_instances(image, ours, metadata),
            }
        )
    save_panels(rows, path)


def main(args: argparse.Namespace) -> None:
    setup_logger(name="detectron2").setLevel("ERROR")  # the progress bars say enough
    register_collage()
    cfg = load_config(args.config_file, args.opts)
    dataset = cfg.DATASETS.TEST[0]
    register_by_path(cfg.DATASETS.TEST)
    settings = {}
    for path in args.expedit:
        node = load_config(path, args.opts).MODEL.EXPEDIT
        settings[Path(path).stem.removeprefix("vitdet_")] = Settings.from_node(node)

    model = Trainer.build_model(cfg).eval()
    load_weights(model, cfg.MODEL.WEIGHTS)
    loader = build_detection_test_loader(cfg, dataset)
    cfg.OUTPUT_DIR = args.output
    rows = compare(
        model, settings, loader, lambda: Trainer.build_evaluator(cfg, dataset), args.timed
    )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(to_table(rows, "github") + "\n")
    print(
        f"\n{dataset}, {len(loader)} images, batch 1, {cfg.MODEL.DEVICE}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}\n\n{to_table(rows)}\n"
    )
    name = args.draw if args.draw in settings else next(iter(settings))
    picture = output / "clusters_and_predictions.png"
    draw(model, settings[name], name, loader, dataset, args.pictures, picture, cfg.INPUT.FORMAT)
    print(f"table: {output / 'table.md'}\npicture: {picture}")


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    args = parse_arguments(arguments)
    try:
        main(args)
    except (ValueError, OSError, KeyError) as error:
        sys.exit(f"demo.py: {error}")


if __name__ == "__main__":
    run()
