#!/usr/bin/env python
"""Convert an official Segmenter checkpoint for Detectron2.

Writes the weights and, beside them, a config with the settings of the official variant.yml.

Example::

    python tools/convert_segmenter.py seg_large_mask/checkpoint.pth seg_large_mask.pth
    python tools/train_net.py --eval-only --config-file seg_large_mask.yaml
"""

from __future__ import annotations

import argparse
import sys

from expedit_d2.files import add_trust_option, code_in_files
from projects.Segmenter.convert import convert_checkpoint


def run(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", help="official checkpoint.pth or its URL, with variant.yml beside it"
    )
    parser.add_argument("target", help="file to write; must not exist yet")
    add_trust_option(parser)
    args = parser.parse_args(arguments)
    try:
        with code_in_files(args.run_code_in_files):
            report = convert_checkpoint(args.source, args.target)
    except (OSError, ValueError) as error:
        sys.exit(f"convert_segmenter.py: {error}")
    print(f"{report}\n{args.target} and its config are written")


if __name__ == "__main__":
    run()
