"""Blocks with code of their own are refused where an adapter runs their parts by itself."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.backbone.vit import Attention, Block
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from expedit_d2 import expedite
from expedit_d2.fused import fuse_attention
from support.swin import tiny as tiny_swin
from support.vits import detectron2_vit, images, timm_vit

MERGE = {"alpha": 1, "keep": 0.5}


class ScaledBlock(Block):
    def forward(self, x):
        return x + 0.1 * (super().forward(x) - x)


class ScaledAttention(Attention):
    def forward(self, x):
        return 0.1 * super().forward(x)


class ScaledEncoderBlock(EncoderBlock):
    def forward(self, x):
        return x + 0.1 * (super().forward(x) - x)


class ScaledTimmBlock(TimmBlock):
    def forward(self, x, attn_mask=None, **kwargs):
        return x + 0.1 * (super().forward(x, attn_mask, **kwargs) - x)


class Wrapper(nn.Module):
    """Around an attention layer, as adapters for fine-tuning are."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 0.5 * self.layer(x)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)


def torchvision_vit():
    return VisionTransformer(32, 4, 4, 2, 32, 64).eval()


@pytest.mark.parametrize("settings", [MERGE, {"alpha": 1, "ratio": 0.5}])
def test_a_subclass(settings):
    vit = detectron2_vit()
    vit.blocks[2].__class__ = ScaledBlock
    with pytest.raises(ValueError, match=r"block 2 has the code of .*ScaledBlock\.forward"):
        expedite(vit, **settings)
    vit = torchvision_vit()
    vit.encoder.layers[3].__class__ = ScaledEncoderBlock
    with pytest.raises(ValueError, match=r"block 3 has the code of .*ScaledEncoderBlock\.forward"):
        expedite(vit, **settings)


@pytest.mark.parametrize("change", ["subclass", "wrapper", "forward"])
def test_its_attention(change):
    vit = detectron2_vit()
    attention = vit.blocks[3].attn
    if change == "subclass":
        attention.__class__ = ScaledAttention
    elif change == "wrapper":
        vit.blocks[3].attn = Wrapper(attention)
    else:
        attention.forward = lambda x: 0.5 * Attention.forward(attention, x)
    with pytest.raises(ValueError, match="block 3 has .*register an adapter"):
        expedite(vit, **MERGE)
    with pytest.raises(ValueError, match="block 3 has "):
        fuse_attention(vit)


def test_forward_hooks():
    vit, swin = detectron2_vit(), tiny_swin()
    vit.blocks[3].register_forward_hook(lambda block, args, out: 2 * out)
    swin.layers[0].blocks[1].attn.register_forward_pre_hook(lambda layer, args: None)
    with pytest.raises(ValueError, match="block 3 has a forward hook on its Block"):
        expedite(vit, **MERGE)
    with pytest.raises(ValueError, match="block 1 has a forward hook on its _Attention"):
        expedite(swin, **MERGE)


def test_blocks_that_run_on_all_tokens_may_have_anything():
    vit, x = detectron2_vit(), images((12, 12))
    vit.blocks[0].__class__ = ScaledBlock
    calls = []
    vit.blocks[0].register_forward_hook(lambda *args: calls.append(1))
    expected = vit(x)["last_feat"]
    with expedite(vit, alpha=1, keep=1.0):
        torch.testing.assert_close(vit(x)["last_feat"], expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2


def test_blocks_that_are_called_as_a_whole_may_be_changed():
    vit, x = timm_vit(), images()
    for block in vit.blocks:
        block.__class__ = ScaledTimmBlock
    expected = vit(x)
    with expedite(vit, alpha=1, keep=1.0):
        torch.testing.assert_close(vit(x), expected, atol=1e-5, rtol=1e-5)
    # ToMe reduces inside of them.
    with pytest.raises(ValueError, match="block 1 has the code of .*ScaledTimmBlock"):
        expedite(vit, alpha=(1, 2), keep=0.5, method="tome")


def test_fused_and_compiled_blocks_are_the_same_blocks():
    vit = detectron2_vit()
    with fuse_attention(vit):
        expedite(vit, **MERGE).remove()
        with fuse_attention(vit):
            pass
    vit.blocks[3] = torch.compile(vit.blocks[3])
    expedite(vit, **MERGE).remove()


def test_a_block_that_runs_twice():
    vit = timm_vit()
    first, second, *_ = vit.blocks
    vit.blocks = nn.Sequential(first, second, first, second)
    with pytest.raises(ValueError, match="runs one of its blocks several times"):
        expedite(vit, **MERGE)


def test_keys_of_what_is_no_linear_layer():
    class Lora(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    vit = detectron2_vit()
    for block in vit.blocks:
        block.attn.qkv = Lora(block.attn.qkv)
    with expedite(vit, **MERGE), pytest.raises(ValueError, match="taken from a Lora.* merge what"):
        vit(images((12, 12)))
