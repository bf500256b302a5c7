#!/usr/bin/env python
r"""Convert an official checkpoint of DPT or Depth Anything V2 for ``MODEL.WEIGHTS``.

Example::

    python tools/convert_dpt.py --config-file projects/DPT/configs/dpt_large_midas.yaml \
        dpt_large-midas-2f21e586.pt dpt_large_midas.pth
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from expedit_d2.cli.options import ToolParser, add_config_options
from expedit_d2.engine import import_modules, one_sentence
from expedit_d2.files import code_in_files
from expedit_d2.projects import load_cfg
from expedit_d2.projects.DPT.convert import convert_checkpoint


def build_on_meta(cfg: CfgNode) -> nn.Module:
    """The configured model without weights, for names and shapes."""
    if cfg.MODEL.META_ARCHITECTURE != "DPT":
        raise ValueError(
            "--config-file must be one of projects/DPT/configs, or based on one: its "
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, not 'DPT'"
        )
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.CHECKPOINT = False, ""
    with torch.device("meta"):
        return build_model(cfg)


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; expected errors end with one sentence."""
    parser = ToolParser("convert_dpt.py", __doc__)
    parser.add_argument("source", help="official checkpoint, or its URL")
    parser.add_argument("target", help="file to write; must not exist yet")
    add_config_options(parser, "the model's YAML")
    args = parser.parse_args(arguments)
    with code_in_files(args.run_code_in_files), one_sentence("convert_dpt.py"):
        import_modules(args.imports)
        cfg = load_cfg(args.config_file, args.opts)
        conversion = convert_checkpoint(args.source, args.target, build_on_meta(cfg))
    print(f"{conversion.summary()}\nwritten: {args.target}")


if __name__ == "__main__":
    run()
