"""What only a GPU can show: the CPU's results there, no waiting for the device, CUDA graphs."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from expedit_d2 import expedite
from expedit_d2.attention import attend, key_bias
from expedit_d2.cuda_graph import capture
from expedit_d2.operators import cluster_tokens, reconstruct_tokens
from support import gpu
from support.every_method import MODELS, PAIRS, SIZE, outputs, settings_for
from support.tensors import distance
from support.token_maps import smooth_map
from support.vits import images, timm_vit

pytestmark = pytest.mark.skipif(not gpu.is_available(), reason="needs a GPU")

DEVICE = "cuda"
EVERY = pytest.mark.parametrize("kind,method", PAIRS)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """No gradients, and convolutions in fp32 instead of TF32."""
    monkeypatch.setattr(torch.cuda, "is_available", gpu.is_available)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def test_operators_compute_what_they_do_on_a_cpu():
    tokens, refined = smooth_map(2, (25, 19), 64), torch.randn(2, 18, 17, 8)
    clusters, sizes, _ = cluster_tokens(tokens, (18, 17))
    clusters_there, sizes_there, _ = cluster_tokens(tokens.to(DEVICE), (18, 17))
    assert distance(clusters_there.cpu(), clusters) < 1e-3
    assert distance(sizes_there.cpu(), sizes) < 1e-3
    for window in (None, 5):
        rebuilt = reconstruct_tokens(refined, tokens, clusters, window=window)
        maps = (x.to(DEVICE) for x in (refined, tokens, clusters))
        assert distance(reconstruct_tokens(*maps, window=window).cpu(), rebuilt) < 1e-3


@EVERY
def test_a_gpu_computes_what_a_cpu_does(kind, method):
    model, x = MODELS[kind](), images(SIZE)
    with expedite(model, **settings_for(kind, method)):
        expected = outputs(model, x)  # what is kept for the CPU must not be used on the GPU
        actual = outputs(model.to(DEVICE), x.to(DEVICE))
        assert distance(actual.cpu(), expected) < 1e-4
        again = outputs(model.cpu(), x)
    assert torch.equal(again, expected)


@EVERY
def test_removed_is_the_original_bit_for_bit(kind, method):
    model, x = MODELS[kind]().to(DEVICE), images(SIZE).to(DEVICE)
    expected = outputs(model, x)
    with expedite(model, **settings_for(kind, method)):
        outputs(model, x)
    assert torch.equal(outputs(model, x), expected)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(kind, method, dtype):
    """As near to fp32 as the plain model is, but for tokens that are paired differently."""
    plain, x = MODELS[kind]().to(DEVICE), images(SIZE).to(DEVICE)
    expedited = copy.deepcopy(plain)
    errors = []
    with expedite(expedited, **settings_for(kind, method)):
        for model in (plain, expedited):
            expected = outputs(model, x)
            actual = outputs(model.to(dtype), x.to(dtype))
            assert actual.dtype == dtype
            typical = expected.abs().median()
            errors.append(((actual.float() - expected).abs().median() / typical).item())
    assert errors[1] < 3 * errors[0] + 0.05


@EVERY
@pytest.mark.parametrize("batch", [1, 3])
def test_nothing_waits_for_the_device(kind, method, batch):
    model, x = MODELS[kind]().to(DEVICE), images(SIZE, batch).to(DEVICE)
    with expedite(model, **settings_for(kind, method), fused_attention=True):
        outputs(model, x)  # what a model computes once and keeps
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs(model, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@EVERY
def test_cuda_graphs_replay_other_images(kind, method):
    model, x = MODELS[kind]().to(DEVICE), images(SIZE).to(DEVICE)
    others = [images(SIZE).to(DEVICE) * scale for scale in (1, 10)]
    with expedite(model, **settings_for(kind, method), fused_attention=True):
        expected = [outputs(model, other) for other in others]
        replay = capture(partial(outputs, model), x)
        for other, wanted in zip(others, expected, strict=True):
            assert distance(replay(other), wanted) < 1e-5
        with pytest.raises(ValueError, match=r"recorded for \(2, 3, 24, 32\) of torch"):
            replay(x[:1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_compiled_kernels_compute_the_same(kind):
    torch._dynamo.reset()
    model, x = MODELS[kind]().to(DEVICE), images(SIZE).to(DEVICE)
    with expedite(model, **settings_for(kind, "merge"), fused_attention=True):
        expected = outputs(model, x)
        compiled = torch.compile(model, fullgraph=True)
        assert distance(outputs(compiled, x), expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cluster_sizes_leave_flash_attention_possible(dtype):
    q, k, v = (torch.randn(2, 3, n, 64, device=DEVICE) for n in (70, 50, 50))
    sizes = torch.randint(1, 30, (2, 50), device=DEVICE)
    logits = q @ k.transpose(2, 3) * 64**-0.5
    weights = logits.exp() * sizes[:, None, None]
    expected = weights / weights.sum(-1, keepdim=True) @ v
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # fails where it would need a mask
        q, k, v = (x.to(dtype) for x in (q, k, v))
        actual = attend(q, k, v, 64**-0.5, bias=key_bias(sizes))
    assert distance(actual, expected) < 0.02


def test_a_merged_vit_runs_on_flash_attention_alone():
    model = timm_vit(SIZE, embed_dim=128, dynamic_img_size=True).to(DEVICE, torch.bfloat16)
    x = images(SIZE).to(DEVICE, torch.bfloat16)
    with expedite(model, alpha=1, method="merge", keep=0.6):
        expected = outputs(model, x).float()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            assert distance(outputs(model, x), expected) < 0.05
