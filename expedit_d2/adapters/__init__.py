"""One small file a family of transformers: how its blocks and its tokens look to the hook.

An adapter module has ``matches(module) -> bool`` and ``adapt(module) -> Host``. Families are told
by the class's name and module, so that none of their packages has to be installed.
"""

from __future__ import annotations

from torch import nn

from . import (
    detectron2_vit,
    segment_anything,
    swin,
    timm_eva,
    timm_vit,
    torchvision_vit,
    transformers_vit,
)
from .host import Host

__all__ = ["Host", "find_host"]

FAMILIES = (
    detectron2_vit,
    segment_anything,
    swin,
    timm_vit,
    timm_eva,
    torchvision_vit,
    transformers_vit,
)


def find_host(model: nn.Module) -> Host:
    """The one supported transformer that ``model`` is or contains.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = [
        (name, module, family)
        for name, module in model.named_modules()
        for family in FAMILIES
        if family.matches(module)
    ]
    if not found:
        supported = ", ".join(family.FAMILY for family in FAMILIES)
        raise ValueError(
            f"no supported transformer in {type(model).__name__}; supported: {supported}"
        )
    if len(found) > 1:
        names = ", ".join(name or type(module).__name__ for name, module, _ in found)
        raise ValueError(f"several transformers in the model, pass one of them: {names}")
    _, module, family = found[0]
    return family.adapt(module)
