#!/usr/bin/env python
"""`expedit train`, from a checkout."""

from expedit_d2.cli.train import run

if __name__ == "__main__":
    run()
