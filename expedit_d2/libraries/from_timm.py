"""``timm:NAME``: any supported ViT of timm, with the preprocessing of its data config.

``timm:NAME@FILE`` loads the weights from a file, or anything iopath opens, instead of the Hub.
"""

from __future__ import annotations

from functools import partial

import timm
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..backbones.timm_vit import create_timm_vit
from ..engine.errors import close_to
from .features import Source, drop_prefix


def load(name: str, size: tuple[int, int] | None, random_weights: bool) -> Source:
    name, _, file = name.partition("@")
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"timm has no model {name!r}{close_to(name, timm.list_models())}")
    if file:
        return _source(create_timm_vit(name, checkpoint=file), name)
    options = {} if size is None else {"img_size": size}
    try:
        model = timm.create_model(name, pretrained=not random_weights, num_classes=0, **options)
    except TypeError:
        raise ValueError(f"timm:{name} is not a supported ViT: it has no img_size") from None
    except Exception as error:  # the Hub and the network raise many kinds
        if random_weights:
            raise
        why = str(error).strip().partition("\n")[0]
        raise OSError(
            f"timm:{name}: its weights cannot be loaded ({why}); --random-weights needs none"
        ) from None
    return _source(model, name)


def _source(model: nn.Module, name: str) -> Source:
    config = resolve_model_data_config(model)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None or not hasattr(model, "forward_features"):
        raise ValueError(f"timm:{name} is not a supported ViT: it has no patch embedding")
    return Source(
        model=model,
        features=partial(_features, patch=patch[0]),
        size=tuple(config["input_size"][1:]),
        patch=patch[0],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resampling=Image.Resampling[config["interpolation"].upper()],
    )


def _features(model: nn.Module, images: Tensor, patch: int) -> Tensor:
    return drop_prefix(model.forward_features(images), images, patch)
