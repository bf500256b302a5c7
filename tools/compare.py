#!/usr/bin/env python
"""`expedit compare`, from a checkout."""

from expedit_d2.cli.compare import run

if __name__ == "__main__":
    run()
