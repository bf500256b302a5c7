"""State belongs to one forward pass: map sizes, what blocks are given, checkpointing.

Images of 8 x 16 and 16 x 8 tokens have the same number of them, so that a wrong size gives wrong
numbers and no error by itself.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import timm
import torch
from detectron2.modeling.backbone.swin import SwinTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expedit_d2 import expedite, sized_blocks
from expedit_d2.hook import run_reduced
from expedit_d2.projects.DPT.modeling.encoder import Encoder
from support.tensors import error, perturbed
from support.vits import detectron2_vit, embedded

LANDSCAPE, PORTRAIT = (8, 16), (16, 8)
SETTING = {"alpha": 1, "ratio": 0.5}


def vit_tiny(**changes) -> nn.Module:
    """ViT-Ti with few blocks, for images of any size."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", depth=4, dynamic_img_size=True, num_classes=0, **changes
    )
    return perturbed(vit)


def eva_tiny() -> nn.Module:
    return perturbed(
        timm.create_model(
            "eva02_tiny_patch14_224", depth=4, dynamic_img_size=True, num_classes=0, patch_size=16
        )
    )


def images(size: tuple[int, int]) -> Tensor:
    return torch.randn(1, 3, size[0] * 16, size[1] * 16)


def tokens_of(vit: nn.Module, x: Tensor) -> Tensor:
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))


