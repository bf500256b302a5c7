"""One small file a family of transformers: how its blocks and its tokens look to the hook.

An adapter has ``matches(module) -> bool`` and ``adapt(module) -> Host``; see `Adapter`. Families
are told by the class's name and module, so that none of their packages has to be installed. Those
of other packages are added to `ADAPTER_REGISTRY`.
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
    transformers_beit,
    transformers_sam,
    transformers_swin,
    transformers_vit,
)
from .host import Host
from .registry import ADAPTER_REGISTRY, Adapter

__all__ = ["ADAPTER_REGISTRY", "Adapter", "Host", "find_host"]

FAMILIES = (
    detectron2_vit,
    segment_anything,
    swin,
    timm_vit,
    timm_eva,
    torchvision_vit,
    transformers_beit,
    transformers_sam,
    transformers_swin,
    transformers_vit,
)
for _family in FAMILIES:
    ADAPTER_REGISTRY.register(_family)


def find_host(model: nn.Module) -> Host:
    """The one supported transformer that ``model`` is or contains.

    Raises:
        ValueError: if there is none, or more than one.
    """
    families = [*ADAPTER_REGISTRY.values()][::-1]
    found = []
    for name, module in model.named_modules():
        family = next((family for family in families if family.matches(module)), None)
        if family is not None:
            found.append((name, module, family))
    if not found:
        supported = ", ".join(family.FAMILY for family in families[::-1])
        raise ValueError(
            f"no supported transformer in {type(model).__name__}; supported: {supported}"
            f"{ADAPTER_REGISTRY.problems}"
        )
    if len(found) > 1:
        names = ", ".join(name or type(module).__name__ for name, module, _ in found)
        raise ValueError(f"several transformers in the model, pass one of them: {names}")
    _, module, family = found[0]
    return family.adapt(module)
