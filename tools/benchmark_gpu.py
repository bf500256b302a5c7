#!/usr/bin/env python
"""Speed of expedited backbones on a GPU, the most important combinations first.

Segmenter's ViT-L, DINOv2 and, where Detectron2 is installed, ViTDet's ViT: plain, with each method
at BUDGET 0.5 and 0.7, and with the published operator; at batch 1, 8 and 32, in bf16, fp16 and
fp32, eager, replayed as CUDA graphs, and compiled. Needs torch and timm. Results are written as
they are measured.

Examples::

    python tools/benchmark_gpu.py --output out --seconds 450
    python tools/benchmark_gpu.py --models Segmenter --batch 1 8 --dtype bfloat16 --mode graph
    python tools/benchmark_gpu.py --device cpu --small --settings "merge 0.5" --mode eager
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the package need not be installed

from expedit_d2.analysis import gpu_benchmark as benchmark  # noqa: E402
from expedit_d2.analysis.gpu_models import MODELS, SMALL_MODELS  # noqa: E402
from expedit_d2.analysis.timing import DTYPES, processor  # noqa: E402


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    option = parser.add_argument
    option("--device", choices=["cpu", "cuda"], default="cuda", help="(%(default)s)")
    option("--small", action="store_true", help="small models, for a CPU")
    option("--models", nargs="+", metavar="NAME", help="models whose names contain this (all)")
    option("--settings", nargs="+", choices=[*benchmark.settings()], metavar="NAME", help="(all)")
    option("--batch", nargs="+", type=int, default=benchmark.BATCHES, metavar="N", help="images")
    option("--dtype", nargs="+", choices=DTYPES, default=benchmark.PRECISIONS)
    option("--mode", nargs="+", choices=benchmark.MODES, help="(all that the device has)")
    option("--seconds", type=float, default=450, help="start nothing after this time (%(default)s)")
    option("--output", type=Path, default=Path("benchmark_gpu"), help="a folder (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.batch) < 1:
        parser.error(f"--batch must be at least 1, got {min(args.batch)}")
    args.entries = {
        name: entry
        for name, entry in (SMALL_MODELS if args.small else MODELS).items()
        if args.models is None or any(part.lower() in name.lower() for part in args.models)
    }
    if not args.entries:
        known = ", ".join(SMALL_MODELS if args.small else MODELS)
        parser.error(f"--models {' '.join(args.models)} names none of {known}")
    if args.mode is None:
        args.mode = [m for m in benchmark.MODES if m != "graph" or args.device == "cuda"]
    elif args.device == "cpu" and "graph" in args.mode:
        parser.error("--mode graph needs a GPU; with --device cpu, valid are eager and compiled")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU; --device cpu --small runs on the CPU")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    began, device = time.perf_counter(), torch.device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    missing = {name: s.needs for name, s in args.entries.items() if not s.available}
    for name, package in missing.items():
        print(f"{name} is left out: {package} is not installed", flush=True)
    entries = {name: s for name, s in args.entries.items() if name not in missing}
    units = benchmark.plan([*entries], args.batch, args.dtype, args.settings, args.mode)
    rows: list[dict] = []
    deviations: list[dict] = []
    left = list(units)
    # A new file for each run, flushed after each row, so that results survive if it is killed.
    with (args.output / "rows.jsonl").open("w", encoding="utf-8") as lines:

        def keep(kept: list[dict], row: dict) -> None:
            kept.append(row)
            print(json.dumps(row), file=lines, flush=True)

        try:
            while left and time.perf_counter() - began < args.seconds:
                print(f"{time.perf_counter() - began:5.0f} s: {left[0]}", flush=True)
                for row in benchmark.measure(entries[left[0].model], left[0], device):
                    keep(rows, row)
                left.pop(0)
                if len(left) == len(units) - 1:
                    for name, entry in SMALL_MODELS.items():
                        if entry.available:
                            for row in benchmark.check(name, entry, device, args.settings):
                                keep(deviations, row)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    result = {
        "device": processor(args.device),
        "torch": torch.__version__,
        "rows": rows,
        "deviations": deviations,
        "left_out": [str(unit) for unit in left],
        "missing": missing,
    }
    (args.output / "results.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    text = [f"{result['device']}, torch {result['torch']}", "", benchmark.table(rows), ""]
    if deviations:
        worst = max(deviations, key=lambda row: row["deviation"])
        text.append(
            f"In fp32, outputs of small models are within {worst['deviation']:.1e} of the CPU's "
            f"({worst['model']}, {worst['name']})."
        )
    if left:
        text.append(f"No time was left for {len(left)} of {len(units)} combinations; the first:")
        text += [f"- {unit}" for unit in left[:10]]
    (args.output / "table.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
