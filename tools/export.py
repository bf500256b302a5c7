#!/usr/bin/env python
"""`expedit export`, from a checkout."""

from expedit_d2.cli.export import run

if __name__ == "__main__":
    run()
