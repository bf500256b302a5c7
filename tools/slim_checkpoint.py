#!/usr/bin/env python
r"""Write only the weights of a checkpoint, in half precision.

Examples::

    python tools/slim_checkpoint.py output/my_vitdet/model_final.pth my_vitdet.pth

    # only the head of a model with a frozen backbone from another checkpoint
    python tools/slim_checkpoint.py output/segmenter/model_final.pth head.pth \
        --head-of my_segmenter.yaml
"""

from __future__ import annotations

from torch import Tensor

from expedit_d2.cli.options import ToolParser, add_trust_option
from expedit_d2.data import register_by_path, register_collage
from expedit_d2.engine import one_sentence, slim_checkpoint
from expedit_d2.files import code_in_files
from expedit_d2.projects import frozen_part, load_cfg


def frozen_weights_of(config_file: str) -> dict[str, Tensor]:
    """The weights that a config freezes; registers data sets, as models may need their metadata."""
    register_collage()
    cfg = load_cfg(config_file)
    register_by_path([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    return frozen_part(cfg)


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; expected errors end with one sentence."""
    parser = ToolParser("slim_checkpoint.py", __doc__)
    parser.add_argument("source", help="checkpoint of a training run, or its URL")
    parser.add_argument("target", help="file to write; must not exist yet")
    parser.add_argument(
        "--head-of",
        metavar="CONFIG",
        help="leave out the backbone that this config freezes and loads from its CHECKPOINT",
    )
    add_trust_option(parser)
    args = parser.parse_args(arguments)
    with code_in_files(args.run_code_in_files), one_sentence("slim_checkpoint.py"):
        elsewhere = frozen_weights_of(args.head_of) if args.head_of else {}
        slimmed = slim_checkpoint(args.source, args.target, elsewhere)
    print(f"{args.target}: {slimmed.size / 1e6:.1f} MB")
    if slimmed.full_precision:
        names = ", ".join(slimmed.full_precision)
        print(f"not in half precision, which has no numbers as large: {names}")


if __name__ == "__main__":
    run()
