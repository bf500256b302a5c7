"""Weights for the configs that have none."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.modeling import build_model

from expedit_d2.data import register_collage
from expedit_d2.projects import load_cfg


def write_random_weights(config_file: str, path: Path) -> Path:
    """The same ones each time; returns ``path``."""
    register_collage()  # whose classes some models want to know
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = build_model(load_cfg(config_file)).state_dict()
    torch.save({"model": state}, path)
    return path
