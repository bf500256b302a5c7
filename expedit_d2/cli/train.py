"""`expedit train`; its options are in `commands`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import print_csv_format
from detectron2.utils import comm

from ..comparison import Workload, check_finished, compare, to_terminal
from ..data import register_by_path, register_collage
from ..engine import (
    check_data_sets,
    check_folder,
    evaluate_lazy,
    import_modules,
    launch,
    load_lazy_config,
    one_sentence,
    train_lazy,
)
from ..files import code_in_files
from ..projects import load_cfg, load_model, trainer_of
from ..settings import Settings
from .commands import parser_of
from .workloads import is_lazy, load_workload, needed_setting, workload_of


def parse_arguments(arguments: list[str] | None, prog: str = "train_net.py") -> argparse.Namespace:
    parser = parser_of("train", prog)
    args = parser.parse_args(arguments)
    if args.machine_rank >= args.num_machines:
        parser.error(f"--machine-rank must be below --num-machines, got {args.machine_rank}")
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("--num-machines needs --dist-url tcp://HOST:PORT of the first machine")
    if args.compare and args.num_gpus * args.num_machines > 1:
        parser.error("--compare runs in one process: leave --num-gpus at 1")
    return args


def setup(args: argparse.Namespace) -> CfgNode:
    """The YAML config with its overrides; registers its data sets."""
    cfg = load_cfg(args.config_file, args.opts)
    cfg.freeze()
    check_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    register_by_path([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    # Training ends with an evaluation if there is test data.
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


def print_comparison(workload: Workload, settings: Settings) -> None:
    """Compare the plain model with the configured one."""
    comparison = compare(workload, {"expedit": settings})
    print(f"\n{to_terminal(comparison)}\n")
    check_finished([comparison])


def compare_yaml(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any]:
    """Compare on every test data set."""
    settings = needed_setting(args.config_file, args.opts)
    for name in cfg.DATASETS.TEST:
        print_comparison(workload_of(cfg, Path(args.config_file).stem, name), settings)
    return {}


def run_lazy(args: argparse.Namespace) -> dict[str, Any]:
    cfg = load_lazy_config(args.config_file, args.opts)
    check_folder(cfg.train.output_dir, "train.output_dir")
    default_setup(cfg, args)
    if args.compare:
        settings = needed_setting(args.config_file, args.opts)
        print_comparison(load_workload(args.config_file, args.opts), settings)
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


def what_is_left(args: argparse.Namespace) -> str:
    """Which results an interruption has left."""
    if args.eval_only or args.compare:
        return "an unfinished evaluation leaves no results"
    if is_lazy(args.config_file):
        folder = load_lazy_config(args.config_file, args.opts).train.output_dir
    else:
        folder = load_cfg(args.config_file, args.opts).OUTPUT_DIR
    if not (Path(folder) / "last_checkpoint").is_file():
        return f"no checkpoint has been saved in {folder} yet"
    return f"checkpoints are in {folder}; the same command with --resume resumes"


def run(arguments: list[str] | None = None, prog: str = "train_net.py") -> None:
    """Parse the arguments and run; expected errors end with one sentence."""
    args = parse_arguments(arguments, prog)
    with code_in_files(args.run_code_in_files), one_sentence(prog, lambda: what_is_left(args)):
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
