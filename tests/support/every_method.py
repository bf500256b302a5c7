"""Every kind of transformer with every method, for tests of what holds for all of them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from expedit_d2.methods import METHOD_REGISTRY
from support.vits import detectron2_vit, swin, timm_eva, timm_vit

SIZE = (6, 8)  # tokens of the images
MODELS = {
    "timm_vit": partial(timm_vit, SIZE, depth=2, dynamic_img_size=True),
    "timm_eva": partial(timm_eva, SIZE, depth=2, use_rot_pos_emb=True, dynamic_img_size=True),
    "detectron2_vit": partial(
        detectron2_vit, img_size=32, depth=2, window_size=4, window_block_indexes=(0,)
    ),
    "swin": partial(swin, depths=(2,), num_heads=(2,), out_features=["res2"]),
}
#: ToMe needs a block that it can work inside of.
PAIRS = [
    (kind, method)
    for kind in MODELS
    for method in METHOD_REGISTRY
    if method != "tome" or kind == "timm_vit"
]


def settings_for(kind: str, method: str) -> dict:
    # Inside the last block ToMe merges after the attention: the class token, the output of timm's
    # model, would not notice.
    settings = {"alpha": 0 if METHOD_REGISTRY[method].inside else 1, "method": method}
    if "iterations" in METHOD_REGISTRY[method].reads:
        settings["iterations"] = 2
    if METHOD_REGISTRY[method].unstructured:
        return settings | {"keep": 0.6}
    if kind == "swin":
        return settings | {"grid": (2, 3), "scope": "window"}
    return settings | {"grid": (4, 5)}


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """All outputs of a model in one vector."""
    out = model(x)
    if isinstance(out, dict):
        out = tuple(out.values())
    return torch.cat([t.flatten() for t in out])
