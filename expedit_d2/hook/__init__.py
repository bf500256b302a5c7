"""Runs a model's blocks: reduces the tokens after alpha blocks and rebuilds the map at the end.

`ExpeditedBlocks` replaces a model's block container. The model loops over it as before. Each loop
is a pass with its own callables, which share its state, so calls may overlap and nothing is stored
between them. The model, its blocks and its state-dict keys are untouched.
"""

from .blocks import ExpeditedBlocks, Rebuild, run_reduced, sized_blocks

__all__ = ["ExpeditedBlocks", "Rebuild", "run_reduced", "sized_blocks"]
