"""DPT as a Detectron2 model: depth from one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from expedit_d2.api import expedite_from_node
from expedit_d2.backbones.feature_cache import cache_features
from expedit_d2.backbones.timm_vit import create_timm_vit
from expedit_d2.data.normalized import NormalizingModel
from expedit_d2.tracing import shape_of

from .encoder import Encoder
from .head import DPTHead
from .losses import gradient_loss, normalized, silog_loss, trimmed_loss
from .resize import SIZE_METHODS, network_size

__all__ = ["INTERPOLATIONS", "OUTPUTS", "DPT"]

OUTPUTS = ("inverse", "metric")
#: Interpolation of depth to the size of the image: mode -> align_corners, as in the official code.
INTERPOLATIONS = {"bicubic": False, "bilinear": True}


@META_ARCH_REGISTRY.register()
class DPT(NormalizingModel):
    """Vision Transformers for Dense Prediction (Ranftl et al., arXiv 2103.13413): depth.

    With a DINOv2 encoder it is Depth Anything V2 (arXiv 2406.09414).
    """

    #: Config node of the ViT.
    node = "MODEL.TIMM"

    @configurable
    def __init__(
        self,
        *,
        backbone: Encoder,
        head: DPTHead,
        output: str,
        scale: float,
        shift: float,
        invert: bool,
        size: Sequence[int] | None,
        size_method: str,
        size_divisibility: int,
        interpolation: str,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        silog_variance: float = 0.5,
        gradient_weight: float = 0.5,
        freeze_backbone: bool = False,
        feature_cache: str = "",
    ) -> None:
        """
        Args:
            backbone, head: the parts.
            output: what the model predicts: "metric", depth in metres, or "inverse", inverse depth
                up to a scale and a shift, larger where it is nearer.
            scale, shift, invert: the head's output y becomes scale * y + shift, or with invert
                1 / (scale * y + shift).
            size: (H, W) to resize images to in inference, keeping the aspect ratio; None: no
                resizing, as in training.
            size_method: see `network_size`.
            size_divisibility: pixels; a multiple of the encoder's stride.
            interpolation: of the prediction to the output size.
            pixel_mean, pixel_std: of each channel.
            silog_variance: see `silog_loss`, for "metric".
            gradient_weight: of `gradient_loss`, for "inverse".
            freeze_backbone: train only the head.
            feature_cache: folder of the frozen encoder's outputs, see `cache_features`.

        Raises:
            ValueError: for an unknown name or invalid size, or from `cache_features`.
        """
        super().__init__(pixel_mean, pixel_std)
        for key, value, known in (
            ("OUTPUT", output, OUTPUTS),
            ("SIZE_METHOD", size_method, SIZE_METHODS),
            ("INTERPOLATION", interpolation, tuple(INTERPOLATIONS)),
        ):
            if value not in known:
                raise ValueError(f"MODEL.DPT.{key} must be one of {known}, got {value!r}")
        if size_divisibility < 1 or size_divisibility % backbone.stride:
            raise ValueError(
                f"MODEL.DPT.SIZE_DIVISIBILITY must be a multiple of {backbone.stride}, the pixels "
                f"of a token, got {size_divisibility}"
            )
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"MODEL.DPT.SIZE must be (height, width) or None, got {size}")
        self.backbone = backbone
        self.head = head
        self.output = output
        self.scale, self.shift, self.invert = scale, shift, invert
        self.size = None if size is None else tuple(size)
        self.size_method = size_method
        self.size_divisibility = size_divisibility
        self.interpolation = interpolation
        self.silog_variance = silog_variance
        self.gradient_weight = gradient_weight
        backbone.requires_grad_(not freeze_backbone)
        cache_features(feature_cache, backbone)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        timm, node = cfg.MODEL.TIMM, cfg.MODEL.DPT
        vit = create_timm_vit(
            timm.NAME,
            timm.PRETRAINED,
            timm.CHECKPOINT,
            drop_path_rate=timm.DROP_PATH_RATE,
            **timm.KWARGS,
        )
        backbone = Encoder(vit, node.BLOCKS, node.NORM, node.POSITIONS)
        if "EXPEDIT" in cfg.MODEL:
            expedite_from_node(vit, cfg.MODEL.EXPEDIT)
        head = DPTHead(
            vit.embed_dim,
            node.CHANNELS,
            node.FEATURES,
            node.READOUT,
            node.ACTIVATION,
            backbone.stages,
        )
        return {
            "backbone": backbone,
            "head": head,
            "output": node.OUTPUT,
            "scale": node.SCALE,
            "shift": node.SHIFT,
            "invert": node.INVERT,
            "size": node.SIZE,
            "size_method": node.SIZE_METHOD,
            "size_divisibility": node.SIZE_DIVISIBILITY,
            "interpolation": node.INTERPOLATION,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "silog_variance": node.SILOG_VARIANCE,
            "gradient_weight": node.GRADIENT_WEIGHT,
            "freeze_backbone": timm.FREEZE,
            "feature_cache": cfg.MODEL.BACKBONE.FEATURE_CACHE,
        }

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: for each image ``image`` (3, H, W), any sizes; in training ``depth``
                (H, W), metres, 0 where there is none; in inference optionally ``height`` and
                ``width`` of the output, by default those of the image.

        Returns:
            In training a dict of losses. In inference for each image {"depth": (height, width)}.
        """
        images = [self._prepare(x["image"]) for x in batched_inputs]
        # Attention sees the whole image: padding would change it, so only equal sizes are batched.
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(shape_of(image), []).append(index)
        depths: list[Tensor | None] = [None] * len(images)
        for indices in groups.values():
            predicted = self.predict(torch.stack([images[index] for index in indices]))
            for index, depth in zip(indices, predicted, strict=True):
                depths[index] = depth
        if self.training:
            return self._losses(depths, [x["depth"].to(self.device) for x in batched_inputs])
        results = []
        for depth, x in zip(depths, batched_inputs, strict=True):
            height, width = shape_of(x["image"])[1:]
            size = (x.get("height", height), x.get("width", width))
            results.append({"depth": self._to_size(depth, size)})
        return results

    def predict(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W), of a `network_size`, to depth (B, H, W) in fp32."""
        y = self.head(self.backbone(images), shape_of(images)[2:]).float()
        y = self.scale * y + self.shift
        return y.clamp_min(1e-8).reciprocal() if self.invert else y

    def _prepare(self, image: Tensor) -> Tensor:
        """(3, H, W) of 0 to 255, any type, to the network's size, normalised."""
        image = self.normalize(image.to(self.device).float())
        own = shape_of(image)[1:]
        target = None if self.training else self.size
        size = network_size(own, target, self.size_divisibility, self.size_method)
        if size == own:
            return image
        return F.interpolate(image[None], size, mode="bicubic", align_corners=False)[0]

    def _to_size(self, depth: Tensor, size: tuple[int, int]) -> Tensor:
        """(h, w) to (*size)."""
        if shape_of(depth) == tuple(size):
            return depth
        mode, corners = self.interpolation, INTERPOLATIONS[self.interpolation]
        return F.interpolate(depth[None, None], size, mode=mode, align_corners=corners)[0, 0]

    def _losses(self, depths: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """Losses of predictions (h, w) and depths (H, W) in metres, averaged over the images."""
        with torch.autocast(self.device.type, enabled=False):
            pairs = [
                self._loss(self._to_size(depth, shape_of(target)), target)
                for depth, target in zip(depths, targets, strict=True)
            ]
        return {name: torch.stack([pair[name] for pair in pairs]).mean() for name in pairs[0]}

    def _loss(self, depth: Tensor, target: Tensor) -> dict[str, Tensor]:
        valid = target > 0
        if self.output == "metric":
            return {"loss_silog": silog_loss(depth, target, valid, self.silog_variance)}
        if not valid.any():
            return {"loss_depth": depth.sum() * 0.0, "loss_gradient": depth.sum() * 0.0}
        inverse = torch.where(valid, target, 1.0).reciprocal()
        residual = normalized(depth, valid) - normalized(inverse, valid)
        return {
            "loss_depth": trimmed_loss(residual, valid),
            "loss_gradient": self.gradient_weight * gradient_loss(residual, valid),
        }
