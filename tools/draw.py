#!/usr/bin/env python
"""`expedit draw`, from a checkout."""

from expedit_d2.cli.draw import run

if __name__ == "__main__":
    run()
