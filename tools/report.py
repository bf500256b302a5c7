#!/usr/bin/env python
"""`expedit report`, from a checkout."""

from expedit_d2.cli.report import run

if __name__ == "__main__":
    run()
