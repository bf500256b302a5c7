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
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import print_csv_format
from detectron2.utils import comm

from expedit_d2.comparison import compare, to_table
from expedit_d2.data import register_by_path, register_collage
from expedit_d2.engine import (
    evaluate_lazy,
    load_lazy_config,
    train_lazy,
)
from expedit_d2.settings import Settings
from projects import load_cfg, load_model, trainer_of


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
        return run_comparison(cfg)
    trainer_class = trainer_of(cfg)
    if args.eval_only:
        return trainer_class.test(cfg, load_model(cfg))
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run_comparison(cfg: CfgNode) -> dict[str, Any]:
    """The configured model without and with its ``MODEL.EXPEDIT``, on every test data set."""
    settings = Settings.from_node({**cfg.MODEL.EXPEDIT, "ENABLED": True})
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.EXPEDIT.ENABLED = False
    trainer = trainer_of(plain)
    model = load_model(plain)
    for name in plain.DATASETS.TEST:
        loader = trainer.build_test_loader(plain, name)
        rows = compare(
            model, {"expedit": settings}, loader, partial(trainer.build_evaluator, plain, name)
        )
        print(f"\n{name}\n{to_table(rows)}\n")
    return {}


def run_lazy(args: argparse.Namespace) -> dict[str, Any]:
    cfg = load_lazy_config(args.config_file, args.opts)
    default_setup(cfg, args)
    if args.eval_only:
        results = evaluate_lazy(cfg)
        if comm.is_main_process():
            print_csv_format(results)
        return results
    return train_lazy(cfg, args.resume)


def main(args: argparse.Namespace) -> dict[str, Any]:
    register_collage()
    return run_lazy(args) if args.config_file.endswith(".py") else run_yaml(args)


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument(
        "--compare", action="store_true", help="evaluate without and with Expedit, in one table"
    )
    args = parser.parse_args(arguments)
    try:
        if not os.path.isfile(args.config_file):
            raise FileNotFoundError(f"--config-file: there is no file {args.config_file!r}")
        if args.compare and args.config_file.endswith(".py"):
            raise ValueError("--compare takes a YAML config")
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