def own_tokens_of(vit: nn.Module, x: Tensor) -> Tensor:
    """As MiDaS and others embed: the projection alone, and the rest in their own code."""
    x = vit.patch_embed.proj(x)
    size = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    table = vit.pos_embed[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    table = nn.functional.interpolate(table, size).flatten(2).transpose(1, 2)
    return torch.cat([vit.cls_token + vit.pos_embed[:, :1], x + table], dim=1)


def looped(vit: nn.Module, x: Tensor) -> Tensor:
    for block in vit.blocks:
        x = block(x)
    return x


def alone(make: Callable[[], nn.Module], run: Callable[[nn.Module], Tensor]) -> Tensor:
    """What a fresh model with the same weights makes, which has seen nothing else."""
    torch.manual_seed(0)
    vit = make()
    with torch.no_grad(), expedite(vit, **SETTING):
        return run(vit)


class OwnModel(nn.Module):
    """A model that embeds by itself and loops over the blocks of a ViT."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        return looped(self.vit, own_tokens_of(self.vit, x))


# --- the size of the map ---------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("make", [vit_tiny, eva_tiny])
def test_portrait_and_landscape_in_turn(make):
    a, b = images(LANDSCAPE), images(PORTRAIT)
    expected = [alone(make, lambda vit, x=x: vit.forward_features(x)) for x in (a, b)]
    torch.manual_seed(0)
    vit = make()
    with expedite(vit, **SETTING):
        for _ in range(2):
            for x, out in zip((a, b), expected, strict=True):
                assert torch.equal(vit.forward_features(x), out)
                assert torch.equal(vit(x), vit.forward_head(out))
                maps = vit.forward_intermediates(x, intermediates_only=True)
                assert maps[-1].shape[2:] == (x.shape[2] // 16, x.shape[3] // 16)


@torch.no_grad()
def test_the_sizes_would_matter():
    """So that the tests here can fail: the map of the other image gives other numbers."""
    vit, a = vit_tiny(), images(LANDSCAPE)
    with expedite(vit, **SETTING):
        right, wrong = (
            run_reduced(vit.blocks, tokens_of(vit, a), size)[0] for size in (LANDSCAPE, PORTRAIT)
        )
    assert error(wrong, right) > 1e-3


@torch.no_grad()
def test_tokens_embedded_before_another_image_keep_their_map():
    a, b = images(LANDSCAPE), images(PORTRAIT)
    expected = alone(vit_tiny, lambda vit: looped(vit, tokens_of(vit, a)))
    torch.manual_seed(0)
    vit = vit_tiny()
    with expedite(vit, **SETTING):
        first, second = tokens_of(vit, a), tokens_of(vit, b)
        assert torch.equal(looped(vit, first), expected)
        looped(vit, second)
        assert torch.equal(vit.blocks(first), expected)


@torch.no_grad()
def test_an_own_embedding_is_followed_within_the_model():
    a, b = images(LANDSCAPE), images(PORTRAIT)
    expected = alone(vit_tiny, lambda vit: looped(vit, own_tokens_of(vit, a)))
    torch.manual_seed(0)
    model = OwnModel(vit_tiny())
    with expedite(model, **SETTING):
        model(b)
        assert torch.equal(model(a), expected)
        with pytest.raises(RuntimeError):  # a forward that fails is over, too
            model(torch.randn(1, 4, 128, 256))
        assert torch.equal(model(a), expected)


@torch.no_grad()
def test_a_map_that_is_not_known_is_an_error():
    a, b = images(LANDSCAPE), images(PORTRAIT)
    expected = alone(vit_tiny, lambda vit: looped(vit, own_tokens_of(vit, a)))
    torch.manual_seed(0)
    vit = vit_tiny()
    with expedite(vit, **SETTING):
        first = own_tokens_of(vit, a)
        assert torch.equal(looped(vit, first), expected)  # the only map there was
        own_tokens_of(vit, b)
        with pytest.raises(ValueError, match="128 tokens is not known .*8 x 16 and 16 x 8.*sized"):
            looped(vit, first)
        x = first
        for block in sized_blocks(vit.blocks, LANDSCAPE):
            x = block(x)
        assert torch.equal(x, expected)
        with pytest.raises(ValueError, match="expected a map of 4 x 4 tokens, got 128"):
            for block in sized_blocks(vit.blocks, (4, 4)):
                first = block(first)
    assert sized_blocks(vit.blocks, LANDSCAPE) is vit.blocks


@torch.no_grad()
def test_tokens_that_were_never_embedded_are_an_error():
    vit = vit_tiny()
    with expedite(vit, **SETTING), pytest.raises(ValueError, match="36 tokens .*none was made"):
        looped(vit, torch.randn(1, 37, 192))


@torch.no_grad()
def test_the_encoder_of_dpt_follows_its_own_maps():
    a, b = images(LANDSCAPE), images(PORTRAIT)

    def make() -> nn.Module:
        return Encoder(vit_tiny(), blocks=(0, 1, 2, 3))

    def run(encoder: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([level.features.flatten() for level in encoder(x)])

    expected = [alone(make, lambda encoder, x=x: run(encoder, x)) for x in (a, b)]
    torch.manual_seed(0)
    encoder = make()
    with expedite(encoder.vit, **SETTING):  # whose own forward is not run
        assert all(torch.equal(run(encoder, x), y) for x, y in zip((a, b), expected, strict=True))


@torch.no_grad()
def test_two_models_do_not_share_sizes():
    a, b = images(LANDSCAPE), images(PORTRAIT)
    expected = alone(vit_tiny, lambda vit: looped(vit, own_tokens_of(vit, a)))
    torch.manual_seed(0)
    one, other = vit_tiny(), vit_tiny()
    with expedite(one, **SETTING), expedite(other, **SETTING):
        tokens = own_tokens_of(one, a)
        other(b)
        assert torch.equal(looped(one, tokens), expected)
        twin = copy.deepcopy(one)
        twin(b)
        assert torch.equal(looped(one, tokens), expected)


@torch.no_grad()
def test_generators_that_take_turns():
    def stepwise(vit: nn.Module, x: Tensor):
        x = tokens_of(vit, x)
        yield
        for block in vit.blocks:
            x = block(x)
            yield
        results.append(x)

    a, b = images(LANDSCAPE), images(PORTRAIT)
    expected = [alone(vit_tiny, lambda vit, x=x: looped(vit, tokens_of(vit, x))) for x in (a, b)]
    torch.manual_seed(0)
    vit, results = vit_tiny(), []
    with expedite(vit, **SETTING):
        for _ in zip(stepwise(vit, a), stepwise(vit, b), strict=True):
            pass
    assert len(results) == 2 and all(map(torch.equal, results, expected))


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: vit_tiny(), lambda: OwnModel(vit_tiny())])
def test_threads_with_maps_of_as_many_tokens(make):
    inputs = [images(LANDSCAPE), images(PORTRAIT)]
    model, failed = make(), []
    with expedite(model, **SETTING):
        expected = [model(x) for x in inputs]

        def work(index: int) -> None:
            with torch.no_grad():
                for _ in range(5):
                    if not torch.equal(model(inputs[index]), expected[index]):
                        failed.append(index)

        run_threads([lambda i=i: work(i) for i in (0, 1)])
    assert not failed


def run_threads(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@torch.no_grad()
@pytest.mark.parametrize("embed", [tokens_of, own_tokens_of])
def test_blocks_may_run_in_another_thread_than_the_embedding(embed):
    a = images(LANDSCAPE)
    expected = alone(vit_tiny, lambda vit: looped(vit, embed(vit, a)))
    torch.manual_seed(0)
    vit, results = vit_tiny(), []
    with expedite(vit, **SETTING):
        tokens = embed(vit, a)

        def work() -> None:
            with torch.no_grad():
                results.append(looped(vit, tokens))

        run_threads([work])
    assert torch.equal(results[0], expected)


def official_swin(**changes) -> SwinTransformer:
    settings = {"embed_dim": 16, "depths": (4,), "num_heads": (2,), "window_size": 4}
    return SwinTransformer(**(settings | {"out_indices": (0,), "drop_path_rate": 0.0} | changes))


@torch.no_grad()
def test_layers_of_the_official_swin_that_take_turns():
    swin = perturbed(official_swin())
    layer, outputs = swin.layers[0], []
    maps = [torch.randn(1, 16 * 8, 16) for _ in range(2)]
    with expedite(swin, 1, grid=(2, 2), scope="window"):
        expected = [layer(x, *size)[0] for x, size in zip(maps, (LANDSCAPE, PORTRAIT), strict=True)]
        masks = []
        layer.blocks[0].register_forward_pre_hook(lambda _, args: masks.append(args[1]))
        for x, size in zip(maps, (LANDSCAPE, PORTRAIT), strict=True):
            layer(x, *size)

        def stepwise(x: Tensor, size: tuple[int, int], mask: Tensor):
            for block in layer.blocks:
                block.H, block.W = size
                yield
                x = block(x, mask)
            outputs.append(x)

        runs = [stepwise(*run) for run in zip(maps, (LANDSCAPE, PORTRAIT), masks[:2], strict=True)]
        for _ in zip(*runs, strict=True):
            pass
    assert all(map(torch.equal, outputs, expected))


# --- gradient checkpointing ------------------------------------------------------------------


def gradients(model: nn.Module, run: Callable[[], list[Tensor]]) -> dict[str, Tensor]:
    """Of a loss over several forward passes; backward comes after all of them."""
    model.zero_grad()
    outputs = run()
    weights = torch.Generator().manual_seed(1)
    sum((y * torch.randn(y.shape, generator=weights)).sum() for y in outputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert error(actual[name], gradient) < 1e-4, name


@pytest.mark.parametrize("embed", [tokens_of, OwnModel])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_all_blocks_changes_no_gradient(embed, reentrant):
    vit, inputs = vit_tiny(), [images(LANDSCAPE), images(PORTRAIT)]

    class Checkpointed(OwnModel):
        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            x = tokens_of(self.vit, x) if embed is tokens_of else own_tokens_of(self.vit, x)
            if not again:
                return looped(self.vit, x)
            return checkpoint(lambda x: looped(self.vit, x), x, use_reentrant=reentrant)

    model = Checkpointed(vit)
    with expedite(model, **SETTING):
        expected = gradients(model, lambda: [model(x, again=False) for x in inputs])
        actual = gradients(model, lambda: [model(x) for x in inputs])
    assert_same(actual, expected)


def test_checkpointing_each_block_changes_no_gradient():
    vit, inputs = vit_tiny(), [images(LANDSCAPE), images(PORTRAIT)]
    with expedite(vit, (1, 2), ratio=0.7):
        expected = gradients(vit, lambda: [vit(x) for x in inputs])
        vit.set_grad_checkpointing()
        assert_same(gradients(vit, lambda: [vit(x) for x in inputs]), expected)


def test_reentrant_checkpoints_before_alpha_change_no_gradient():
    vit, inputs = vit_tiny(), [images(LANDSCAPE), images(PORTRAIT)]

    def run(vit: nn.Module, x: Tensor, again: bool) -> Tensor:
        x = tokens_of(vit, x)
        for index, block in enumerate(vit.blocks):
            x = checkpoint(block, x, use_reentrant=True) if again and index < 2 else block(x)
        return x

    with expedite(vit, 2, ratio=0.5):
        expected = gradients(vit, lambda: [run(vit, x, False) for x in inputs])
        assert_same(gradients(vit, lambda: [run(vit, x, True) for x in inputs]), expected)


def test_reentrant_checkpoints_of_single_reduced_blocks_are_refused():
    """Their backward would not reach what the blocks before have left."""
    vit, x = vit_tiny(), images(LANDSCAPE)
    with expedite(vit, 1, ratio=0.5), pytest.raises(ValueError, match="block 2 .*use_reentrant"):
        tokens = tokens_of(vit, x)
        for block in vit.blocks:
            tokens = checkpoint(block, tokens, use_reentrant=True)
    with torch.no_grad(), expedite(vit, 1, ratio=0.5):  # without gradients nothing is lost
        tokens, expected = tokens_of(vit, x), vit.blocks(tokens_of(vit, x))
        for block in vit.blocks:
            tokens = checkpoint(block, tokens, use_reentrant=True)
    assert torch.equal(tokens, expected)


def test_training_twice_through_the_same_checkpoints():
    vit, x = vit_tiny(), images(LANDSCAPE)
    with expedite(vit, 1, ratio=0.5):
        expected = gradients(vit, lambda: [vit(x)])
        vit.set_grad_checkpointing()
        vit.zero_grad()
        y = vit(x)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        loss = (y * weights).sum()
        loss.backward(retain_graph=True)
        vit.zero_grad()
        loss.backward()
        assert_same({name: p.grad for name, p in vit.named_parameters()}, expected)


# --- what a block is given -------------------------------------------------------------------


def changed(between: Callable[[int, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(vit: nn.Module, x: Tensor) -> Tensor:
        x = embedded(vit, x)
        for index, block in enumerate(vit.blocks):
            x = block(x if index < 2 else between(index, x))
        return x

    return run


def add_in_place(index: int, x: Tensor) -> Tensor:
    return x.add_(0.1)


CHANGES = {
    "added": (lambda index, x: x + 0.1, "given other tokens"),
    "in place": (add_in_place, "changed in place"),
    "cloned": (lambda index, x: x.clone(), "given other tokens"),
    "a part in place": (lambda index, x: x[:, :1].mul_(2) is None or x, "changed in place"),
    "more tokens": (lambda index, x: torch.cat([x, x[:, :1]], 1), r"tokens of shape .* returned"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("make", [vit_tiny, detectron2_vit])
def test_tokens_that_a_model_changes_after_alpha_are_refused(make, name):
    vit, (change, message) = make(), CHANGES[name]
    x = images((2, 4))
    with expedite(vit, 1, ratio=0.5), pytest.raises(ValueError, match=message) as caught:
        changed(change)(vit, x)
    assert "block 2" in str(caught.value) and "ALPHA 1" in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("make", [vit_tiny, detectron2_vit])
def test_tokens_may_be_changed_before_alpha(make):
    vit, x = make(), images((2, 4))

    def change(index: int, x: Tensor) -> Tensor:
        return x + 0.1 if index < 3 else x

    expected = changed(change)(vit, x)
    with expedite(vit, 2, ratio=1.0, temperature=1e6, neighbors=1):
        assert error(changed(change)(vit, x), expected) < 1e-5


@torch.no_grad()
def test_blocks_that_are_left_out_are_refused():
    vit, x = vit_tiny(), images(LANDSCAPE)
    for left_out in (1, 2):
        with expedite(vit, **SETTING), pytest.raises(ValueError, match="was not run right after"):
            tokens = tokens_of(vit, x)
            for index, block in enumerate(vit.blocks):
                if index != left_out:
                    tokens = block(tokens)


@torch.no_grad()
def test_inference_mode_works():
    vit, x = vit_tiny(), images(LANDSCAPE)
    with expedite(vit, **SETTING):
        expected = vit(x)
        with torch.inference_mode():
            assert torch.equal(vit(x), expected)
            with pytest.raises(ValueError, match="given other tokens"):
                changed(CHANGES["added"][0])(vit, x)


def by_index(vit: nn.Module, x: Tensor) -> Tensor:
    for index in range(len(vit.blocks)):
        x = vit.blocks[index](x)
    return x


def by_children(vit: nn.Module, x: Tensor) -> Tensor:
    for block in vit.blocks.children():
        x = block(x)
    return x


def by_parts(vit: nn.Module, x: Tensor) -> Tensor:
    """As the official EoMT runs a ViT."""
    for block in vit.blocks:
        attn, y = block.attn, block.norm1(x)
        qkv = attn.qkv(y).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + block.ls1(attn.proj(y.transpose(1, 2).flatten(2)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x


@torch.no_grad()
@pytest.mark.parametrize("run", [by_index, by_children, by_parts], ids=lambda f: f.__name__)
def test_blocks_past_the_loop_are_refused(run):
    vit = vit_tiny()
    x = tokens_of(vit, images(LANDSCAPE))
    expected = vit.blocks(x)
    assert error(run(vit, x), expected) < 1e-5
    with expedite(vit, **SETTING), pytest.raises(ValueError, match="block 1, or its .* by itself"):
        run(vit, x)
    assert error(run(vit, x), expected) < 1e-5


@torch.no_grad()
def test_a_container_that_was_kept_is_refused():
    vit = vit_tiny()
    kept = list(vit.blocks)
    x = tokens_of(vit, images(LANDSCAPE))
    with expedite(vit, **SETTING), pytest.raises(ValueError, match="block 1"):
        for block in kept:
            x = block(x)


@torch.no_grad()
def test_looking_at_blocks_is_no_call():
    vit = vit_tiny()
    x = images(LANDSCAPE)
    with expedite(vit, **SETTING):
        expected = vit(x)
        for index, block in enumerate(vit.blocks):
            block.attn.fused_attn = False
            assert block.attn.qkv.weight is vit.blocks[index].attn.qkv.weight
            assert sum(p.numel() for p in block.parameters()) > 0
            block.train().eval()
            block.marker = index
        assert [block.marker for block in vit.blocks] == [0, 1, 2, 3]
        assert error(vit(x), expected) < 1e-4


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:blocks 3 to 3 run on all tokens")
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_part_of_the_blocks_ends_with_the_whole_map(cut):
    """Two loops over parts: the first leaves all tokens, the second begins with them."""
    vit, x = vit_tiny(), images(LANDSCAPE)
    with expedite(vit, 2, outputs=(3,), ratio=1.0, temperature=1e6, neighbors=1):
        tokens = tokens_of(vit, x)
        for block in vit.blocks[:cut]:
            tokens = block(tokens)
        assert tokens.shape == (1, 129, 192)
        for block in vit.blocks[cut:]:
            tokens = block(tokens)
    assert error(tokens, vit.blocks(tokens_of(vit, x))) < 1e-5


@torch.no_grad()
def test_states_are_not_kept():
    """What a pass has behind it is freed as it goes on, as with the plain model."""
    vit, x, alive = vit_tiny(), images(LANDSCAPE), []
    with expedite(vit, 0, outputs=(3,), ratio=0.5):
        steps = list(vit.blocks)
        x = tokens_of(vit, x)
        for step in steps:
            x = step(x)
            alive.append(sum(len(entries) for entries in step._run.states.values()))
    assert max(alive) <= 2
    vit, alive = detectron2_vit(), []
    with expedite(vit, 0, ratio=0.5):
        x = vit.patch_embed(torch.randn(1, 3, 32, 48))
        for step in vit.blocks:
            x = step(x)
            alive.append(sum(len(entries) for entries in step._run.states.values()))
    assert max(alive) <= 2
