#!/usr/bin/env python
"""Convert an official checkpoint of DPT or Depth Anything V2 for ``MODEL.WEIGHTS``.

Example::

    python tools/convert_dpt.py --config-file projects/DPT/configs/dpt_large_midas.yaml \
        dpt_large-midas-2f21e586.pt dpt_large_midas.pth
"""

from __future__ import annotations

import torch
from detectron2.modeling import build_model

from expedit_d2.engine import import_modules, one_sentence
from projects import load_cfg
from projects.arguments import ToolParser, add_config_options
from projects.DPT.convert import convert_checkpoint


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; an expected error ends with one sentence."""
    parser = ToolParser("convert_dpt.py", __doc__)
    parser.add_argument("source", help="official checkpoint")
    parser.add_argument("target", help="file to write; must not exist yet")
    add_config_options(parser, "the model's YAML")
    args = parser.parse_args(arguments)
    with one_sentence("convert_dpt.py"):
        import_modules(args.imports)
        cfg = load_cfg(args.config_file, args.opts)
        cfg.MODEL.DEVICE = "meta"  # only names and shapes are needed
        cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.CHECKPOINT = False, ""
        with torch.device("meta"):
            model = build_model(cfg)
        conversion = convert_checkpoint(args.source, args.target, model)
    print(f"{conversion.summary()}\nwritten: {args.target}")


if __name__ == "__main__":
    run()
