"""`expedit export`; its options are in `commands`."""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.logger import setup_logger
from tabulate import tabulate
from torch import Tensor, nn

from ..analysis.timing import interleaved
from ..api import apply, is_expedited
from ..data import register_collage
from ..engine import check_file, import_modules, one_sentence
from ..export import ImageModel, check_onnx, export_onnx, export_program, onnx_session
from ..files import code_in_files
from ..libraries import load_feature_model
from ..settings import parse_setting
from .commands import parser_of
from .measuring import check_model_options
from .workloads import load_any_model, needed_setting


def parse_arguments(arguments: list[str] | None, prog: str = "export.py") -> argparse.Namespace:
    args = parser_of("export", prog).parse_args(arguments)
    if args.format is None:
        args.format = "pt2" if args.output.endswith(".pt2") else "onnx"
    return args


def load(args: argparse.Namespace, expedited: bool | None = None) -> nn.Module:
    """The module to export, from one tensor of images, on the CPU.

    Args:
        args: command line arguments.
        expedited: whether to expedite the model; None: as configured, or as ``--setting`` says.
    """
    if args.model is None:
        model = load_any_model(args.config_file, args.opts, "cpu", expedited)
    else:
        torch.manual_seed(0)  # of random weights
        model = load_feature_model(args.model, args.size, args.random_weights)
        if args.setting and expedited is not False:
            apply(model, parse_setting(args.setting)[1])
    return ImageModel(model).eval() if hasattr(model, "predict") else model.backbone


def random_images(size: tuple[int, int]) -> Tensor:
    """A random image (1, 3, H, W), 0 to 255."""
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 255


def check(model: nn.Module, path: str, size: tuple[int, int], fixed: bool) -> None:
    """Print the largest difference between ONNX Runtime and PyTorch, unless fixed at two sizes."""
    for height, width in [size] if fixed else [size, (size[0] + 64, size[1] + 32)]:
        difference = check_onnx(model, path, random_images((height, width)))
        print(f"{height} x {width}: largest difference from PyTorch {difference:.1e}")


def benchmark(args: argparse.Namespace, exported: nn.Module, path: Path) -> None:
    """Print the times of PyTorch and ONNX Runtime, plain and with Expedit.

    ``exported`` is one of the two, and in ``path``; the other is exported beside it.
    """
    images = random_images(args.size)
    runs: dict[str, Any] = {}
    for name, expedited in (("plain", False), ("Expedit", True)):
        model, file = exported, path
        if is_expedited(exported) != expedited:
            model = load(args, expedited)
            file = path.with_name(f"{path.stem}_{name.lower()}{path.suffix}")
            export_onnx(model, images, file, dynamic=not args.fixed)
        runs["PyTorch", name] = partial(model, images)
        runs["ONNX Runtime", name] = partial(onnx_session(file), images)
    with torch.no_grad():
        times = interleaved(runs, args.benchmark, warmup=2, progress=True)
    rows = []
    for engine in ("PyTorch", "ONNX Runtime"):
        plain, expedited = times[engine, "plain"], times[engine, "Expedit"]
        rows.append([engine, plain, expedited, f"{plain.median / expedited.median:.2f}x"])
    print(f"{args.size[0]} x {args.size[1]}, batch 1, {torch.get_num_threads()} threads")
    print(tabulate(rows, ["", "plain", "Expedit", "speed-up"], disable_numparse=True))


def check_setting(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: if there is no setting to compare with the plain model.
    """
    if args.model is None:
        needed_setting(args.config_file, args.opts)
    elif not args.setting:
        raise ValueError('--benchmark compares with Expedit: give --setting "budget=0.5"')


def main(args: argparse.Namespace) -> None:
    setup_logger(name="detectron2").setLevel("ERROR")
    logging.getLogger("onnxscript").setLevel("ERROR")  # a line for each node that it leaves as is
    if args.format == "pt2" and (args.check or args.benchmark):
        raise ValueError("--check and --benchmark need --format onnx, got pt2")
    check_file(args.output, "--output")
    import_modules(args.imports)
    register_collage()
    check_model_options(args, ("random_weights", "setting"))
    if args.benchmark:
        check_setting(args)
    model = load(args)
    if args.model is not None:  # most have one size, and others are merged for one
        args.size, args.fixed = model.model.size, True
    args.size = args.size or (256, 320)
    images = random_images(args.size)
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
        benchmark(args, model, path)


def run(arguments: list[str] | None = None, prog: str = "export.py") -> None:
    """Parse the arguments and run; expected errors end with one sentence."""
    args = parse_arguments(arguments, prog)
    with code_in_files(args.run_code_in_files), one_sentence(prog):
        main(args)
