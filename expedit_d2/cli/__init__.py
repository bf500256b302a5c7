"""Command lines: `expedit train`, `expedit compare` and so on; `tools/` has them as scripts."""
