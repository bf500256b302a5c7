"""``torchvision:vit_l_16``, or weights, ``torchvision:ViT_L_16_Weights.IMAGENET1K_SWAG_E2E_V1``.

Images are preprocessed by the transforms of the weights.
"""

from __future__ import annotations

from functools import partial

from PIL import Image
from torch import Tensor
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from ..engine.errors import close_to
from .features import Source, drop_prefix


def load(name: str, size: tuple[int, int] | None, random_weights: bool) -> Source:
    names = [known for known in models.list_models() if known.startswith("vit_")]
    builder = name.partition("_Weights.")[0].lower()
    if builder not in names:
        raise ValueError(f"torchvision has no ViT {name!r}{close_to(name, names)}; it has {names}")
    try:
        weights = models.get_weight(name) if "." in name else models.get_model_weights(name).DEFAULT
    except (ValueError, KeyError) as error:
        raise ValueError(f"torchvision:{name}: {error}") from None
    preset = weights.transforms()
    if size is not None and size[0] != size[1]:
        raise ValueError(
            f"torchvision's ViT takes only square images, got --size {size[0]}x{size[1]}"
        )
    side = preset.crop_size[0] if size is None else size[0]
    model = models.get_model(builder, weights=None, image_size=side)
    if not random_weights:
        try:
            state = weights.get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise OSError(
                f"torchvision:{name}: its weights cannot be downloaded ({error}); "
                "--random-weights needs none"
            ) from None
        model.load_state_dict(interpolate_embeddings(side, model.patch_size, state))
    return Source(
        model=model,
        features=partial(_features, patch=model.patch_size),
        size=(side, side),
        patch=model.patch_size,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        resampling=Image.Resampling[preset.interpolation.name],
    )


def _features(model: VisionTransformer, images: Tensor, patch: int) -> Tensor:
    # No method returns the tokens, so a hook on the encoder reads them.
    outputs: list[Tensor] = []
    with model.encoder.register_forward_hook(lambda *args: outputs.append(args[-1])):
        model(images)
    return drop_prefix(outputs[0], images, patch)
