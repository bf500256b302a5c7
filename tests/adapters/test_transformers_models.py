"""Models of Hugging Face that are built on an expedited backbone, and pipelines of them."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from expedit_d2 import expedite
from support.tensors import maps_error as error

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install .[transformers]"
)
LAYERS = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def vit(name: str, **changes):
    """A backbone of 4 layers on patches of 4 pixels, all of which are read."""
    settings = LAYERS | {"image_size": 32, "patch_size": 4, "intermediate_size": 64}
    settings |= {"out_features": STAGES, "reshape_hidden_states": False}
    return getattr(transformers, f"{name}Config")(**(settings | changes))


def swin(**changes):
    settings = {
        "image_size": 64,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [2, 2, 4, 2],
        "num_heads": [2, 2, 4, 4],
        "window_size": 4,
        "out_features": STAGES,
    }
    return transformers.SwinConfig(**(settings | changes))


HEAD = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
DECODER = {
    "feature_size": 32,  # a group norm has 32 groups
    "mask_feature_size": 16,
    "hidden_dim": 16,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "num_queries": 5,
    "num_labels": 3,
}


def depth_anything() -> nn.Module:
    config = transformers.DepthAnythingConfig(
        backbone_config=vit("Dinov2"),
        patch_size=4,
        reassemble_hidden_size=32,
        head_hidden_size=4,
        depth_estimation_type="metric",
        max_depth=10,
        **HEAD,
    )
    return transformers.DepthAnythingForDepthEstimation(config)


def dpt() -> nn.Module:
    config = transformers.DPTConfig(backbone_config=vit("Dinov2"), **HEAD)
    return transformers.DPTForDepthEstimation(config)


def zoedepth() -> nn.Module:
    config = transformers.ZoeDepthConfig(
        backbone_config=vit("Beit", use_relative_position_bias=True),
        backbone_hidden_size=32,
        bottleneck_features=8,
        num_relative_features=4,
        bin_embedding_dim=8,
        num_attractors=[2, 2, 2, 2],
        patch_transformer_hidden_size=8,
        patch_transformer_intermediate_size=16,
        bin_configurations=[{"n_bins": 4, "min_depth": 0.1, "max_depth": 10.0, "name": "nyu"}],
        reassemble_factors=[4, 2, 1, 0.5],
        **HEAD,
    )
    return transformers.ZoeDepthForDepthEstimation(config)


def mask2former() -> nn.Module:
    config = transformers.Mask2FormerConfig(backbone_config=swin(), **DECODER)
    return transformers.Mask2FormerForUniversalSegmentation(config)


def maskformer() -> nn.Module:
    detr = transformers.DetrConfig(
        d_model=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        num_queries=5,
    )
    config = transformers.MaskFormerConfig(
        backbone_config=swin(), decoder_config=detr, fpn_feature_size=32, mask_feature_size=16
    )
    return transformers.MaskFormerForInstanceSegmentation(config)


def oneformer() -> nn.Module:
    config = transformers.OneFormerConfig(
        backbone_config=swin(),
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        num_attention_heads=2,
        encoder_layers=1,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        decoder_layers=3,
        query_dec_layers=1,
        num_queries=5,
        task_seq_len=4,
        max_seq_len=4,
        is_training=False,
    )
    return transformers.OneFormerForUniversalSegmentation(config)


def upernet() -> nn.Module:
    config = transformers.UperNetConfig(
        backbone_config=swin(), hidden_size=16, use_auxiliary_head=False, num_labels=3
    )
    return transformers.UperNetForSemanticSegmentation(config)


MODELS = (depth_anything, dpt, zoedepth, mask2former, maskformer, oneformer, upernet)


def build(make) -> nn.Module:
    """A random model; nothing in it is zero."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def run(model: nn.Module) -> list[Tensor]:
    """What the model predicts for two images that are not square."""
    inputs = {"pixel_values": torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))}
    if isinstance(model, transformers.OneFormerForUniversalSegmentation):
        inputs["task_inputs"] = torch.ones(2, 4)
    out = model(**inputs)
    names = ("predicted_depth", "masks_queries_logits", "class_queries_logits", "logits")
    return [out[name] for name in names if out.get(name) is not None]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_on_an_expedited_backbone(make):
    """Keeping all tokens loses nothing, a budget does, and nothing of it stays."""
    model = build(make)
    expected, keys = run(model), list(model.state_dict())
    with expedite(model, (4, 6) if "Swin" in str(model) else 1, method="merge", keep=1.0):
        assert error(run(model), expected) < 1e-4
    with expedite(model, budget=0.7):
        assert list(model.state_dict()) == keys
        assert error(run(model), expected) > 1e-6
    assert all(map(torch.equal, run(model), expected))


def saved(folder, model: nn.Module, processor) -> str:
    """A folder as the hub has them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_in_a_pipeline_for_depth(tmp_path):
    processor = transformers.DPTImageProcessor(size={"height": 32, "width": 32})
    folder = saved(tmp_path, build(depth_anything), processor)
    pipe = transformers.pipeline("depth-estimation", model=folder)
    image = Image.effect_noise((50, 40), 50).convert("RGB")
    plain = pipe(image)["predicted_depth"]
    with expedite(pipe.model, budget=0.5):
        fewer = pipe(image)["predicted_depth"]
    assert fewer.shape == plain.shape and not torch.equal(fewer, plain)
    assert torch.equal(pipe(image)["predicted_depth"], plain)


def test_in_a_pipeline_for_segmentation(tmp_path):
    processor = transformers.Mask2FormerImageProcessor(size={"height": 64, "width": 64})
    folder = saved(tmp_path, build(mask2former), processor)
    pipe = transformers.pipeline("image-segmentation", model=folder)
    image = Image.effect_noise((50, 40), 50).convert("RGB")
    with expedite(pipe.model, budget=0.7):
        found = pipe(image, subtask="semantic")
    assert found and all(part["mask"].size == (50, 40) for part in found)
