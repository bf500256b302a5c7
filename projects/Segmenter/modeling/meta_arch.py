"""``Segmenter``: a plain ViT, a decoder on its tokens, and sliding windows around both.

Shorthand: B images of 3 x H x W pixels, h x w tokens of C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from expedit_d2.api import expedite_from_node
from expedit_d2.backbones.feature_cache import cache_features
from expedit_d2.backbones.timm_vit import create_timm_vit
from expedit_d2.compat import positioned
from expedit_d2.data.normalized import NormalizingModel
from expedit_d2.hook import Rebuild, run_reduced
from expedit_d2.tracing import shape_of

from .decoder import DECODERS
from .inference import sliding_window

__all__ = ["Segmenter"]


@META_ARCH_REGISTRY.register()
class Segmenter(NormalizingModel):
    """Semantic segmentation by transformers (arXiv 2105.05633).

    With ``MODEL.EXPEDIT.RECONSTRUCT_AT`` "head", the decoder runs on clusters and its class scores
    are reconstructed, as published for this model; with "backbone", the tokens are, before it.
    """

    #: Config node of the ViT.
    node = "MODEL.TIMM"

    @configurable
    def __init__(
        self,
        *,
        encoder: nn.Module,
        decoder: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        ignore_value: int = 255,
        window_size: int = 512,
        window_stride: int = 512,
        window_batch: int = 4,
        freeze_encoder: bool = False,
        feature_cache: str = "",
        expedit: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            encoder: a plain ViT of timm that takes images of any size.
            decoder: tokens (B, N, C) to class scores (B, N, K).
            pixel_mean, pixel_std: of each channel.
            ignore_value: label of pixels without a class.
            window_size, window_stride, window_batch: see `sliding_window`.
            freeze_encoder: train only the decoder.
            feature_cache: folder of the frozen encoder's outputs, see `cache_features`.
            expedit: a ``MODEL.EXPEDIT`` node.

        Raises:
            ValueError: for invalid windows, or from `cache_features` or `expedit_d2.expedite`.
        """
        super().__init__(pixel_mean, pixel_std)
        if window_size < 0 or window_size and not 0 < window_stride <= window_size:
            raise ValueError(
                "MODEL.SEGMENTER.WINDOW_SIZE must be positive, or 0 for whole images, and "
                f"WINDOW_STRIDE 1 to WINDOW_SIZE, got {window_size} and {window_stride}"
            )
        if window_batch < 1:
            raise ValueError(f"MODEL.SEGMENTER.WINDOW_BATCH must be 1 or more, got {window_batch}")
        self.encoder = encoder
        self.decoder = decoder
        self.patch = encoder.patch_embed.feat_ratio()
        self.ignore_value = ignore_value
        self.window_size = window_size
        self.window_stride = window_stride
        self.window_batch = window_batch
        self.freeze_encoder = freeze_encoder
        # The block whose output is used, for Expedit's adapter.
        encoder.expedit_outputs = (len(encoder.blocks) - 1,)
        if freeze_encoder:
            encoder.requires_grad_(False)
        cache_features(feature_cache, encoder, "forward_features")
        if expedit is not None:
            expedite_from_node(encoder, expedit)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        timm, node = cfg.MODEL.TIMM, cfg.MODEL.SEGMENTER
        if node.DECODER not in DECODERS:
            raise ValueError(
                f"MODEL.SEGMENTER.DECODER must be one of {sorted(DECODERS)}, got {node.DECODER!r}"
            )
        kwargs = dict(timm.KWARGS)
        if node.NORM_EPS is not None:
            kwargs["norm_layer"] = partial(nn.LayerNorm, eps=node.NORM_EPS)
        encoder = create_timm_vit(
            timm.NAME,
            timm.PRETRAINED,
            timm.CHECKPOINT,
            drop_path_rate=timm.DROP_PATH_RATE,
            **kwargs,
        )
        encoder.set_grad_checkpointing(timm.GRAD_CHECKPOINTING)
        decoder = DECODERS[node.DECODER](
            num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            dim=encoder.embed_dim,
            num_heads=encoder.blocks[0].attn.num_heads,
            layers=node.DECODER_LAYERS,
            dropout=node.DECODER_DROPOUT,
            width=node.DECODER_DIM,
            scale=node.SCORE_SCALE,
        )
        return {
            "encoder": encoder,
            "decoder": decoder,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "window_size": node.WINDOW_SIZE,
            "window_stride": node.WINDOW_STRIDE,
            "window_batch": node.WINDOW_BATCH,
            "freeze_encoder": timm.FREEZE,
            "feature_cache": cfg.MODEL.BACKBONE.FEATURE_CACHE,
            "expedit": cfg.MODEL.EXPEDIT,
        }

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()  # no stochastic depth
        return self

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: for each image ``image`` (3, H, W); in training ``sem_seg`` (H, W)
                long; in inference optionally ``height`` and ``width`` of the output, by default
                those of the image.

        Returns:
            In training a dict of the loss. In inference for each image a dict with ``sem_seg``
            (K, height, width), fp32 class scores before softmax.
        """
        images = [self.normalize(x["image"]) for x in batched_inputs]
        if self.training:
            batch = ImageList.from_tensors(images).tensor
            targets = [x["sem_seg"].to(self.device) for x in batched_inputs]
            return self.losses(
                self.predict(batch),
                ImageList.from_tensors(targets, pad_value=self.ignore_value).tensor,
            )

        scores = sliding_window(
            self.predict, images, self.window_size, self.window_stride, self.window_batch
        )
        results = []
        for x, image, score in zip(batched_inputs, images, scores, strict=True):
            height, width = shape_of(image)[1:]
            size = x.get("height", height), x.get("width", width)
            score = F.interpolate(score[None], size, mode="bilinear", align_corners=False)[0]
            results.append({"sem_seg": score})
        return results

    def losses(self, scores: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropy over labelled pixels; 0 if there are none.

        Args:
            scores: (B, K, H, W).
            targets: (B, H, W) classes.
        """
        total = F.cross_entropy(scores, targets, ignore_index=self.ignore_value, reduction="sum")
        return {"loss_sem_seg": total / (targets != self.ignore_value).sum().clamp(min=1)}

    def predict(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to class scores (B, K, H, W) in fp32."""
        height, width = shape_of(images)[2:]
        padded = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        grid = tuple(n // self.patch for n in shape_of(padded)[2:])
        tokens, rebuild = self.encode(padded)
        scores = self.decoder(tokens)
        scores = scores.unflatten(1, grid) if rebuild is None else rebuild(scores)  # (B, h, w, K)
        scores = F.interpolate(
            scores.permute(0, 3, 1, 2).float(),
            [n * self.patch for n in grid],
            mode="bilinear",
            align_corners=False,
        )
        return scores[..., :height, :width]

    def encode(self, images: Tensor) -> tuple[Tensor, Rebuild | None]:
        """Images (B, 3, H, W), in whole tokens, to tokens without prefix tokens.

        Returns:
            (B, h * w, C) and None, or clusters (B, M, C) and what rebuilds a map from their scores.

        Raises:
            ValueError: if the decoder is to run on clusters, and the encoder is not timm's
                ``VisionTransformer``.
        """
        vit, rebuild = self.encoder, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            if getattr(vit.blocks, "rebuilds", True):
                tokens = vit.forward_features(images)
            elif not isinstance(vit, VisionTransformer):
                raise ValueError(
                    "MODEL.EXPEDIT.RECONSTRUCT_AT must be 'backbone' for a "
                    f"{type(vit).__name__}; 'head' needs timm's VisionTransformer"
                )
            else:  # the same, but the blocks return clusters
                tokens = positioned(vit, vit.patch_embed(images))
                size = tuple(side // self.patch for side in shape_of(images)[2:])
                tokens = vit.norm_pre(vit.patch_drop(tokens))
                tokens, rebuild = run_reduced(vit.blocks, tokens, size)
                tokens = vit.norm(tokens)
        return tokens[:, vit.num_prefix_tokens :], rebuild
