"""Load weights of a plain ViT into Detectron2's `ViT`, as ViTDet starts from MAE.

What Detectron2's ViT lacks is dropped (class and register tokens, final norm, heads) or folded into
the preceding layer (LayerScale). Relative positions, which plain ViTs lack, start from zero as in
ViTDet. If the patch size differs, the patch embedding is resampled so that a resized patch keeps
its embedding (FlexiViT, arXiv 2212.08013, section 3.4).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from detectron2.modeling import ViT
from timm.layers import resample_patch_embed
from torch import Tensor

from ..files import check_finite, read_weights

__all__ = ["load_plain_weights"]

_KEY = "MODEL.VIT.CHECKPOINT"
#: LayerScale parameters, with timm's names, and the layers whose outputs they scale.
_SCALED = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}
_PATCH = "patch_embed.proj.weight"
_DROPPED = re.compile(r"(cls_token|reg_token|register_tokens|mask_token|norm|fc_norm|head|decoder)")


def _folded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold LayerScale into the layers: gamma * (W x + b) = (gamma W) x + gamma b."""
    out = dict(weights)
    for name in weights:
        for scale, layer in _SCALED.items():
            if name.endswith(scale):
                block, gamma = name.removesuffix(scale), out.pop(name)
                for part, shape in (("weight", (-1, 1)), ("bias", (-1,))):
                    key = f"{block}{layer}.{part}"
                    if key in out:
                        out[key] = out[key] * gamma.view(shape)
    return out


def load_plain_weights(vit: ViT, path: str) -> None:
    """Load all weights of Detectron2's ViT except relative positions.

    Args:
        vit: the model.
        path: a checkpoint with timm's names (MAE, DINOv2 and DINO use the same), or anything that
            iopath opens.

    Raises:
        OSError: if the file does not exist.
        ValueError: if weights do not fit; names the config key, the file and the tensor.
    """
    weights = _folded(read_weights(path, _KEY, ("model", "state_dict", "teacher")))
    weights = {name.removeprefix("backbone."): value for name, value in weights.items()}
    own = {key: value for key, value in vit.state_dict().items() if ".rel_pos_" not in key}
    kernel, size = weights.get(_PATCH), own[_PATCH].shape[2:]
    if kernel is not None and kernel.dim() == 4 and kernel.shape[2:] != size:
        weights[_PATCH] = resample_patch_embed(kernel, list(size), interpolation="bilinear")
    wrong = [f"{key} is not in the file" for key in own if key not in weights]
    wrong += [
        f"{key} is {tuple(weights[key].shape)} in the file and {tuple(value.shape)} in the model"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    wrong += [
        f"{key} is not in the model"
        for key in weights
        if key not in own and not _DROPPED.match(key)
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{_KEY} {path!r} does not fit MODEL.VIT: {wrong[0]}{more}")
    weights = {key: weights[key] for key in own}
    check_finite(weights, f"{_KEY} {path!r}")
    vit.load_state_dict(weights, strict=False)
