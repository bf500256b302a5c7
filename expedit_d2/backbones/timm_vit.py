"""``build_timm_vit_backbone``: any plain ViT of timm by its name, configured by ``MODEL.TIMM``.

DINOv2, DINOv3, CLIP, SigLIP, MAE, AugReg, EVA-02 …: the token map after the last block and norm,
with Detectron2's simple feature pyramid on top. State-dict keys are timm's, prefixed by
``net.model.``.
"""

from __future__ import annotations

import difflib
import math
from typing import Any

import timm
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from timm.models import clean_state_dict, eva, vision_transformer
from torch import Tensor, nn

from ..config import add_keys
from ..files import check_finite, read_weights
from ..tracing import shape_of
from .feature_cache import FEATURE_CACHE
from .pyramid import PYRAMID, ViTPyramid

__all__ = ["TimmNet", "TimmViT", "add_timm_config", "build_timm_vit_backbone", "create_timm_vit"]

_TIMM: dict[str, Any] = {
    # A plain ViT of timm: vit_large_patch14_reg4_dinov2, vit_large_patch16_dinov3, …
    "NAME": "vit_base_patch16_224",
    "PRETRAINED": False,  # download the weights of this name from the Hugging Face Hub
    "CHECKPOINT": "",  # a checkpoint to load instead, in timm's or the original authors' format
    "DROP_PATH_RATE": 0.0,
    # Further keyword arguments of timm.create_model; in config files only.
    "KWARGS": CfgNode(new_allowed=True),
    # Image pixels per token side, a power of two. If the patch size differs, images are resized by
    # patch / stride. None: the power of two nearest to the patch size, so 16 for patches of 14, and
    # no resizing for 8, 16 and 32.
    "STRIDE": None,
    "GRAD_CHECKPOINTING": False,
}

#: Families of plain ViTs, and their timm modules, which convert the original authors' checkpoints.
_FAMILIES = {vision_transformer.VisionTransformer: vision_transformer, eva.Eva: eva}
#: Where checkpoints of timm and of the original authors nest the weights, averaged ones first.
_BELOW = ("state_dict_ema", "model_ema", "state_dict", "model", "module")


def add_timm_config(cfg: CfgNode) -> None:
    """Add ``MODEL.TIMM``, the keys of ``build_timm_vit_backbone``."""
    add_keys(cfg, {"MODEL": {"TIMM": {**_TIMM, **PYRAMID}, "BACKBONE": FEATURE_CACHE}})


def create_timm_vit(
    name: str, pretrained: bool = False, checkpoint: str = "", **kwargs: Any
) -> nn.Module:
    """A plain ViT of timm, for images of any size, without the classification head.

    Args:
        name: model name in timm, optionally with a tag of pretrained weights.
        pretrained: load the weights of this name from the Hugging Face Hub or its local cache.
        checkpoint: a file to load instead, or anything that iopath opens, in timm's or the original
            authors' format; it must be complete.
        **kwargs: further arguments of ``timm.create_model``.

    Raises:
        ValueError: if the model does not exist or is not a plain ViT, or if the checkpoint does not
            fit; names the config key.
        OSError: if the checkpoint does not exist, or weights cannot be downloaded.
    """
    if ":" not in name and not timm.is_model(name):  # a colon: hf-hub:NAME or local-dir:FOLDER
        known = [
            n for module in ("vision_transformer", "eva") for n in timm.list_models(module=module)
        ]
        near = difflib.get_close_matches(name, known, cutoff=0.4) or known[:3]
        raise ValueError(
            f"MODEL.TIMM.NAME must be a plain ViT of timm, such as {', '.join(near)}; there is no "
            f"{name!r}"
        )
    weights = _read(checkpoint) if checkpoint else {}
    try:
        model = timm.create_model(
            name,
            pretrained=pretrained and not checkpoint,
            num_classes=0,
            dynamic_img_size=True,
            **kwargs,
        )
        if not isinstance(model, tuple(_FAMILIES)):
            raise TypeError(f"it is a {type(model).__name__}")
    except OSError as error:
        raise OSError(
            f"MODEL.TIMM.PRETRAINED: the weights of {name!r} cannot be downloaded; without a "
            f"network, name a file in MODEL.TIMM.CHECKPOINT: {error}"
        ) from error
    except (TypeError, RuntimeError) as error:  # other families have other arguments
        raise ValueError(
            f"MODEL.TIMM.NAME {name!r} with KWARGS {kwargs} does not make a plain ViT (timm's "
            f"VisionTransformer or Eva): {error}"
        ) from error
    model.prune_intermediate_layers(1)  # keeps all blocks; removes pooling and its norm
    if checkpoint:
        _load(model, weights, checkpoint)
    return model


