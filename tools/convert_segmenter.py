#!/usr/bin/env python
"""Convert an official Segmenter checkpoint for Detectron2.

Writes the weights and, beside them, a config with the settings of the official variant.yml.

Example::

    python tools/convert_segmenter.py seg_large_mask/checkpoint.pth seg_large_mask.pth
    python tools/train_net.py --eval-only --config-file seg_large_mask.yaml
"""

from __future__ import annotations

from expedit_d2.cli.options import ToolParser, add_trust_option
from expedit_d2.engine import one_sentence
from expedit_d2.files import code_in_files
from expedit_d2.projects.Segmenter.convert import convert_checkpoint


def run(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run; expected errors end with one sentence."""
    parser = ToolParser("convert_segmenter.py", __doc__)
    parser.add_argument(
        "source", help="official checkpoint.pth or its URL, with variant.yml beside it"
    )
    parser.add_argument("target", help="file to write; must not exist yet")
    add_trust_option(parser)
    args = parser.parse_args(arguments)
    with code_in_files(args.run_code_in_files), one_sentence("convert_segmenter.py"):
        report = convert_checkpoint(args.source, args.target)
    print(f"{report}\n{args.target} and its config are written")


if __name__ == "__main__":
    run()
