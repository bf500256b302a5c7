#!/usr/bin/env python
"""`expedit tune`, from a checkout."""

from expedit_d2.cli.tune import run

if __name__ == "__main__":
    run()
