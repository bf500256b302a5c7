"""FLOPs of a Segmenter config in a second: on PyTorch's meta device, without weights or arithmetic.

Counts are exact, as they depend on shapes alone.
"""

from __future__ import annotations

from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from expedit_d2.analysis.flops import Flops, count_flops

__all__ = ["count_config_flops"]


def _as_product(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    """The convolution that makes patches, (B, 3, H, W) to (B, C, h, w), as one product.

    It has as many multiply-adds. While torch.jit traces, sizes are tensors, which PyTorch's
    convolution does not take on the meta device (torch 2.14, ``_meta_registrations.meta_conv``);
    its products do.
    """
    for axis, side in enumerate(convolution.kernel_size, start=2):
        images = images.unfold(axis, side, side)
    patches = images.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, h, w, 3 * side * side)
    return (patches @ convolution.weight.flatten(1).t()).permute(0, 3, 1, 2)


def count_config_flops(cfg: CfgNode, size: tuple[int, int] | None = None) -> Flops:
    """Count one forward of a configured model on one image.

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
    with torch.device("meta"):
        model = build_model(cfg)
        patches = model.encoder.patch_embed.proj
        patches.forward = partial(_as_product, patches)
        return count_flops(model, [{"image": torch.empty(3, *size)}])
