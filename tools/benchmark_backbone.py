#!/usr/bin/env python
r"""Time a config's transformer: plain, with fused attention, with Expedit, and with both.

Only the transformer runs, with random weights, on random images. All four are timed in turns.
Clustering and rebuilding are timed inside the forward pass, in separate rounds. GFLOPs are counted
by fvcore, as everywhere in this repository.

Examples::

    python tools/benchmark_backbone.py --config-file \\
        projects/Segmenter/configs/ade20k/segmenter_vit_l_mask_expedit_a10_28x28.yaml
    python tools/benchmark_backbone.py --config-file \\
        configs/vitdet/mask_rcnn_vitdet_b_expedit_a4_45x45.yaml --sizes 1024x1024 --memory
    python tools/benchmark_backbone.py --config-file … --device cuda --dtype bfloat16 --batch 8
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import Tensor, nn

from expedit_d2 import fuse_attention
from expedit_d2.adapters import find_transformer
from expedit_d2.analysis.flops import count_flops
from expedit_d2.analysis.memory import peak_memory
from expedit_d2.analysis.timing import DTYPES, interleaved, processor, synchronize
from expedit_d2.api import Expedited, apply
from expedit_d2.cli.measuring import prepare_benchmark
from expedit_d2.cli.options import ToolParser, add_config_options, at_least, height_width
from expedit_d2.comparison import share_weights
from expedit_d2.engine import import_modules, one_sentence
from expedit_d2.files import code_in_files
from expedit_d2.projects import load_cfg
from expedit_d2.settings import Settings


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser("benchmark_backbone.py", __doc__)
    option = parser.add_argument
    option(
        "--sizes",
        nargs="+",
        type=height_width,
        default=[(640, 640)],
        metavar="HxW",
        help="of the images, in pixels (640x640)",
    )
    option("--batch", type=at_least(1), default=1, help="images (%(default)s)")
    option("--blocks", type=at_least(1), metavar="N", help="keep the first N blocks only (all)")
    option("--repeats", type=at_least(1), default=7, help="timed rounds (%(default)s)")
    option("--warmup", type=at_least(0), default=1, help="rounds before these (%(default)s)")
    option("--threads", type=at_least(1), help="CPU threads of torch (its own choice)")
    option("--dtype", choices=DTYPES, default="float32", help="by autocast (%(default)s)")
    option("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    option("--channels-last", action="store_true", help="images in the memory format channels_last")
    option("--compile", action="store_true", help="time the models with torch.compile")
    option("--memory", action="store_true", help="also peak memory, in one more round")
    option("--cpu-time", action="store_true", help="CPU time of the process; needs --threads 1")
    option("--json", type=Path, metavar="FILE", help="also write the numbers here")
    add_config_options(parser, "YAML with MODEL.EXPEDIT.ALPHA or BUDGET")
    args = parser.parse_args(arguments)
    if args.cpu_time and (args.device != "cpu" or args.threads != 1):
        parser.error("--cpu-time adds up the time of all threads: it needs --threads 1 on the CPU")
    return args


def build(args: argparse.Namespace) -> tuple[nn.Module, Settings]:
    """The plain transformer of a config, and the config's settings."""
    import_modules(args.imports)
    cfg = load_cfg(args.config_file, [*args.opts, "MODEL.DEVICE", args.device])
    settings = Settings.from_node({**cfg.MODEL.EXPEDIT, "ENABLED": True})
    if not settings.reduces:
        raise ValueError(
            f"{args.config_file}: neither MODEL.EXPEDIT.ALPHA nor BUDGET is set; nothing to time"
        )
    cfg.defrost()
    cfg.MODEL.EXPEDIT.ENABLED = cfg.MODEL.EXPEDIT.FUSED_ATTENTION = False
    spec = find_transformer(build_model(cfg).eval())
    if args.blocks is not None:
        setattr(spec.owner, spec.attribute, spec.blocks[: args.blocks])
    return spec.owner, settings


def expedited(vit: nn.Module, settings: Settings, fused: bool) -> Expedited:
    """Expedite a transformer, rebuilding after its last block, as there is no head to do it."""
    settings = replace(settings, reconstruct_at="backbone", fused_attention=fused)
    spec = find_transformer(vit)
    only_last = None if spec.stages or spec.outputs else (len(spec.blocks) - 1,)
    return apply(vit, settings, only_last)


