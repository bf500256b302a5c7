"""The mechanism that every family shares: the container of blocks, state, re-entrancy, heads."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from expedit_d2 import expedite
from expedit_d2.adapters import find_transformer
from expedit_d2.analysis.flops import count_flops
from expedit_d2.hook import ExpeditedBlocks, run_reduced
from expedit_d2.methods import Method
from expedit_d2.tokens import Tokens
from support.tensors import error
from support.vits import SIZE, detectron2_vit, embedded, images, run, timm_vit, timm_vit_of_any_size

# --- the container of blocks -----------------------------------------------------------------


def test_blocks_look_like_the_container_they_replace(vit):
    original = vit.blocks
    with expedite(vit, 1, grid=(4, 6)) as handle:
        blocks = handle.blocks
        assert len(blocks) == 4
        assert blocks[1] is original[1] and blocks[-1] is original[-1]
        assert [step.attn for step in blocks] == [block.attn for block in original]
        assert len(blocks[:2]) == 2 and len(blocks[1:]) == 3
        names = [name for name, _ in vit.named_parameters() if name.startswith("blocks.")]
        assert names == [f"blocks.{name}" for name, _ in original.named_parameters()]
        with pytest.raises(AttributeError):
            _ = next(iter(blocks)).no_such_thing
        with pytest.raises(IndexError):
            _ = blocks[4]


def test_steps_can_be_copied(vit):
    with expedite(vit, 1, grid=(4, 6)) as handle:
        step = copy.copy(next(iter(handle.blocks)))
        assert step.attn is handle.blocks[0].attn


def test_blocks_before_alpha_are_called_as_ever(vit):
    """Whatever hooks them sees what it always saw."""
    x, seen = images(), []
    hook = vit.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out))
    run(vit, x)
    with expedite(vit, 1, grid=(4, 6)):
        run(vit, x)
    hook.remove()
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


def test_the_map_is_rebuilt_only_where_it_is_read(vit):
    x, rebuilt = images(), []
    with expedite(vit, 1, grid=(4, 6)) as handle:
        rebuild = handle.blocks.methods["after_1"].rebuild
        rebuild.register_forward_hook(lambda m, args, out: rebuilt.append(out))
        run(vit, x)
        assert len(rebuilt) == 1
        if hasattr(vit, "forward_intermediates"):
            vit.forward_intermediates(x)
            assert len(rebuilt) == 1 + 3  # any of the blocks after alpha may be asked for


class Halve(nn.Module):
    """Keeps a random half of the tokens, which then lie on no grid."""

    def forward(self, tokens: Tokens, keys=None) -> tuple[Tokens, Tensor]:
        flat = tokens.features.flatten(1, -2)
        count = flat.shape[1]
        kept = torch.randperm(count, generator=torch.Generator().manual_seed(3))[: count // 2]
        kept = kept.sort().values
        # Each token is rebuilt from the kept one whose index is nearest, and counted there.
        nearest = (torch.arange(count)[:, None] - kept).abs().argmin(1)
        sizes = torch.bincount(nearest, minlength=len(kept)).float().expand(len(flat), -1)
        # A second time: the sizes of what is dropped are added.
        if tokens.sizes is not None:
            before = tokens.sizes.flatten(1)
            sizes = torch.zeros_like(sizes).index_add(1, nearest, before)
        return replace(tokens, features=flat[:, kept], sizes=sizes), (nearest, tokens)


class Repeat(nn.Module):
    def forward(self, features: Tensor, record: tuple) -> Tensor:
        nearest, tokens = record
        return features[:, nearest].unflatten(1, tuple(tokens.features.shape[1:-1]))


class Unstructured(Method):
    def __init__(self) -> None:
        super().__init__(None, None)
        self.reduce = Halve()
        self.rebuild = Repeat()


def with_method(vit: nn.Module, methods: dict[int, nn.Module], size_aware: bool = True):
    """What `expedite` does, for methods that have no name."""
    spec = find_transformer(vit)
    blocks = ExpeditedBlocks(spec.blocks, spec.layout(size_aware), methods, spec.outputs)
    spec.attach(vit)
    setattr(spec.owner, spec.attribute, blocks)
    return blocks


@torch.no_grad()
@pytest.mark.parametrize("size_aware", [True, False])
def test_clusters_may_lie_on_no_grid(size_aware):
    vit, x = timm_vit_of_any_size(), images()
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    tokens = vit.blocks[1](vit.blocks[0](tokens))
    prefix, maps = tokens[:, :3], tokens[:, 3:].unflatten(1, SIZE)
    reduced, record = Halve()(Tokens(maps, SIZE, SIZE))
    assert reduced.features.shape == (2, 48, 32) and reduced.sizes.sum() == 2 * 96
    y = torch.cat([prefix, reduced.features], dim=1)
    cluster_sizes = torch.cat([torch.ones(2, 3), reduced.sizes], dim=1)
    mask = cluster_sizes.log()[:, None, None] if size_aware else None
    for block in vit.blocks[2:]:
        y = block(y, attn_mask=mask)
    expected = vit.norm(torch.cat([y[:, :3], y[:, 3:][:, record[0]]], dim=1))

    with_method(vit, {2: Unstructured()}, size_aware)
    assert error(vit.forward_features(x), expected) < 1e-6
    final, (first, last) = vit.forward_intermediates(x, [0, 3], norm=True)
    assert first.shape == (2, 32, *SIZE) and error(final, expected) < 1e-6
    assert error(last.flatten(2).transpose(1, 2), expected[:, 3:]) < 1e-6


def test_clusters_off_the_grid_may_be_reduced_again():
    vit, x, seen = timm_vit_of_any_size(), images(), []
    blocks = with_method(vit, {0: Unstructured(), 2: Unstructured()})
    for method in blocks.methods.values():
        method.reduce.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    maps = vit.forward_intermediates(x, intermediates_only=True)
    assert [m.shape for m in maps] == [(2, 32, *SIZE)] * 4
    assert [tuple(t.features.shape) for t in seen] == [(2, 48, 32), (2, 24, 32)]
    for tokens in seen:
        assert torch.equal(tokens.sizes.sum(1), torch.tensor([96.0, 96.0]))


def test_a_method_outside_the_blocks_is_refused(vit):
    spec = find_transformer(vit)
    for alpha in (-1, 4):
        with pytest.raises(ValueError, match=rf"methods must be at 0 to 3, got \[{alpha}\]"):
            ExpeditedBlocks(spec.blocks, spec.layout(True), {alpha: Unstructured()})


# --- several passes at once ------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"ratio": 0.5}, {"ratio": 0.5, "alpha": (0, 2)}], ids=str)
def test_threads_do_not_mix(vit, settings):
    inputs = [images((8, 6)), images((6, 8)), images((5, 9), batch=1)]
    outputs: dict[int, list[Tensor]] = {index: [] for index in range(len(inputs))}
    with expedite(vit, **({"alpha": 1} | settings)):
        expected = [run(vit, x) for x in inputs]
        start = threading.Barrier(len(inputs))

        def work(index: int) -> None:
            start.wait()
            for _ in range(8):
                outputs[index].append(run(vit, inputs[index]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, results in outputs.items():
        assert len(results) == 8  # no thread died
        for result in results:
            assert error(result, expected[index]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("other", [(8, 12), (12, 8), (6, 7)])
def test_alternating_passes_do_not_mix(vit, other):
    with expedite(vit, (1, 2), ratio=0.5) as handle:
        pairs = [images(), images(other)]
        expected = []
        for x in pairs:
            y = embedded(vit, x)
            for step in handle.blocks:
                y = step(y)
            expected.append(y)
        first = embedded(vit, pairs[0])
        first_steps = iter(handle.blocks)
        second = embedded(vit, pairs[1])
        second_steps = iter(handle.blocks)
        for one, two in zip(first_steps, second_steps, strict=True):
            first, second = one(first), two(second)
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])


@torch.no_grad()
def test_a_pass_within_a_pass_does_not_mix(vit):
    x, other = images(), images((6, 7))
    with expedite(vit, (1, 2), ratio=0.5):
        expected, expected_inner = run(vit, x), run(vit, other)
        inner = []

        def interrupt(module, args, out):
            if not inner:
                inner.append(None)
                inner.append(run(vit, other))

        hook = vit.blocks[0].register_forward_hook(interrupt)
        assert torch.equal(run(vit, x), expected)
        hook.remove()
    assert torch.equal(inner[1], expected_inner)


def test_a_pass_that_failed_leaves_no_state(vit):
    x = images()
    with expedite(vit, 1, grid=(4, 6)):
        expected = run(vit, x)
        with pytest.raises(ValueError):
            run(vit, images((3, 12)))
        assert torch.equal(run(vit, x), expected)


# --- heads that run on the clusters -----------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("alphas,ratio", [(1, 0.5), ((1, 2), 0.7)])
def test_features_rebuilt_by_the_head_are_those_of_the_backbone(vit, alphas, ratio):
    settings = {"alpha": alphas, "ratio": ratio, "residual": False}
    x = images()
    with expedite(vit, **settings) as handle:
        embedding = embedded(vit, x)
        expected = handle.blocks(embedding)
    with expedite(vit, **settings, reconstruct_at="head") as handle:
        reduced, rebuild = run_reduced(handle.blocks, embedded(vit, x))
        prefix = getattr(vit, "num_prefix_tokens", 0)
        features = reduced[:, prefix:] if reduced.dim() == 3 else reduced.flatten(1, 2)
        assert features.shape[1] < SIZE[0] * SIZE[1]
        full = rebuild(features)
        assert full.shape == (2, *SIZE, 32)
        if prefix:
            full = torch.cat([reduced[:, :prefix], full.flatten(1, 2)], dim=1)
        torch.testing.assert_close(full, expected)


@torch.no_grad()
def test_what_is_no_token_is_rebuilt_without_residual():
    """Ones stay ones: the weights of every token sum to one, and nothing is added."""
    vit = timm_vit_of_any_size()
    with expedite(vit, 1, ratio=0.5, residual=True, reconstruct_at="head") as handle:
        reduced, rebuild = run_reduced(handle.blocks, embedded(vit, images()))
        logits = torch.ones(2, reduced.shape[1] - vit.num_prefix_tokens, 7)
        torch.testing.assert_close(rebuild(logits), torch.ones(2, *SIZE, 7))


@torch.no_grad()
def test_blocks_without_expedit_have_nothing_to_rebuild():
    vit = timm_vit_of_any_size()
    embedding = embedded(vit, images())
    x, rebuild = run_reduced(vit.blocks, embedding)
    assert rebuild is None and torch.equal(x, vit.blocks(embedding))


def test_a_model_whose_head_cannot_rebuild_says_so(vit):
    with (
        expedite(vit, 1, ratio=0.5, reconstruct_at="head"),
        pytest.raises(ValueError, match='RECONSTRUCT_AT "head" needs a model whose head'),
    ):
        run(vit, images())


@torch.no_grad()
def test_only_the_outputs_that_are_read_are_rebuilt():
    vit, x = timm_vit_of_any_size(), images()
    read = {"indices": [1, 3], "intermediates_only": True, "output_fmt": "NCHW"}
    with expedite(vit, 1, ratio=0.5):
        expected = vit.forward_intermediates(x, **read)
    rebuilt = []
    with expedite(vit, 1, outputs=(1, 3), ratio=0.5) as handle:
        rebuild = handle.blocks.methods["after_1"].rebuild
        rebuild.register_forward_hook(lambda *args: rebuilt.append(1))
        actual = vit.forward_intermediates(x, **read)
    assert len(rebuilt) == 2
    assert all(map(torch.equal, actual, expected))


def test_parts_keep_their_own_mode():
    model = timm_vit(drop_path_rate=0.5).train()
    model.blocks[0].eval()
    modes = [part.training for part in model.modules()]
    with expedite(model, budget=0.6):
        assert not model.blocks[0].training and model.blocks[1].training
        count_flops(model, images())
        assert not model.blocks[0].training and model.blocks[1].training
    assert [part.training for part in model.modules()] == modes


def test_replicas_of_data_parallel_are_refused():
    model = timm_vit()
    with expedite(model, budget=0.6) as handle:
        with pytest.raises(ValueError, match="nn.DataParallel is not supported"):
            handle.blocks._replicate_for_data_parallel()


def test_hooks_of_the_container_run():
    model, x, seen = timm_vit(), images(), []
    hook = model.blocks.register_forward_hook(lambda blocks, args, out: seen.append(out.shape))
    model.blocks.register_forward_pre_hook(lambda blocks, args: (2 * args[0],))
    expected = model(x)
    with expedite(model, alpha=1, keep=1.0):
        assert error(model(x), expected) < 1e-5
        assert len(seen) == 2 and seen[0] == seen[1]
        hook.remove()
        model(x)
    model(x)
    assert len(seen) == 2


def test_a_refusal_leaves_no_trace():
    model, x = detectron2_vit(), images((12, 12))
    attention = model.blocks[0].attn
    attention.forward = lambda x: 0.5 * type(attention).forward(attention, x)
    before = {name: dict(vars(part)) for name, part in model.named_modules()}
    hooks = [len(part._forward_pre_hooks) for part in model.modules()]
    expected = model(x)["last_feat"]
    with pytest.raises(ValueError, match="block 0 has a forward of its own"):
        expedite(model, alpha=1, keep=0.5, fused_attention=True)
    assert {name: dict(vars(part)) for name, part in model.named_modules()} == before
    assert [len(part._forward_pre_hooks) for part in model.modules()] == hooks
    assert torch.equal(model(x)["last_feat"], expected)


def test_parts_that_run_on_all_tokens_are_said():
    model = timm_vit()
    with expedite(model, alpha=1, keep=0.5) as handle:
        handle.blocks[:2], handle.blocks[1:]
        with pytest.warns(UserWarning, match="blocks 2 to 3 run on all tokens"):
            handle.blocks[2:]
    with expedite(model, alpha=(1, 2), keep=0.5) as handle:
        handle.blocks[2:]
