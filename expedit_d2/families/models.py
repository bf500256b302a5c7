"""The models, built by their libraries' own classes in the sizes of published weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ..adapters import TransformerSpec, find_transformer
from ..analysis.gpu_models import MODELS

__all__ = ["FAMILIES", "LARGE", "Family"]


@dataclass(frozen=True)
class Family:
    """A model of a library.

    Attributes:
        model: its name, for people.
        size: side of the square images, in pixels.
        module: which its library is imported as.
        package: name of the library on PyPI.
        build: makes the model, with random weights.
    """

    model: str
    size: int
    module: str
    package: str
    build: Callable[[], nn.Module]

    @property
    def available(self) -> bool:
        return find_spec(self.module) is not None

    def prepare(self) -> tuple[nn.Module, TransformerSpec, Tensor]:
        """The model in evaluation mode, its transformer, and a random image; always the same."""
        torch.manual_seed(0)
        model = self.build().eval()
        return model, find_transformer(model), torch.randn(1, 3, self.size, self.size)

    def __str__(self) -> str:
        return f"{self.model}, {self.size}², {self.package}"


def _sam(name: str) -> nn.Module:
    from segment_anything import sam_model_registry

    return sam_model_registry[name]().image_encoder


#: Of a ViT-L, as transformers calls them.
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


def _dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(image_size=518, patch_size=14, **_LARGE))


def _dinov3() -> nn.Module:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(
        DINOv3ViTConfig(
            image_size=512,
            patch_size=16,
            intermediate_size=4096,
            num_register_tokens=4,
            key_bias=False,
            **_LARGE,
        )
    )


def _depth_anything() -> nn.Module:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        image_size=518,
        patch_size=14,
        out_features=["stage5", "stage12", "stage18", "stage24"],
        reshape_hidden_states=False,
        **_LARGE,
    )
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=1024,
            neck_hidden_sizes=[256, 512, 1024, 1024],
            fusion_hidden_size=256,
        )
    )


def _swag() -> nn.Module:
    from torchvision.models import vit_l_16

    return vit_l_16(image_size=512)


def _mask2former() -> nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        image_size=384,
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=12,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=133)
    return Mask2FormerForUniversalSegmentation(config)


def _swin() -> nn.Module:
    from detectron2.modeling.backbone.swin import SwinTransformer

    return SwinTransformer(
        pretrain_img_size=384,
        embed_dim=192,
        depths=(2, 2, 18, 2),
        num_heads=(6, 12, 24, 48),
        window_size=12,
        out_indices=(0, 1, 2, 3),
    )


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=0, img_size=512)


#: In the order of the table.
FAMILIES = (
    Family(
        "SAM's encoder ViT-B", 1024, "segment_anything", "segment-anything", partial(_sam, "vit_b")
    ),
    Family("DINOv2-L", 518, "transformers", "transformers", _dinov2),
    Family("DINOv3-L", 512, "transformers", "transformers", _dinov3),
    Family("Depth Anything V2-L", 518, "transformers", "transformers", _depth_anything),
    Family("Mask2Former Swin-B", 1024, "transformers", "transformers", _mask2former),
    Family("DINOv3-L", 512, "timm", "timm", partial(_timm, "vit_large_patch16_dinov3")),
    Family("SWAG ViT-L", 512, "torchvision", "torchvision", _swag),
    Family("ViTDet's ViT-B", 1024, "detectron2", "detectron2", MODELS["ViTDet-B, 1024"].build),
)

#: With windows, for several budgets at once.
LARGE = (
    FAMILIES[-1],
    Family("Mask2Former's Swin-L", 1024, "detectron2", "detectron2", _swin),
    Family("ViTDet's ViT-L", 1024, "detectron2", "detectron2", MODELS["ViTDet-L, 1024"].build),
    Family(
        "SAM's encoder ViT-H", 1024, "segment_anything", "segment-anything", partial(_sam, "vit_h")
    ),
)
