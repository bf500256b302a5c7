"""FLOPs of a Segmenter config, counted in a second on PyTorch's meta device, without weights.

Counts are exact, as they depend only on shapes.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from expedit_d2.analysis.flops import Flops, count_flops
from expedit_d2.analysis.meta import traceable

__all__ = ["count_config_flops"]


def count_config_flops(cfg: CfgNode, size: tuple[int, int] | None = None) -> Flops:
    """Count the FLOPs of a configured model for one image.

    Args:
        cfg: a config with ``MODEL.META_ARCHITECTURE`` Segmenter.
        size: (height, width) of the image in pixels; None: one window.

    Raises:
        ValueError: if there is neither a size nor a window.
    """
    if size is None:
        side = cfg.MODEL.SEGMENTER.WINDOW_SIZE
        if not side:
            raise ValueError("MODEL.SEGMENTER.WINDOW_SIZE is 0; give the size of the image")
        size = (side, side)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.CHECKPOINT = False, ""
    with torch.device("meta"), traceable():
        model = build_model(cfg)
        return count_flops(model, [{"image": torch.empty(3, *size)}])
