"""Vision transformers of other libraries by name, as models that output feature maps.

``hf:facebook/dinov2-base``, ``timm:vit_base_patch14_dinov2.lvd142m``, ``torchvision:vit_b_16``,
``sam:sam_vit_b_01ec64.pth``: each library has a module here, imported when first used.
"""

from __future__ import annotations

from importlib import import_module

from .features import FeatureModel, Source

__all__ = ["LIBRARIES", "FeatureModel", "load_feature_model"]

#: Prefix -> module, package to install, and what follows the prefix.
LIBRARIES = {
    "hf": ("from_transformers", "transformers", "a name on the Hugging Face Hub, or a folder"),
    "timm": ("from_timm", "timm", "a name that timm knows"),
    "torchvision": ("from_torchvision", "torchvision", "a model, or one of its weights"),
    "sam": ("from_segment_anything", "segment-anything", "a checkpoint file"),
}


def load_feature_model(
    source: str, size: tuple[int, int] | None = None, random_weights: bool = False
) -> FeatureModel:
    """Load a model by its library and name, in evaluation mode, on the CPU.

    Args:
        source: prefix and name, see `LIBRARIES`.
        size: (height, width) of the input images in pixels; None: the model's default.
        random_weights: initialise randomly instead of loading trained weights.

    Raises:
        ValueError: for a malformed source, an unknown model, or a size that does not fit it.
        OSError: if files are missing or cannot be downloaded.
        ImportError: if the library is not installed.
    """
    library, colon, name = source.partition(":")
    if not colon or not name or library not in LIBRARIES:
        forms = ", ".join(f"{prefix}: and {what}" for prefix, (_, _, what) in LIBRARIES.items())
        raise ValueError(f"--model is one of {forms}; got {source!r}")
    module, package, _ = LIBRARIES[library]
    try:
        load = import_module(f".{module}", __package__).load
    except ModuleNotFoundError as error:
        raise ImportError(f"{source}: install {package} with pip ({error})") from None
    loaded: Source = load(name, size, random_weights)
    size = size or loaded.size
    if any(side % loaded.patch for side in size):
        raise ValueError(
            f"--size must be a multiple of the patch size of {source}, {loaded.patch} pixels, got "
            f"{size[0]}x{size[1]}"
        )
    return FeatureModel(loaded, size).eval()
