"""torchvision's VisionTransformer, expedited."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import (
    ConvStemConfig,
    VisionTransformer,
    interpolate_embeddings,
)

from expedit_d2 import expedite, fuse_attention
from expedit_d2.adapters import find_transformer
from expedit_d2.analysis.flops import count_flops
from expedit_d2.operators import cluster_tokens, reconstruct_tokens
from support.tensors import IDENTITY, constant_cells, error, perturbed

PATCH = 4
SIDE = 10  # tokens along the sides of the map
METHODS = ["merge", "tome", "density"]


def tiny_vit(side: int = SIDE, **changes) -> VisionTransformer:
    """A random ViT; nothing in it is zero."""
    settings = {
        "image_size": side * PATCH,
        "patch_size": PATCH,
        "num_layers": 4,
        "num_heads": 4,
        "hidden_dim": 32,
        "mlp_dim": 64,
        "num_classes": 7,
    }
    return perturbed(VisionTransformer(**(settings | changes)))


def images(side: int = SIDE, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, side * PATCH, side * PATCH)


def tokens_of(vit: VisionTransformer, x: Tensor) -> Tensor:
    """What the encoder returns: class token and map, (B, 1 + H * W, C)."""
    seen = []
    hook = vit.encoder.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        vit(x)
    hook.remove()
    return seen[0]


# --- nothing is lost where there is nothing to lose ------------------------------------------


@pytest.mark.parametrize("size_aware", [True, False])
@pytest.mark.parametrize("method", ["expedit", "hard", "pool"])
@pytest.mark.parametrize("alpha", [0, 1, 3, (0, 2), (0, 1, 2, 3)])
def test_one_cluster_a_token_is_the_plain_model(alpha, method, size_aware):
    vit, x = tiny_vit(), images(batch=3)
    expected = tokens_of(vit, x)
    settings = {"grid": (SIDE, SIDE), "method": method, "size_aware": size_aware}
    if method == "expedit":
        settings |= IDENTITY
    with expedite(vit, alpha, **settings):
        assert error(tokens_of(vit, x), expected) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("alpha", [0, 2, (0, 1, 2, 3)])
def test_keeping_all_tokens_is_the_plain_model(alpha, method):
    vit, x = tiny_vit(), images(batch=3)
    expected = tokens_of(vit, x)
    with expedite(vit, alpha, method=method, keep=1.0):
        assert error(tokens_of(vit, x), expected) < 1e-5


def stem() -> list[ConvStemConfig]:
    return [ConvStemConfig(8, 3, 2), ConvStemConfig(16, 3, 2)]


@pytest.mark.parametrize(
    "changes",
    [{"side": 6}, {"num_heads": 1}, {"representation_size": 16}, {"conv_stem_configs": stem()}],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("settings", [{"ratio": 1.0, **IDENTITY}, {"keep": 1.0}], ids=str)
def test_other_architectures_and_sizes(changes, settings):
    vit, x = tiny_vit(**changes), images(changes.get("side", SIDE))
    expected = vit(x)
    method = "merge" if "keep" in settings else "expedit"
    with expedite(vit, 1, method=method, **settings):
        assert error(vit(x), expected) < 1e-5


def test_positions_made_for_another_size():
    weights = interpolate_embeddings(8 * PATCH, PATCH, tiny_vit().state_dict())
    vit, x = tiny_vit(side=8), images(8)
    vit.load_state_dict(weights)
    expected = tokens_of(vit, x)
    with expedite(vit, (0, 2), method="merge", keep=1.0):
        assert error(tokens_of(vit, x), expected) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"grid": (5, 5), "temperature": 1e4, "neighbors": 1},
        {"grid": (4, 3), "temperature": 1e4, "neighbors": 1},
        {"grid": (4, 3), "method": "hard"},
        {"keep": 0.5, "method": "merge"},
        {"keep": 0.6, "method": "tome"},
    ],
    ids=str,
)
def test_equal_tokens_cluster_without_loss(settings):
    """The class token attends to as many tokens as there were before; without sizes it does not."""
    vit, x = tiny_vit(), constant_cells((SIDE, SIDE), settings.get("grid", (5, 5)))
    vit.encoder.pos_embedding.data.zero_()
    expected = tokens_of(vit, x)
    with expedite(vit, 0, **settings):
        assert error(tokens_of(vit, x), expected) < 1e-5
    with expedite(vit, 0, size_aware=False, **settings):
        assert error(tokens_of(vit, x), expected) > 1e-3


# --- an explicit forward pass to compare with ------------------------------------------------


def explicit_block(block: nn.Module, x: Tensor, cluster_sizes: Tensor) -> Tensor:
    """A block on the tokens (N, C) of one image: a key of size n is there n times."""
    normed = block.ln_1(x)
    layer = block.self_attention
    q, k, v = nn.functional.linear(normed, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    rows = []
    for i in range(len(x)):
        heads = []
        for head in range(layer.num_heads):
            own = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
            weights = (k[:, own] @ q[i, own] * layer.head_dim**-0.5).exp() * cluster_sizes
            heads.append(weights @ v[:, own] / weights.sum())
        rows.append(torch.cat(heads))
    x = x + layer.out_proj(torch.stack(rows))
    return x + block.mlp(block.ln_2(x))


@torch.no_grad()
@pytest.mark.parametrize("size_aware", [True, False])
def test_explicit_forward(size_aware):
    vit, x = tiny_vit(), images()
    layers = vit.encoder.layers
    seen = []
    layers[0].register_forward_hook(lambda module, args, out: seen.append(out))
    with expedite(vit, 1, grid=(3, 5), neighbors=3, size_aware=size_aware):
        actual = tokens_of(vit, x)
    maps = seen[0][:, 1:].reshape(2, SIDE, SIDE, 32)
    clusters, sizes, _ = cluster_tokens(maps, (3, 5))
    assert sizes.std() > 0.1  # the sizes differ
    expected = []
    for image in range(2):
        tokens = torch.cat([seen[0][image, :1], clusters[image].flatten(0, 1)])
        cluster_sizes = torch.cat([torch.ones(1), sizes[image].flatten()])
        for block in layers[1:]:
            tokens = explicit_block(
                block, tokens, cluster_sizes if size_aware else torch.ones_like(cluster_sizes)
            )
        change = tokens[None, 1:].view(1, 3, 5, 32) - clusters[[image]]
        rebuilt = maps[[image]] + reconstruct_tokens(
            change, maps[[image]], clusters[[image]], 3, window=5
        )
        expected.append(torch.cat([tokens[:1], rebuilt[0].flatten(0, 1)]))
    assert error(actual, vit.encoder.ln(torch.stack(expected))) < 1e-5


# --- it is the model's own code until tokens are reduced, and again afterwards -----------------


@pytest.mark.parametrize("settings", [{"grid": (4, 4)}, {"method": "merge", "keep": 0.5}], ids=str)
def test_blocks_before_alpha_are_the_models_own(settings):
    vit, x, seen = tiny_vit(), images(), []
    vit.encoder.layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
    tokens_of(vit, x)
    with expedite(vit, 2, **settings):
        tokens_of(vit, x)
    plain, expedited = seen
    assert torch.equal(expedited, plain)


@pytest.mark.parametrize(
    "settings", [{"budget": 0.5}, {"budget": 0.7, "method": "expedit", "fused_attention": True}]
)
def test_remove_restores_everything(settings):
    vit, x = tiny_vit(), images()
    model = nn.Sequential(vit)
    expected, keys, modules = tokens_of(vit, x), list(model.state_dict()), list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    with expedite(model, **settings) as handle:
        assert "VisionTransformer" in repr(handle)
        assert list(model.state_dict()) == keys
        assert error(tokens_of(vit, x), expected) > 1e-4
    assert list(model.state_dict()) == keys
    assert list(model.modules()) == modules
    for module, before in zip(modules, attributes, strict=True):
        assert vars(module) == before
    assert torch.equal(tokens_of(vit, x), expected)


def test_attention_is_fused_already():
    vit, x = tiny_vit(), images()
    expected = vit(x)
    with fuse_attention(vit):
        assert torch.equal(vit(x), expected)
    assert find_transformer(vit).whole is vit


# --- in use ----------------------------------------------------------------------------------


def test_the_budget_is_met():
    sizes = {"image_size": 256, "patch_size": 16, "num_layers": 8, "num_heads": 6}
    vit = VisionTransformer(**sizes, hidden_dim=384, mlp_dim=1536).eval()
    x = torch.randn(1, 3, 256, 256)
    plain = count_flops(vit, x)
    assert not any("attention" in name for name in plain.uncounted)
    for method in (None, *METHODS, "expedit", "pool", "hard"):
        with expedite(vit, budget=0.5, method=method):
            flops = count_flops(vit, x)
        assert 0.46 < flops.blocks / plain.blocks < 0.54, method
        assert flops.embed == plain.embed >= 256 * 384 * 3 * 16 * 16  # the patches are its own
        assert not any("attention" in name for name in flops.uncounted), method


def test_flops_of_the_plain_model_are_those_of_its_products():
    vit = tiny_vit()
    n, c, layers = SIDE * SIDE + 1, 32, 4
    norms = 2 * 5 * n * c  # fvcore counts five a number
    block = 3 * n * c * c + 2 * n * n * c + n * c * c + 2 * n * c * 64 + norms
    assert count_flops(vit, images(batch=1)).blocks == pytest.approx(layers * block, rel=0.01)


@pytest.mark.parametrize("settings", [{"grid": (5, 5)}, {"method": "merge", "keep": 0.5}], ids=str)
def test_bfloat16_stays_near(settings):
    vit, x = tiny_vit(), images()
    with expedite(vit, 1, **settings):
        expected = tokens_of(vit, x)
        vit.to(torch.bfloat16)
        actual = tokens_of(vit, x.to(torch.bfloat16))
    assert actual.dtype == torch.bfloat16 and torch.isfinite(actual).all()
    assert ((actual.float() - expected).norm() / expected.norm()).item() < 0.2


def test_images_of_a_batch_do_not_meet():
    vit, x = tiny_vit(), images(batch=3)
    for settings in ({"grid": (4, 5)}, {"method": "merge", "keep": 0.5}):
        with expedite(vit, 1, **settings):
            together = vit(x)
            alone = torch.cat([vit(image[None]) for image in x])
        assert error(together, alone) < 1e-5


def test_recording_gradients_changes_no_output():
    """PyTorch takes another path through the attention then."""
    vit, x = tiny_vit(), images()
    for settings in ({"grid": (4, 5)}, {"method": "merge", "keep": 0.5}):
        with expedite(vit, 1, **settings):
            expected = vit(x)
            with torch.no_grad():
                assert error(vit(x), expected.detach()) < 1e-5
            (expected * torch.randn(2, 7)).sum().backward()
        for name, parameter in vit.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_copies_and_pickles():
    vit, x = tiny_vit(), images()
    with expedite(vit, 1, method="merge", keep=0.5):
        expected = vit(x)
        copied, pickled = copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))
    assert torch.equal(copied(x), expected)
    assert torch.equal(pickled(x), expected)


@pytest.mark.slow
def test_compiles_without_a_break():
    torch._dynamo.reset()
    vit, x = tiny_vit(num_layers=3), images()
    for settings in ({"grid": (4, 4)}, {"method": "merge", "keep": 0.5}):
        with expedite(vit, 1, **settings), torch.no_grad():
            expected = vit(x)
            assert error(torch.compile(vit, fullgraph=True, backend="eager")(x), expected) < 1e-5
        torch._dynamo.reset()


def test_images_of_another_size_are_the_models_own_refusal():
    vit = tiny_vit()
    with expedite(vit, 1, grid=(4, 4)), pytest.raises(AssertionError, match="Wrong image"):
        vit(images(8))
