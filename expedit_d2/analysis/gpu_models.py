"""Backbones to time on a GPU, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from torch import Tensor, nn

__all__ = ["MODELS", "SMALL_MODELS", "BenchmarkModel"]


@dataclass(frozen=True)
class BenchmarkModel:
    """A backbone and the size of its images.

    Attributes:
        build: constructor.
        size: side of the square images in pixels.
        depth: number of blocks; the output of the last one is used.
        needs: package that it requires.
    """

    build: Callable[[], nn.Module]
    size: int
    depth: int
    needs: str = "timm"

    @property
    def available(self) -> bool:
        return find_spec(self.needs) is not None


class _Features(nn.Module):
    """A timm transformer without its head."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        return self.vit.forward_features(x)


def _timm(name: str, **kwargs: object) -> nn.Module:
    import timm

    return _Features(timm.create_model(name, pretrained=False, num_classes=0, **kwargs))


def _vitdet(
    dim: int, heads: int, global_blocks: tuple[int, ...], size: int, depth: int, window: int
) -> nn.Module:
    """ViTDet's ViT."""
    from detectron2.modeling import ViT

    return ViT(
        img_size=size,
        patch_size=16,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        window_size=window,
        window_block_indexes=[index for index in range(depth) if index not in global_blocks],
        use_rel_pos=True,
    )


def _of_timm(name: str, size: int, depth: int, **kwargs: object) -> BenchmarkModel:
    return BenchmarkModel(partial(_timm, name, img_size=size, depth=depth, **kwargs), size, depth)


def _of_vitdet(
    dim: int, heads: int, global_blocks: tuple[int, ...], size: int, depth: int, window: int = 14
) -> BenchmarkModel:
    build = partial(_vitdet, dim, heads, global_blocks, size, depth, window)
    return BenchmarkModel(build, size, depth, "detectron2")


#: In order of importance.
MODELS = {
    "Segmenter ViT-L/16, 640": _of_timm("vit_large_patch16_384", 640, 24),
    "ViTDet-L, 1024": _of_vitdet(1024, 16, (5, 11, 17, 23), 1024, 24),
    "DINOv2-S/14, 518": _of_timm("vit_small_patch14_dinov2", 518, 12),
    "ViTDet-B, 1024": _of_vitdet(768, 12, (2, 5, 8, 11), 1024, 12),
    "DINOv2-L/14, 518": _of_timm("vit_large_patch14_dinov2", 518, 24),
}

_TINY = {"embed_dim": 64, "num_heads": 2}

#: One of each family, for CPUs and for comparing devices.
SMALL_MODELS = {
    "Segmenter, small": _of_timm("vit_large_patch16_384", 160, 4, **_TINY),
    "ViTDet, small": _of_vitdet(64, 2, (1, 3), 160, 4, window=5),
    "DINOv2, small": _of_timm("vit_small_patch14_dinov2", 140, 4, **_TINY),
}
