"""``sam:FILE``: the image encoder of a checkpoint of segment-anything.

The architecture is inferred from the weights; ``sam:vit_b``, ``vit_l`` and ``vit_h`` name the
official ones for random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from PIL import Image
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from ..files import read_weights
from .features import IMAGENET, Source

_PREFIX = "image_encoder."
_WINDOW = 14
#: Channels, blocks, heads, indices of global blocks.
_VARIANTS = {
    "vit_b": (768, 12, 12, (2, 5, 8, 11)),
    "vit_l": (1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": (1280, 32, 16, (7, 15, 23, 31)),
}


def load(name: str, size: tuple[int, int] | None, random_weights: bool) -> Source:
    if random_weights:
        if name not in _VARIANTS:
            raise ValueError(
                f"with --random-weights, sam: needs one of {sorted(_VARIANTS)}, got {name!r}"
            )
        state, shape = None, _variant(*_VARIANTS[name])
    else:
        state = {
            key.removeprefix(_PREFIX): value
            for key, value in read_weights(name, "--model sam:").items()
            if key.startswith(_PREFIX)
        }
        shape = _shape(state, name)
    side = shape["img_size"]
    if size not in (None, (side, side)):
        raise ValueError(
            f"sam:{name} has positions for {side}x{side} pixels, so --size must be that, got "
            f"{size[0]}x{size[1]}"
        )
    encoder = ImageEncoderViT(
        norm_layer=partial(nn.LayerNorm, eps=1e-6), qkv_bias=True, use_rel_pos=True, **shape
    )
    if state is not None:
        encoder.load_state_dict(state)
    mean, std = IMAGENET
    return Source(
        encoder, _features, (side, side), shape["patch_size"], mean, std, Image.Resampling.BILINEAR
    )


def _variant(
    channels: int, depth: int, heads: int, global_blocks: tuple[int, ...]
) -> dict[str, Any]:
    return {
        "img_size": 1024,
        "patch_size": 16,
        "embed_dim": channels,
        "depth": depth,
        "num_heads": heads,
        "window_size": _WINDOW,
        "global_attn_indexes": global_blocks,
    }


def _shape(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Arguments of the encoder that these weights belong to.

    Raises:
        ValueError: if they are not weights of an image encoder.
    """
    try:
        _, side, _, channels = state["pos_embed"].shape
        patch = state["patch_embed.proj.weight"].shape[-1]
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        # A block has 2 s - 1 relative positions per axis, for a window or a map of side s.
        tables = [state[f"blocks.{index}.attn.rel_pos_h"].shape for index in range(depth)]
        hidden = state["blocks.0.mlp.lin1.weight"].shape[0]
        out = state["neck.0.weight"].shape[0]
    except (KeyError, ValueError):
        raise ValueError(
            f"sam:{name} is not a checkpoint of segment-anything: it has no image encoder of that "
            "library"
        ) from None
    global_blocks = tuple(i for i, (length, _) in enumerate(tables) if length == 2 * side - 1)
    windows = [(length + 1) // 2 for i, (length, _) in enumerate(tables) if i not in global_blocks]
    return {
        "img_size": side * patch,
        "patch_size": patch,
        "embed_dim": channels,
        "depth": depth,
        "num_heads": channels // tables[0][1],
        "mlp_ratio": hidden / channels,
        "out_chans": out,
        "window_size": windows[0] if windows else 0,
        "global_attn_indexes": global_blocks,
    }


def _features(encoder: nn.Module, images: Tensor) -> Tensor:
    return encoder(images)
