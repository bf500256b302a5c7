#!/usr/bin/env python
"""Keep a checkpoint's weights only, in half precision: small enough to ship.

Example::

    python tools/slim_checkpoint.py output/vitdet_collage/model_final.pth vitdet_collage.pth
"""

from __future__ import annotations

import argparse
import sys

from expedit_d2.engine import slim_checkpoint
from expedit_d2.files import add_trust_option, code_in_files


def run(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="checkpoint of a training run, or its URL")
    parser.add_argument("target", help="file to write; must not exist yet")
    add_trust_option(parser)
    args = parser.parse_args(arguments)
    try:
        with code_in_files(args.run_code_in_files):
            slimmed = slim_checkpoint(args.source, args.target)
    except (OSError, ValueError) as error:
        sys.exit(f"slim_checkpoint.py: {error}")
    print(f"{args.target}: {slimmed.size / 1e6:.1f} MB")
    if slimmed.kept:
        print(f"not in half precision, which has no numbers as large: {', '.join(slimmed.kept)}")


if __name__ == "__main__":
    run()
