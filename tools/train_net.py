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
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import print_csv_format
from detectron2.utils import comm

from expedit_d2.comparison import Subject, compare, to_terminal
from expedit_d2.data import register_by_path, register_collage
from expedit_d2.engine import (
    evaluate_lazy,
    launch,
    load_lazy_config,
    train_lazy,
)
from expedit_d2.files import add_trust_option, code_in_files
from expedit_d2.settings import Settings
from projects import load_cfg, load_model, trainer_of
from projects.subjects import is_lazy, load_subject, setting_of, subject_of


def setup(args: argparse.Namespace) -> CfgNode:
    """The YAML config with the command line's overrides, data sets registered."""
    cfg = load_cfg(args.config_file, args.opts)
    cfg.freeze()
    register_by_path([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
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


def print_comparison(subject: Subject, settings: Settings | None) -> None:
    """The plain model and the configured one, measured anew."""
    if settings is None:
        raise ValueError("--compare: MODEL.EXPEDIT has no ALPHA and no BUDGET: nothing to compare")
    comparison = compare(subject, {"expedit": settings})
    print(f"\n{to_terminal(comparison)}\n")
    if comparison.unfinished:
        raise KeyboardInterrupt


def compare_yaml(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any]:
    """On every test data set."""
    settings = setting_of(args.config_file, args.opts)
    for name in cfg.DATASETS.TEST:
        print_comparison(subject_of(cfg, Path(args.config_file).stem, name), settings)
    return {}


def run_lazy(args: argparse.Namespace) -> dict[str, Any]:
    cfg = load_lazy_config(args.config_file, args.opts)
    default_setup(cfg, args)
    if args.compare:
        settings = setting_of(args.config_file, args.opts)
        print_comparison(load_subject(args.config_file, args.opts), settings)
        return {}
    if args.eval_only:
        results = evaluate_lazy(cfg)
        if comm.is_main_process():
            print_csv_format(results)
        return results
    return train_lazy(cfg, args.resume)


def main(args: argparse.Namespace) -> dict[str, Any]:
    register_collage()
    with code_in_files(args.run_code_in_files):
        return run_lazy(args) if is_lazy(args.config_file) else run_yaml(args)


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument(
        "--compare", action="store_true", help="evaluate without and with Expedit, in one table"
    )
    add_trust_option(parser)
    args = parser.parse_args(arguments)
    try:
        if not os.path.isfile(args.config_file):
            raise FileNotFoundError(f"--config-file: there is no file {args.config_file!r}")
        if args.compare and args.num_gpus * args.num_machines > 1:
            raise ValueError("--compare runs in one process: leave --num-gpus at 1")
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except (ValueError, OSError, KeyError, ModuleNotFoundError) as error:
        # str() of a KeyError is quoted.
        sys.exit(f"train_net.py: {error.args[0] if isinstance(error, KeyError) else error}")


if __name__ == "__main__":
    run()
