#!/usr/bin/env python
"""Time the two operators, a dense implementation, and the blocks of a ViT-L.

The dense implementation is that of the published code (expedit_d2/analysis/dense.py). All that is
measured for one map size is timed in turns, after a check that both implementations agree.

Examples::

    python tools/benchmark_operators.py
    python tools/benchmark_operators.py --device cuda --dtype float16 --vit-blocks 24
    python tools/benchmark_operators.py --sizes 40x40:28x28 27x64:19x45 --no-vit --json times.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

from expedit_d2.analysis.dense import dense_clustering, dense_reconstruction
from expedit_d2.analysis.memory import peak_memory
from expedit_d2.analysis.timing import DTYPES, Timing, interleaved, processor
from expedit_d2.cli.measuring import prepare_benchmark
from expedit_d2.cli.options import ToolParser, at_least, height_width
from expedit_d2.engine import one_sentence
from expedit_d2.operators import cluster_tokens, reconstruct_tokens

SIZES = ["40x40:28x28", "48x48:32x32", "64x64:45x45"]
VIT_DEPTH = 24

Call = Callable[[], Tensor]
Size = tuple[int, int]


def map_and_grid(text: str) -> tuple[Size, Size]:
    """'40x40:28x28', a map and its grid, to ((40, 40), (28, 28))."""
    size, _, grid = text.partition(":")
    try:
        return height_width(size), height_width(grid)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 40x40:28x28") from None


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser("benchmark_operators.py", __doc__)
    option = parser.add_argument
    option(
        "--sizes",
        nargs="+",
        type=map_and_grid,
        default=[map_and_grid(size) for size in SIZES],
        metavar="MAP:GRID",
        help=f"token maps and cluster grids ({' '.join(SIZES)})",
    )
    option("--batch", type=at_least(1), default=1, help="images (%(default)s)")
    option("--channels", type=at_least(1), default=1024, help="a multiple of 64 (%(default)s)")
    option("--iterations", type=at_least(1), default=5, help="of the clustering (%(default)s)")
    option(
        "--window", type=at_least(1), default=5, help="of the clustering, in cells (%(default)s)"
    )
    option("--neighbors", type=at_least(1), default=20, help="of the reconstruction (%(default)s)")
    option("--repeats", type=at_least(1), default=7, help="timed rounds (%(default)s)")
    option("--warmup", type=at_least(0), default=1, help="rounds before these (%(default)s)")
    option("--threads", type=at_least(1), help="CPU threads of torch (its own choice)")
    option("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    option("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    option(
        "--vit-blocks",
        type=int,
        choices=range(1, VIT_DEPTH + 1),
        default=4,
        metavar="N",
        help=f"blocks of the ViT-L to time, scaled to all {VIT_DEPTH} (%(default)s)",
    )
    option("--no-vit", action="store_true", help="without the ViT-L")
    option("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(arguments)
    if args.channels % 64:
        parser.error("--channels must be a multiple of 64, the width of a head")
    for (height, width), (rows, cols) in args.sizes:
        if args.neighbors > rows * cols:
            parser.error(
                f"--neighbors must be at most {rows * cols}, the clusters of "
                f"{height}x{width}:{rows}x{cols}, got {args.neighbors}"
            )
    return args


def vit_blocks(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The first blocks of a ViT-L with random weights, which do not affect speed."""
    import timm

    model = timm.create_model(
        "vit_large_patch16_224",
        pretrained=False,
        depth=args.vit_blocks,
        embed_dim=args.channels,
        num_heads=args.channels // 64,
    )
    return model.blocks.eval().to(device, dtype)


def check_agreement(name: str, ours: Call, dense: Call) -> None:
    """Check that both results are equal for 99 % of the tokens.

    The others have two clusters at the same distance, either of which may be their last neighbor.

    Raises:
        ValueError: if not.
    """
    expected = dense()
    errors = (ours() - expected).norm(dim=-1) / expected.norm(dim=-1)
    error = errors.flatten().quantile(0.99)
    if not error < 1e-3:
        raise ValueError(f"{name} differs from the dense result by {error:.1e}; nothing is timed")


def make_calls(
    args: argparse.Namespace, tokens: Tensor, refined: Tensor
) -> tuple[dict[str, Call], list[tuple[str, str]]]:
    """Functions to time by name, and pairs that must have equal results.

    Args:
        tokens: (B, H, W, C).
        refined: (B, h, w, C), the clusters after the blocks.
    """
    grid = (refined.shape[1], refined.shape[2])
    # About what "auto" chooses for such tokens.
    temperature = 6 / args.channels
    clustering = (tokens, grid, args.iterations, temperature, args.window)
    rebuild = (refined, tokens, cluster_tokens(*clustering)[0], args.neighbors, temperature)
    calls: dict[str, Call] = {
        "dense clustering": partial(dense_clustering, *clustering),
        "dense rebuild": partial(dense_reconstruction, *rebuild),
        "ours clustering": lambda: cluster_tokens(*clustering)[0],
        "ours clustering, auto": lambda: cluster_tokens(
            tokens, grid, args.iterations, "auto", args.window
        )[0],
        "ours rebuild, all": partial(reconstruct_tokens, *rebuild),
        "ours rebuild, window": partial(reconstruct_tokens, *rebuild, window=args.window),
    }
    same = [("ours clustering", "dense clustering"), ("ours rebuild, all", "dense rebuild")]
    return calls, same


