#!/usr/bin/env python
"""Convert an official checkpoint of DPT or Depth Anything V2 for ``MODEL.WEIGHTS``.

Example::

    python tools/convert_dpt.py --config-file projects/DPT/configs/dpt_large_midas.yaml \
        dpt_large-midas-2f21e586.pt dpt_large_midas.pth
"""

from __future__ import annotations

import argparse
import sys

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from expedit_d2.files import add_trust_option, code_in_files
from projects import load_cfg
from projects.DPT.convert import convert_checkpoint


def build_on_meta(cfg: CfgNode) -> nn.Module:
    """The configured model without its weights: only names and shapes are needed."""
    if cfg.MODEL.META_ARCHITECTURE != "DPT":
        raise ValueError(
            "--config-file must be one of projects/DPT/configs, or on top of one: its "
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, not 'DPT'"
        )
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.CHECKPOINT = False, ""
    with torch.device("meta"):
        return build_model(cfg)


def run(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, help="the model's config")
    parser.add_argument("source", help="official checkpoint, or its URL")
    parser.add_argument("target", help="file to write; must not exist yet")
    parser.add_argument("opts", nargs="*", help="keys and values that override the config")
    add_trust_option(parser)
    args = parser.parse_args(arguments)
    try:
        with code_in_files(args.run_code_in_files):
            cfg = load_cfg(args.config_file, args.opts)
            conversion = convert_checkpoint(args.source, args.target, build_on_meta(cfg))
    except (ValueError, OSError, KeyError) as error:
        sys.exit(f"convert_dpt.py: {error.args[0] if isinstance(error, KeyError) else error}")
    print(f"{conversion.summary()}\nwritten: {args.target}")


if __name__ == "__main__":
    run()
