#!/usr/bin/env python
"""Keep a checkpoint's weights only, in half precision: small enough to ship.

Example::

    python tools/slim_checkpoint.py output/vitdet_collage/model_final.pth vitdet_collage.pth
"""

from __future__ import annotations

import argparse
import sys

from expedit_d2.engine import slim_checkpoint


def run(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="checkpoint of a training run")
    parser.add_argument("target", help="file to write; must not exist yet")
    args = parser.parse_args(arguments)
    try:
        size = slim_checkpoint(args.source, args.target)
    except OSError as error:
        sys.exit(f"slim_checkpoint.py: {error}")
    print(f"{args.target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run()
