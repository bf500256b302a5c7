#!/usr/bin/env python
"""Train or evaluate a model with Detectron2, from a YAML config or a LazyConfig.

Examples::

    # evaluate official weights, plain and with Expedit
    python tools/train_net.py --eval-only --config-file configs/vitdet/mask_rcnn_vitdet_b.yaml
    python tools/train_net.py --eval-only --config-file configs/vitdet/mask_rcnn_vitdet_b.yaml \
        MODEL.EXPEDIT.ENABLED True MODEL.EXPEDIT.ALPHA 4 MODEL.EXPEDIT.RATIO 0.7

    # both at once, in one table with GFLOPs and speed
    python tools/train_net.py --eval-only --compare \
        --config-file configs/vitdet/mask_rcnn_vitdet_b_expedit_a4_45x45.yaml

    # an existing ViTDet LazyConfig
    python tools/train_net.py --eval-only --config-file my_vitdet.py \
        train.init_checkpoint=my_weights.pth expedit.enabled=True expedit.alpha=4 expedit.ratio=0.7

    # models and data sets of your own, registered by a module
    python tools/train_net.py --import my_model.py --config-file my_model.yaml --num-gpus 4

Training is kept in the output folder: --resume goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import print_csv_format
from detectron2.utils import comm

from expedit_d2.cli.arguments import ToolParser, add_config_options, at_least
from expedit_d2.cli.subjects import is_lazy, load_subject, needed_setting, subject_of
from expedit_d2.comparison import Subject, check_finished, compare, to_terminal
from expedit_d2.data import register_by_path, register_collage
from expedit_d2.engine import (
    check_data_sets,
    check_folder,
    evaluate_lazy,
    import_modules,
    launch,
    load_lazy_config,
    one_sentence,
    train_lazy,
)
from expedit_d2.files import code_in_files
from expedit_d2.projects import load_cfg, load_model, trainer_of
from expedit_d2.settings import Settings


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser("train_net.py", __doc__)
    option = parser.add_argument
    option("--eval-only", action="store_true", help="evaluate, do not train")
    option("--compare", action="store_true", help="evaluate without and with Expedit, in one table")
    option("--resume", action="store_true", help="go on from the last checkpoint in the output")
    option(
        "--num-gpus", type=at_least(1), default=1, help="processes on each machine (%(default)s)"
    )
    option("--num-machines", type=at_least(1), default=1, help="(%(default)s)")
    option("--machine-rank", type=at_least(0), default=0, help="of this machine (%(default)s)")
    option(
        "--dist-url",
        default="auto",
        help="where processes meet; for several machines tcp://HOST:PORT of the first",
    )
    add_config_options(parser)
    args = parser.parse_args(arguments)
    if args.machine_rank >= args.num_machines:
        parser.error(f"--machine-rank must be below --num-machines, got {args.machine_rank}")
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("--num-machines needs --dist-url tcp://HOST:PORT, of the first machine")
    if args.compare and args.num_gpus * args.num_machines > 1:
        parser.error("--compare runs in one process: leave --num-gpus at 1")
    return args


def setup(args: argparse.Namespace) -> CfgNode:
    """The YAML config with the command line's overrides, data sets registered."""
    cfg = load_cfg(args.config_file, args.opts)
    cfg.freeze()
    check_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    register_by_path([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    # Training ends with an evaluation, if there is something to evaluate on.
    if args.eval_only or args.compare or cfg.DATASETS.TEST:
        check_data_sets("DATASETS.TEST", cfg.DATASETS.TEST)
    return cfg


def run_yaml(args: argparse.Namespace) -> dict[str, Any]:
    cfg = setup(args)
    default_setup(cfg, args)
    if args.compare:
        return compare_yaml(cfg, args)
    trainer_class = trainer_of(cfg)
    if args.eval_only:
        return trainer_class.test(cfg, load_model(cfg))
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def print_comparison(subject: Subject, settings: Settings) -> None:
    """The plain model and the configured one, measured anew."""
    comparison = compare(subject, {"expedit": settings})
    print(f"\n{to_terminal(comparison)}\n")
    check_finished([comparison])


def compare_yaml(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any]:
    """On every test data set."""
    settings = needed_setting(args.config_file, args.opts)
    for name in cfg.DATASETS.TEST:
        print_comparison(subject_of(cfg, Path(args.config_file).stem, name), settings)
    return {}


def run_lazy(args: argparse.Namespace) -> dict[str, Any]:
    cfg = load_lazy_config(args.config_file, args.opts)
    check_folder(cfg.train.output_dir, "train.output_dir")
    default_setup(cfg, args)
    if args.compare:
        settings = needed_setting(args.config_file, args.opts)
        print_comparison(load_subject(args.config_file, args.opts), settings)
        return {}
    if args.eval_only:
        results = evaluate_lazy(cfg)
        if comm.is_main_process():
            print_csv_format(results)
        return results
    return train_lazy(cfg, args.resume)


def main(args: argparse.Namespace) -> dict[str, Any]:
    import_modules(args.imports)
    register_collage()
    return run_lazy(args) if is_lazy(args.config_file) else run_yaml(args)


def kept(args: argparse.Namespace) -> str:
    """What an interruption leaves behind."""
    if args.eval_only or args.compare:
        return "an evaluation that is not finished leaves no result"
    if is_lazy(args.config_file):
        folder = load_lazy_config(args.config_file, args.opts).train.output_dir
    else:
        folder = load_cfg(args.config_file, args.opts).OUTPUT_DIR
    if not (Path(folder) / "last_checkpoint").is_file():
        return f"no checkpoint had been saved in {folder} yet"
    return f"the checkpoints so far are in {folder}; the same command with --resume goes on"


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    args = parse_arguments(arguments)
    with code_in_files(args.run_code_in_files), one_sentence("train_net.py", lambda: kept(args)):
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )


if __name__ == "__main__":
    run()
