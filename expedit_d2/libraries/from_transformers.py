"""``hf:NAME``: the ``AutoModel`` of a name on the Hub or of a local folder.

Images are preprocessed as its image processor is configured.
"""

from __future__ import annotations

import inspect
import logging
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .features import IMAGENET, Source, drop_prefix

logger = logging.getLogger(__name__)


def load(name: str, size: tuple[int, int] | None, random_weights: bool) -> Source:
    try:
        config = AutoConfig.from_pretrained(name)
        make = AutoModel.from_config if random_weights else AutoModel.from_pretrained
        model = make(config if random_weights else name)
    except (OSError, ValueError, ImportError) as error:
        why = str(error).strip().partition("\n")[0]
        raise OSError(
            f"hf:{name} cannot be loaded ({why}); give the name of a model on the Hub, if that can "
            "be reached, or a folder written by save_pretrained"
        ) from None
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int):
        raise ValueError(f"hf:{name}, a {type(model).__name__}, is not a supported ViT")
    processor = _processor(name)
    return Source(
        model=model,
        features=partial(_features, patch=patch),
        size=_size(processor) or _pair(config.image_size),
        patch=patch,
        mean=tuple(getattr(processor, "image_mean", None) or IMAGENET[0]),
        std=tuple(getattr(processor, "image_std", None) or IMAGENET[1]),
        resampling=Image.Resampling(getattr(processor, "resample", None) or Image.BICUBIC),
    )


def _processor(name: str) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError):
        logger.warning("hf:%s has no image processor: using ImageNet's mean and std", name)
        return None


def _size(processor: Any) -> tuple[int, int] | None:
    """(height, width) that a processor resizes to; None if that depends on the image."""
    for attribute in ("crop_size", "size"):
        value = getattr(processor, attribute, None) or {}
        if "height" in value:
            return value["height"], value["width"]
    return None


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _features(model: nn.Module, images: Tensor, patch: int) -> Tensor:
    # Some models interpolate positions only if this argument is set; the others always do.
    has_argument = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    options = {"interpolate_pos_encoding": True} if has_argument else {}
    tokens = model(pixel_values=images, **options).last_hidden_state
    return tokens if tokens.dim() == 4 else drop_prefix(tokens, images, patch)