def measure(args: argparse.Namespace, size: Size, grid: Size, blocks: nn.Module | None) -> dict:
    """All times (seconds) and memory (bytes) for one map size."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(args.batch, *shape, args.channels, generator=generator).to(device)

    tokens, refined = random(*size), random(*grid)
    # In full precision, as the dense code is too inaccurate in half precision.
    calls, same = make_calls(args, tokens, refined)
    for ours, dense in same:
        check_agreement(ours, calls[ours], calls[dense])
    calls, _ = make_calls(args, tokens.to(dtype), refined.to(dtype))
    memory = {name: peak_memory(call, device) for name, call in calls.items()}
    if blocks is not None:
        sequence = random(1 + size[0] * size[1]).to(dtype)  # and the class token
        calls["vit"] = partial(blocks, sequence)
    times = interleaved(calls, args.repeats, args.warmup)
    if blocks is not None:
        times["vit"] = times["vit"].scaled(VIT_DEPTH / args.vit_blocks)
    return {"map": size, "grid": grid, "seconds": times, "bytes": memory}


HEADERS = [
    "map to grid",
    "",
    "dense, ms",
    "ours, ms",
    "speed-up",
    "ours / ViT-L",
    "dense, MiB",
    "ours, MiB",
]


def table_rows(result: dict, window: int) -> list[list[str]]:
    """The rows of one map size, as in `HEADERS`."""
    times: dict[str, Timing] = result["seconds"]
    memory: dict[str, int] = result["bytes"]
    vit = times["vit"].median if "vit" in times else None

    def spread(timing: Timing) -> str:
        return f"{1e3 * timing.median:.1f} ({1e3 * timing.low:.1f}-{1e3 * timing.high:.1f})"

    def compared(ours: float, dense: float) -> list[str]:
        return [f"{dense / ours:.1f}x", "" if vit is None else f"{100 * ours / vit:.2f} %"]

    def row(label: str, ours: str, dense: str) -> list[str]:
        mine, theirs = times[f"ours {ours}"], times[f"dense {dense}"]
        sizes = [f"{memory[key] / 2**20:.1f}" for key in (f"dense {dense}", f"ours {ours}")]
        both = [spread(theirs), spread(mine)]
        return [label, *both, *compared(mine.median, theirs.median), *sizes]

    def total(label: str, rebuild: str) -> list[str]:
        """Sum of the medians, and the larger memory."""
        mine = ["ours clustering", f"ours {rebuild}"]
        theirs = ["dense clustering", "dense rebuild"]
        seconds = [sum(times[name].median for name in names) for names in (theirs, mine)]
        sizes = [max(memory[name] for name in names) / 2**20 for names in (theirs, mine)]
        both = [f"{1e3 * s:.1f}" for s in seconds]
        return [label, *both, *compared(seconds[1], seconds[0]), *(f"{s:.1f}" for s in sizes)]

    rows = [
        row("clustering", "clustering", "clustering"),
        row("clustering, automatic temperature", "clustering, auto", "clustering"),
        row("rebuild from all", "rebuild, all", "rebuild"),
        row(f"rebuild, window {window} (dense: all)", "rebuild, window", "rebuild"),
        total("clustering + rebuild from all", "rebuild, all"),
        total(f"clustering + rebuild, window {window}", "rebuild, window"),
    ]
    if vit is not None:
        rows.append([f"ViT-L, {VIT_DEPTH} blocks", "", spread(times["vit"]), "", "", "", ""])
    name = "{}x{} to {}x{}".format(*result["map"], *result["grid"])
    return [[name if index == 0 else "", *row] for index, row in enumerate(rows)]


def main(args: argparse.Namespace) -> None:
    prepare_benchmark(args)
    environment = {
        "device": processor(args.device),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "torch": torch.__version__,
    }
    settings = {
        name: getattr(args, name)
        for name in ("batch", "channels", "iterations", "window", "neighbors", "repeats")
    }
    print(", ".join(f"{name} {value}" for name, value in {**environment, **settings}.items()))
    if not args.no_vit:
        timed = "all timed" if args.vit_blocks == VIT_DEPTH else f"scaled up from {args.vit_blocks}"
        print(f"ViT-L: {VIT_DEPTH} blocks with random weights, {timed}")
        settings["vit_blocks_timed"] = args.vit_blocks

    results = []
    with torch.inference_mode():
        blocks = None
        if not args.no_vit:
            blocks = vit_blocks(args, torch.device(args.device), getattr(torch, args.dtype))
        for size, grid in args.sizes:
            print(f"measuring {size} to {grid} ...", file=sys.stderr, flush=True)
            results.append(measure(args, size, grid, blocks))

    rows = [row for result in results for row in table_rows(result, args.window)]
    aligned = ("left", "left", *["right"] * (len(HEADERS) - 2))
    print(tabulate(rows, HEADERS, disable_numparse=True, colalign=aligned))
    print("Median (middle half) of the repeats. Peak memory: beyond the inputs.")
    if args.json:
        report = {"environment": environment, "settings": settings, "results": results}
        # Only timings need conversion for JSON.
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2, default=vars) + "\n", encoding="utf-8")


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; expected errors end with one sentence."""
    args = parse_arguments(arguments)
    with one_sentence("benchmark_operators.py"):
        main(args)


if __name__ == "__main__":
    run()
