"""Command line interface: `expedit train`, `expedit compare`, …; `tools/` has them as scripts."""