def operator_seconds(
    handle: Expedited, forward: Callable[[], object], repeats: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Median seconds of clustering and reconstruction in a forward pass."""
    starts: list[float] = []
    spent = {"reduce": 0.0, "rebuild": 0.0}

    def start(*_: object) -> None:
        synchronize()
        starts.append(clock())

    def stop(name: str, *_: object) -> None:
        synchronize()
        spent[name] += clock() - starts.pop()

    hooks = []
    for method in handle.blocks.methods.values():
        for name in spent:
            module = getattr(method, name)
            hooks.append(module.register_forward_pre_hook(start))
            hooks.append(module.register_forward_hook(partial(stop, name)))
    rounds = []
    for _ in range(repeats):
        spent.update(reduce=0.0, rebuild=0.0)
        forward()
        rounds.append(tuple(spent.values()))
    for hook in hooks:
        hook.remove()
    return tuple(statistics.median(times) for times in zip(*rounds, strict=True))


def measure(args: argparse.Namespace, vit: nn.Module, settings: Settings, images: Tensor) -> dict:
    """Seconds, GFLOPs and bytes of all four models for one image size.

    Args:
        images: (B, 3, H, W).
    """
    clock = time.process_time if args.cpu_time else time.perf_counter
    models = {name: share_weights(vit) for name in ("plain", "fused", "expedit", "expedit, fused")}
    fuse_attention(models["fused"])
    expedited(models["expedit"], settings, fused=False)
    handle = expedited(models["expedit, fused"], settings, fused=True)
    flops = {name: count_flops(model, images[:1]) for name, model in models.items()}
    dtype = getattr(torch, args.dtype)

    def forward(model: nn.Module) -> None:
        with torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
            model(images)

    calls = {name: partial(forward, model) for name, model in models.items()}
    operators = operator_seconds(handle, calls["expedit, fused"], min(3, args.repeats), clock)
    memory = {}
    if args.memory:
        memory = {name: peak_memory(call, images.device) for name, call in calls.items()}
    if args.compile:
        calls = {name: partial(forward, torch.compile(m)) for name, m in models.items()}
    times = interleaved(calls, args.repeats, args.warmup, clock=clock)
    plain, fewer = times["fused"].median, times["expedit, fused"].median
    saved = flops["fused"].total / flops["expedit, fused"].total
    return {
        "image": tuple(images.shape[2:]),
        "seconds": times,
        "gflops": {name: count.total / 1e9 for name, count in flops.items()},
        "bytes": memory,
        "operator_seconds": dict(zip(("clustering", "rebuilding"), operators, strict=True)),
        "operator_share": sum(operators) / plain,
        "speed_up": plain / fewer,
        "flops_ratio": saved,
        "speed_up_of_flops_ratio": plain / fewer / saved,
    }


def report(result: dict) -> str:
    """The table of one size, and a summary."""
    times, plain = result["seconds"], result["seconds"]["plain"].median
    rows = [
        [
            name,
            str(timing),
            f"{plain / timing.median:.2f}x",
            f"{result['gflops'][name]:.1f}",
            f"{result['bytes'][name] / 2**20:.0f}" if result["bytes"] else "",
        ]
        for name, timing in times.items()
    ]
    head = ["", "time", "speed-up", "GFLOPs an image", "peak MiB"]
    table = tabulate(rows, head, disable_numparse=True, colalign=("left", *["right"] * 4))
    clustering, rebuilding = (1e3 * s for s in result["operator_seconds"].values())
    return (
        "{}x{}\n".format(*result["image"]) + f"{table}\n"
        f"clustering {clustering:.1f} ms, rebuilding {rebuilding:.1f} ms: together "
        f"{100 * result['operator_share']:.2f} % of the fused plain forward pass\n"
        f"with fused attention: speed-up {result['speed_up']:.3f}, GFLOPs ratio "
        f"{result['flops_ratio']:.3f}: {result['speed_up_of_flops_ratio']:.3f} of it\n"
    )


def main(args: argparse.Namespace) -> None:
    prepare_benchmark(args)
    environment = {
        "config": args.config_file,
        "device": processor(args.device),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "batch": args.batch,
        "blocks": args.blocks or "all",
        "repeats": args.repeats,
        "torch": torch.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    vit, settings = build(args)
    results = []
    with torch.inference_mode():
        for size in args.sizes:
            images = torch.randn(args.batch, 3, *size, device=args.device)
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            results.append(measure(args, vit, settings, images))
            print(report(results[-1]), flush=True)
    print("Time: median (middle half) of the repeats. Peak memory: beyond weights and images.")
    if args.json:
        content = {"environment": environment, "settings": vars(settings), "results": results}
        # Only timings need conversion for JSON.
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=2, default=vars) + "\n", encoding="utf-8")


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; expected errors end with one sentence."""
    args = parse_arguments(arguments)
    with code_in_files(args.run_code_in_files), one_sentence("benchmark_backbone.py"):
        main(args)


if __name__ == "__main__":
    run()