def _read(path: str) -> dict[str, Tensor]:
    """The weights of a checkpoint, averaged ones if it has both."""
    return clean_state_dict(read_weights(path, "MODEL.TIMM.CHECKPOINT", _BELOW))


def _load(model: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Load all weights of a timm model, or raise an error for what does not fit."""
    wrong = []
    patch = tuple(model.patch_embed.proj.weight.shape[2:])
    for key, value in weights.items():
        # timm would silently resample the kernel.
        if key.endswith("patch_embed.proj.weight") and tuple(value.shape[2:]) not in ((), patch):
            wrong.append(
                f"patches are {tuple(value.shape[2:])} in the file and {patch} in the model"
            )
    (module,) = (m for family, m in _FAMILIES.items() if isinstance(model, family))
    weights = module.checkpoint_filter_fn(weights, model)
    own = model.state_dict()
    wrong += [f"{key} is not in the file" for key in own if key not in weights]
    wrong += [
        f"{key} is {tuple(weights[key].shape)} in the file and {tuple(own[key].shape)} in the model"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    # Other unused weights belong to pooling, the head, or pretraining.
    wrong += [
        f"{key} is not in the model"
        for key in weights
        if key.startswith("blocks.") and key not in own
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"MODEL.TIMM.CHECKPOINT {path!r} does not fit MODEL.TIMM.NAME: {wrong[0]}{more}"
        )
    check_finite({key: weights[key] for key in own}, f"MODEL.TIMM.CHECKPOINT {path!r}")
    model.load_state_dict(weights, strict=False)


class TimmNet(Backbone):
    """A plain ViT of timm as a Detectron2 backbone with one output, the token map.

    The map is the output of timm's `forward_features`: after the last block, and after the final
    norm unless the model applies it after pooling.

    One token stands for ``stride`` x ``stride`` pixels. Images are zero-padded at the bottom and
    right to whole tokens. If the patch size differs from the stride they are then resized, so that
    each patch covers the pixels of its token: with patches of 14 and stride 16, an image of 1024
    pixels is resized to 896, for 64 tokens. Weights are never resampled.
    """

    def __init__(
        self, model: nn.Module, stride: int | None = None, grad_checkpointing: bool = False
    ) -> None:
        """
        Args:
            model: from `create_timm_vit`.
            stride: image pixels per token side, a power of two, which Detectron2's pyramid needs;
                None: the nearest to the patch size, such as 16 for 14.
            grad_checkpointing: gradient checkpointing.

        Raises:
            ValueError: if the stride is not a power of two.
        """
        super().__init__()
        self.model = model
        self.patch = model.patch_embed.feat_ratio()
        if stride is None:
            stride = 2 ** round(math.log2(self.patch))
        if type(stride) is not int or stride < 1 or stride & (stride - 1):
            raise ValueError(
                f"MODEL.TIMM.STRIDE must be a power of two or None (the nearest to the patch size "
                f"{self.patch}), got {stride!r}"
            )
        self.stride = stride
        model.set_grad_checkpointing(grad_checkpointing)
        # The block whose output `forward` uses, for the adapter.
        model.expedit_outputs = (len(model.blocks) - 1,)
        self._out_features = ["last_feat"]
        self._out_feature_channels = {"last_feat": model.num_features}
        self._out_feature_strides = {"last_feat": stride}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W), any size, to {"last_feat": (B, C, H / stride, W / stride)}."""
        height, width = shape_of(x)[2:]
        x = F.pad(x, (0, -width % self.stride, 0, -height % self.stride))
        size = tuple(side // self.stride for side in shape_of(x)[2:])
        if self.patch != self.stride:
            x = F.interpolate(x, [side * self.patch for side in size], mode="bilinear")
        tokens = self.model.forward_features(x)[:, self.model.num_prefix_tokens :]
        return {"last_feat": tokens.transpose(1, 2).unflatten(2, size)}


class TimmViT(ViTPyramid):
    """A plain ViT of timm and the simple feature pyramid."""

    node = "MODEL.TIMM"

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        node = cfg.MODEL.TIMM
        model = create_timm_vit(
            node.NAME,
            node.PRETRAINED,
            node.CHECKPOINT,
            in_chans=input_shape.channels,
            drop_path_rate=node.DROP_PATH_RATE,
            **node.KWARGS,
        )
        net = TimmNet(model, node.STRIDE, node.GRAD_CHECKPOINTING)
        return {"net": net, **cls.pyramid_args(cfg, node)}


@BACKBONE_REGISTRY.register()
def build_timm_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmViT:
    """`TimmViT` configured by ``MODEL.TIMM``, expedited by ``MODEL.EXPEDIT``.

    Raises:
        ValueError: from `create_timm_vit`, `TimmNet`, `ViTPyramid` or `expedit_d2.expedite`.
    """
    return TimmViT(cfg, input_shape)


build_timm_vit_backbone.node = TimmViT.node
