"""One small file per family of transformers: what its blocks and tokens look like to the hook.

An adapter has ``matches(module) -> bool`` and ``adapt(module) -> TransformerSpec``; see `Adapter`.
Families are recognised by the name and module of their class, so that none of their packages has to
be installed. Adapters in other packages register with `ADAPTER_REGISTRY`.
"""

from __future__ import annotations

import warnings
from typing import Any

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
from .registry import ADAPTER_REGISTRY, Adapter
from .spec import TransformerSpec

__all__ = ["ADAPTER_REGISTRY", "Adapter", "TransformerSpec", "find_transformer"]

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

#: Old names, deprecated.
_RENAMED = {"Host": "TransformerSpec", "find_host": "find_transformer"}


def find_transformer(model: nn.Module) -> TransformerSpec:
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


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
