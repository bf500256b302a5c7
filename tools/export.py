#!/usr/bin/env python
"""Export a model, plain or with Expedit, as an ONNX file or a torch.export program.

Segmenter and DPT are exported whole (images in, class scores or depth out), of other models the
backbone (normalised images in, feature maps out).

Examples::

    # any height and width; compared with PyTorch at the size given and at another one
    python tools/export.py --config-file configs/embedded/segmenter_a4_16x16.yaml \
        --output segmenter.onnx --check

    # a LazyConfig; ViTDet takes one size
    python tools/export.py --config-file my_vitdet.py --size 1024x1024 --fixed \
        --output backbone.onnx train.init_checkpoint=my_model.pth

    # PyTorch and ONNX Runtime, plain and with Expedit, timed in turns
    python tools/export.py --config-file configs/embedded/dpt_a4_16x16.yaml --size 256x256 \
        --output dpt.onnx --benchmark 20
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.logger import setup_logger
from tabulate import tabulate
from torch import Tensor, nn

from expedit_d2.analysis.timing import interleaved
from expedit_d2.cli.arguments import ToolParser, add_config_options, at_least, height_width
from expedit_d2.cli.subjects import load_any_model, needed_setting
from expedit_d2.data import register_collage
from expedit_d2.engine import check_file, import_modules, one_sentence
from expedit_d2.export import ImageModel, check_onnx, export_onnx, export_program, onnx_session
from expedit_d2.files import code_in_files


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser("export.py", __doc__)
    option = parser.add_argument
    option("--output", required=True, metavar="FILE", help="the file to write")
    option("--format", choices=("onnx", "pt2"), help="default: by the file's name")
    option("--size", type=height_width, default=(256, 320), help="of the example, HxW (256x320)")
    option("--fixed", action="store_true", help="take images of this size only")
    option("--check", action="store_true", help="compare with PyTorch")
    option(
        "--benchmark",
        type=at_least(0),
        default=0,
        metavar="N",
        help="time N rounds, plain and expedited",
    )
    add_config_options(parser)
    args = parser.parse_args(arguments)
    if args.format is None:
        args.format = "pt2" if args.output.endswith(".pt2") else "onnx"
    return args


def load(args: argparse.Namespace, expedited: bool | None = None) -> nn.Module:
    """What is exported: a module that takes one tensor of images, on the CPU.

    Args:
        args: of the command line.
        expedited: with Expedit or without; None: as the config says.
    """
    model = load_any_model(args.config_file, args.opts, "cpu", expedited)
    return ImageModel(model).eval() if hasattr(model, "predict") else model.backbone


def random_images(size: tuple[int, int]) -> Tensor:
    """One image of noise (1, 3, H, W), 0 to 255."""
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 255


def check(model: nn.Module, path: str, size: tuple[int, int], fixed: bool) -> None:
    """Print the largest difference between ONNX Runtime and PyTorch, also at another size."""
    for height, width in [size] if fixed else [size, (size[0] + 64, size[1] + 32)]:
        difference = check_onnx(model, path, random_images((height, width)))
        print(f"{height} x {width}: largest difference from PyTorch {difference:.1e}")


def benchmark(args: argparse.Namespace, path: Path) -> None:
    """Print the medians of PyTorch and ONNX Runtime, plain and with Expedit."""
    images = random_images(args.size)
    runs: dict[str, Any] = {}
    for name, expedited in (("plain", False), ("Expedit", True)):
        model = load(args, expedited)
        file = path.with_name(f"{path.stem}_{name.lower()}{path.suffix}")
        export_onnx(model, images, file, dynamic=not args.fixed)
        runs["PyTorch", name] = partial(model, images)
        runs["ONNX Runtime", name] = partial(onnx_session(file), images)
    with torch.no_grad():
        times = interleaved(runs, args.benchmark, warmup=2, progress=True)
    rows = []
    for engine in ("PyTorch", "ONNX Runtime"):
        plain, ours = times[engine, "plain"], times[engine, "Expedit"]
        rows.append([engine, plain, ours, f"{plain.median / ours.median:.2f}x"])
    print(f"{args.size[0]} x {args.size[1]}, batch 1, {torch.get_num_threads()} threads")
    print(tabulate(rows, ["", "plain", "Expedit", "speed-up"], disable_numparse=True))


def main(args: argparse.Namespace) -> None:
    setup_logger(name="detectron2").setLevel("ERROR")
    if args.format == "pt2" and (args.check or args.benchmark):
        raise ValueError("--check and --benchmark are for --format onnx")
    check_file(args.output, "--output")
    import_modules(args.imports)
    register_collage()
    if args.benchmark:
        needed_setting(args.config_file, args.opts)
    model, images = load(args), random_images(args.size)
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.format == "pt2":
        torch.export.save(export_program(model, images, not args.fixed), path)
    else:
        export_onnx(model, images, path, not args.fixed)
    print(f"wrote {path}")
    if args.check:
        check(model, str(path), args.size, args.fixed)
    if args.benchmark:
        benchmark(args, path)


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    args = parse_arguments(arguments)
    with code_in_files(args.run_code_in_files), one_sentence("export.py"):
        main(args)


if __name__ == "__main__":
    run()
