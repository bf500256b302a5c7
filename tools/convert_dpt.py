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
from detectron2.modeling import build_model

from projects import load_cfg
from projects.DPT.convert import convert_checkpoint


def run(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, help="the model's config")
    parser.add_argument("source", help="official checkpoint")
    parser.add_argument("target", help="file to write; must not exist yet")
    parser.add_argument("opts", nargs="*", help="keys and values that override the config")
    args = parser.parse_args(arguments)
    try:
        cfg = load_cfg(args.config_file, args.opts)
        cfg.MODEL.DEVICE = "meta"  # only names and shapes are needed
        cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.CHECKPOINT = False, ""
        with torch.device("meta"):
            model = build_model(cfg)
        conversion = convert_checkpoint(args.source, args.target, model)
    except (ValueError, OSError, KeyError) as error:
        sys.exit(f"convert_dpt.py: {error.args[0] if isinstance(error, KeyError) else error}")
    print(f"{conversion.summary()}\nwritten: {args.target}")


if __name__ == "__main__":
    run()
