"""The mechanism that every family shares: on and off, state, re-entrancy, settings, errors."""

from __future__ import annotations

import copy
import io
import threading
from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from expedit_d2 import expedite
from expedit_d2.adapters import FAMILIES, find_host
from expedit_d2.api import Expedited, expedite_from_node, is_expedited
from expedit_d2.hook import ExpeditedBlocks, run_reduced
from expedit_d2.methods import METHODS
from expedit_d2.settings import OFF_GRID, ON_GRID, Settings
from expedit_d2.spelling import parse_setting
from expedit_d2.tokens import Tokens
from support.vits import PATCH, SIZE, detectron2_vit, embedded, error, images, perturbed

IDENTITY = {"temperature": 1e6, "neighbors": 1}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def timm_vit(**changes) -> VisionTransformer:
    settings = {
        "img_size": (SIZE[0] * PATCH, SIZE[1] * PATCH),
        "patch_size": PATCH,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 4,
        "num_classes": 5,
        "dynamic_img_size": True,
        "reg_tokens": 2,
    }
    return perturbed(VisionTransformer(**(settings | changes)))


@pytest.fixture(params=["timm", "detectron2"])
def vit(request) -> nn.Module:
    return timm_vit() if request.param == "timm" else detectron2_vit()


def run(vit: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = vit(x)
    return out["last_feat"] if isinstance(out, dict) else out


# --- off leaves no trace ---------------------------------------------------------------------


def snapshot(vit: nn.Module) -> list:
    """What must be the same before and after: modules, hooks and modes, by identity."""
    return [
        (
            name,
            id(module),
            list(module._modules),
            list(module._parameters),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            sorted(vars(module)),
        )
        for name, module in vit.named_modules()
    ]


def test_settings_that_reduce_nothing_are_refused(vit):
    before = snapshot(vit)
    for settings in ({}, {"alpha": None}, {"residual": False}):
        with pytest.raises(ValueError, match="neither ALPHA nor BUDGET is set.*RATIO and KEEP"):
            expedite(vit, **settings)
    with pytest.raises(ValueError, match="neither ALPHA nor BUDGET"):
        expedite_from_node(vit, {"ENABLED": True})
    assert snapshot(vit) == before


def test_remove_puts_everything_back(vit):
    x, before = images(), snapshot(vit)
    expected, container = run(vit, x), vit.blocks
    handle = expedite(vit, 1, grid=(4, 6))
    assert is_expedited(vit) and handle.blocks is vit.blocks is not container
    assert error(run(vit, x), expected) > 1e-4
    for _ in range(2):
        handle.remove()
        assert vit.blocks is container and snapshot(vit) == before
        assert torch.equal(run(vit, x), expected)
    assert not is_expedited(vit)


def test_an_old_handle_does_not_undo_a_newer_one(vit):
    old = expedite(vit, 1, grid=(4, 6))
    old.remove()
    with expedite(vit, 2, grid=(4, 6)) as new:
        old.remove()
        assert vit.blocks is new.blocks


def test_leaving_the_context_puts_everything_back(vit):
    x, before = images(), snapshot(vit)
    expected = run(vit, x)
    with expedite(vit, 1, grid=(4, 6)) as handle:
        assert isinstance(handle, Expedited)
        assert error(run(vit, x), expected) > 1e-4
    assert snapshot(vit) == before
    assert torch.equal(run(vit, x), expected)


def test_leaving_the_context_by_an_exception_too(vit):
    x, before = images(), snapshot(vit)
    expected = run(vit, x)
    with pytest.raises(RuntimeError, match="within"), expedite(vit, 1, grid=(4, 6)):
        raise RuntimeError("within")
    with pytest.raises(ValueError, match="GRID"), expedite(vit, 1, grid=(9, 13)):
        run(vit, x)  # from inside a block
    assert snapshot(vit) == before
    assert torch.equal(run(vit, x), expected)


@pytest.mark.parametrize("settings", [{"alpha": 4}, {"alpha": 1, "method": "x"}], ids=str)
def test_a_refusal_leaves_no_trace(vit, settings):
    before = snapshot(vit)
    with pytest.raises(ValueError):
        expedite(vit, grid=(4, 6), **settings)
    assert snapshot(vit) == before


def test_mode_set_meanwhile_is_kept(vit):
    vit.train()
    handle = expedite(vit, 1, grid=(4, 6))
    assert all(module.training for module in vit.modules())
    vit.eval()
    assert not any(module.training for module in vit.modules())
    handle.remove()
    assert not any(module.training for module in vit.modules())


def same_state(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_state_dict_and_parameters_are_the_same_throughout(vit):
    def state() -> dict:
        return {key: value.clone() for key, value in vit.state_dict().items()}

    before = state()
    parameters = [(name, id(p)) for name, p in vit.named_parameters()]
    with expedite(vit, (1, 2), grid=(4, 6)):
        assert same_state(state(), before)
        assert [(name, id(p)) for name, p in vit.named_parameters()] == parameters
        run(vit, images())
        assert same_state(state(), before)
    assert same_state(state(), before)


def test_weights_can_be_loaded_while_expedited(vit):
    other = copy.deepcopy(vit)
    perturbed(other)
    x = images()
    with expedite(other, 1, grid=(4, 6)):
        expected = run(other, x)
        saved = {key: value.clone() for key, value in other.state_dict().items()}
    with expedite(vit, 1, grid=(4, 6)):
        assert error(run(vit, x), expected) > 1e-4
        result = vit.load_state_dict(saved, strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        assert torch.equal(run(vit, x), expected)
    assert torch.equal(run(vit, x), run(other, x))


def test_an_expedited_model_can_be_copied(vit):
    x = images()
    plain = run(vit, x)
    with expedite(vit, 1, grid=(4, 6)):
        expected = run(vit, x)
        twin = copy.deepcopy(vit)
        assert is_expedited(twin) and torch.equal(run(twin, x), expected)
    # They share nothing: the first one is off now, the twin is not.
    assert torch.equal(run(vit, x), plain)
    assert torch.equal(run(twin, x), expected)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    assert torch.equal(run(twin, x), expected)


def test_a_copy_of_an_expedited_model_follows_its_own_patch_size():
    vit = timm_vit()
    with expedite(vit, 1, ratio=0.5):
        twin = copy.deepcopy(vit)
        twin.set_input_size(patch_size=(2 * PATCH, 2 * PATCH))
        assert run(twin, images()).shape == (2, 5)


def test_an_expedited_model_can_be_pickled(vit):
    x, file = images(), io.BytesIO()
    with expedite(vit, 1, grid=(4, 6)):
        expected = run(vit, x)
        torch.save(vit, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert is_expedited(loaded)
    assert torch.equal(run(loaded, x), expected)


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
        # A second time: the votes of what is dropped go along.
        if tokens.sizes is not None:
            before = tokens.sizes.flatten(1)
            sizes = torch.zeros_like(sizes).index_add(1, nearest, before)
        return replace(tokens, features=flat[:, kept], sizes=sizes), (nearest, tokens)


class Repeat(nn.Module):
    def forward(self, features: Tensor, record: tuple) -> Tensor:
        nearest, tokens = record
        return features[:, nearest].unflatten(1, tuple(tokens.features.shape[1:-1]))


class OffGrid(nn.Module):
    inside = False

    def __init__(self) -> None:
        super().__init__()
        self.reduce = Halve()
        self.rebuild = Repeat()


def with_method(vit: nn.Module, methods: dict[int, nn.Module], size_aware: bool = True):
    """What `expedite` does, for methods that have no name."""
    host = find_host(vit)
    blocks = ExpeditedBlocks(host.blocks, host.layout(size_aware), methods, host.outputs)
    host.attach(vit)
    setattr(host.owner, host.attribute, blocks)
    return blocks


@torch.no_grad()
@pytest.mark.parametrize("size_aware", [True, False])
def test_clusters_may_lie_on_no_grid(size_aware):
    vit, x = timm_vit(), images()
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    tokens = vit.blocks[1](vit.blocks[0](tokens))
    prefix, maps = tokens[:, :3], tokens[:, 3:].unflatten(1, SIZE)
    reduced, record = Halve()(Tokens(maps, SIZE, SIZE))
    assert reduced.features.shape == (2, 48, 32) and reduced.sizes.sum() == 2 * 96
    y = torch.cat([prefix, reduced.features], dim=1)
    votes = torch.cat([torch.ones(2, 3), reduced.sizes], dim=1)
    mask = votes.log()[:, None, None] if size_aware else None
    for block in vit.blocks[2:]:
        y = block(y, attn_mask=mask)
    expected = vit.norm(torch.cat([y[:, :3], y[:, 3:][:, record[0]]], dim=1))

    with_method(vit, {2: OffGrid()}, size_aware)
    assert error(vit.forward_features(x), expected) < 1e-6
    final, (first, last) = vit.forward_intermediates(x, [0, 3], norm=True)
    assert first.shape == (2, 32, *SIZE) and error(final, expected) < 1e-6
    assert error(last.flatten(2).transpose(1, 2), expected[:, 3:]) < 1e-6


def test_clusters_off_the_grid_may_be_reduced_again():
    vit, x, seen = timm_vit(), images(), []
    blocks = with_method(vit, {0: OffGrid(), 2: OffGrid()})
    for method in blocks.methods.values():
        method.reduce.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    maps = vit.forward_intermediates(x, intermediates_only=True)
    assert [m.shape for m in maps] == [(2, 32, *SIZE)] * 4
    assert [tuple(t.features.shape) for t in seen] == [(2, 48, 32), (2, 24, 32)]
    for tokens in seen:
        assert torch.equal(tokens.sizes.sum(1), torch.tensor([96.0, 96.0]))


def test_a_method_outside_the_blocks_is_refused(vit):
    host = find_host(vit)
    for alpha in (-1, 4):
        with pytest.raises(ValueError, match=f"ALPHA must be in 0 to 3 .* got {alpha}"):
            ExpeditedBlocks(host.blocks, host.layout(True), {alpha: OffGrid()})


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


# --- which models ----------------------------------------------------------------------------


def test_unsupported_models_are_refused_by_name():
    with pytest.raises(ValueError) as caught:
        find_host(nn.Sequential(nn.Linear(2, 2)))
    assert "Sequential" in str(caught.value)
    for family in FAMILIES:
        assert family.FAMILY in str(caught.value)
    with pytest.raises(ValueError, match="supported"):
        expedite(nn.Linear(2, 2), 1, grid=(2, 2))


def test_two_transformers_are_refused_by_name():
    model = nn.ModuleDict({"image": timm_vit(), "teacher": detectron2_vit()})
    with pytest.raises(ValueError, match="image, teacher"):
        expedite(model, 1, grid=(2, 2))
    with expedite(model["teacher"], 1, grid=(2, 2)):
        assert is_expedited(model) and not is_expedited(model["image"])


def test_a_transformer_anywhere_in_the_model_is_found(vit):
    model = nn.ModuleDict({"neck": nn.Linear(2, 2), "backbone": nn.Sequential(vit)})
    x = images()
    plain = run(vit, x)
    with expedite(model, 1, grid=(4, 6)) as handle:
        assert vit.blocks is handle.blocks
        assert error(run(vit, x), plain) > 1e-4
    assert torch.equal(run(vit, x), plain)


def test_one_transformer_under_two_names_is_one(vit):
    model = nn.ModuleDict({"a": vit, "b": vit})
    with expedite(model, 1, grid=(4, 6)) as handle:
        assert vit.blocks is handle.blocks


def test_subclasses_are_supported():
    class Mine(VisionTransformer):
        pass

    vit = Mine(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    with expedite(vit.eval(), 1, grid=(2, 2)):
        assert run(vit, torch.randn(1, 3, 16, 16)).shape == (1, 3)


def test_other_classes_of_that_name_are_not():
    class VisionTransformer(nn.Module):
        blocks = nn.ModuleList()

    with pytest.raises(ValueError, match="supported"):
        find_host(VisionTransformer())


def test_expediting_twice_is_refused(vit):
    model = nn.Sequential(vit)
    with expedite(vit, 1, grid=(4, 6)) as handle:
        for target in (vit, model):
            with pytest.raises(ValueError, match="already expedited"):
                expedite(target, 2, grid=(4, 6))
        assert vit.blocks is handle.blocks
    with expedite(vit, 2, grid=(4, 6)):
        assert is_expedited(model)


# --- settings --------------------------------------------------------------------------------

WRONG = [
    # settings, key, value as the message shows it, a word on what is valid
    ({"alpha": 4}, "ALPHA", "4", "0 to 3"),
    ({"alpha": (1, 4)}, "ALPHA", "4", "0 to 3"),
    ({"alpha": -1}, "ALPHA", "-1", "0 to depth - 1"),
    ({"alpha": True}, "ALPHA", "True", "number of blocks"),
    ({"alpha": 1.0}, "ALPHA", "1.0", "number of blocks"),
    ({"alpha": "1"}, "ALPHA", "'1'", "number of blocks"),
    ({"alpha": (0, -2)}, "ALPHA", "(0, -2)", "number of blocks"),
    ({"alpha": (1, 2, 1)}, "ALPHA", "(1, 2, 1)", "twice"),
    ({"grid": None}, "GRID", "None", "exactly one of GRID and RATIO"),
    ({"ratio": 0.5}, "RATIO", "0.5", "exactly one of GRID and RATIO"),
    ({"grid": (0, 4)}, "GRID", "(0, 4)", "positive integers (h, w)"),
    ({"grid": (4,)}, "GRID", "(4,)", "(h, w)"),
    ({"grid": 4}, "GRID", "4", "(h, w)"),
    ({"grid": (4.0, 4)}, "GRID", "(4.0, 4)", "(h, w)"),
    ({"grid": None, "ratio": 0}, "RATIO", "0", "(0, 1]"),
    ({"grid": None, "ratio": 1.5}, "RATIO", "1.5", "(0, 1]"),
    ({"grid": None, "ratio": -0.5}, "RATIO", "-0.5", "(0, 1]"),
    ({"grid": None, "ratio": "0.5"}, "RATIO", "'0.5'", "(0, 1]"),
    ({"grid": None, "ratio": True}, "RATIO", "True", "(0, 1]"),
    ({"grid": None, "ratio": float("nan")}, "RATIO", "nan", "(0, 1]"),
    ({"scope": "x"}, "SCOPE", "'x'", "('map', 'window')"),
    ({"scope": None}, "SCOPE", "None", "('map', 'window')"),
    ({"method": "x"}, "METHOD", "'x'", "expedit"),
    ({"iterations": 0}, "ITERATIONS", "0", "positive integer"),
    ({"iterations": 2.0}, "ITERATIONS", "2.0", "positive integer"),
    ({"iterations": True}, "ITERATIONS", "True", "positive integer"),
    ({"temperature": 0}, "TEMPERATURE", "0", "positive finite number"),
    ({"temperature": -1.0}, "TEMPERATURE", "-1.0", "positive finite number"),
    ({"temperature": float("inf")}, "TEMPERATURE", "inf", "positive finite number"),
    ({"temperature": float("nan")}, "TEMPERATURE", "nan", "positive finite number"),
    ({"temperature": "high"}, "TEMPERATURE", "'high'", '"auto"'),
    ({"window": 4}, "WINDOW", "4", "odd"),
    ({"window": 0}, "WINDOW", "0", "positive odd"),
    ({"window": -3}, "WINDOW", "-3", "positive odd"),
    ({"window": 3.0}, "WINDOW", "3.0", "integer"),
    ({"neighbors": 0}, "NEIGHBORS", "0", "positive integer"),
    ({"neighbors": True}, "NEIGHBORS", "True", "positive integer"),
    ({"neighbor_window": 4}, "NEIGHBOR_WINDOW", "4", "odd"),
    ({"neighbor_window": -1}, "NEIGHBOR_WINDOW", "-1", "odd"),
    ({"neighbor_window": None}, "NEIGHBOR_WINDOW", "None", "odd"),
    ({"neighbor_window": False}, "NEIGHBOR_WINDOW", "False", "odd"),
    ({"method": "exepdit", "grid": None}, "METHOD", "'exepdit'", "expedit"),
    ({"method": "mereg", "keep": 0.5}, "METHOD", "'mereg'", "merge"),
    ({"method": 1}, "METHOD", "1", "expedit"),
    ({"alpha": ()}, "ALPHA", "()", "number of blocks"),
    ({"alpha": None}, "GRID", "(4, 4)", "ALPHA"),
    ({"alpha": None, "grid": None, "ratio": 0.5}, "RATIO", "0.5", "ALPHA"),
    ({"alpha": None, "grid": None, "keep": 0.5}, "KEEP", "0.5", "ALPHA"),
    ({"alpha": (0, 2), "grid": None, "keep": (0.3, 0.8)}, "KEEP", "(0.3, 0.8)", "not grow"),
    ({"residual": "no"}, "RESIDUAL", "'no'", "True or False"),
    ({"residual": 0}, "RESIDUAL", "0", "True or False"),
    ({"size_aware": "off"}, "SIZE_AWARE", "'off'", "True or False"),
    ({"fused_attention": "yes"}, "FUSED_ATTENTION", "'yes'", "True or False"),
    ({"schedule": 1}, "SCHEDULE", "1", "falling"),
    ({"rounds": 1.0}, "ROUNDS", "1.0", "positive integer"),
    ({"reconstruct_at": True}, "RECONSTRUCT_AT", "True", "backbone"),
    ({"scope": ["map"]}, "SCOPE", "['map']", "('map', 'window')"),
    ({"outputs": [99]}, "outputs", "[99]", "0 to 3"),
    ({"outputs": [-1]}, "outputs", "[-1]", "0 to 3"),
    ({"outputs": 3}, "outputs", "3", "0 to 3"),
    ({"outputs": []}, "outputs", "[]", "0 to 3"),
    ({"outputs": [True]}, "outputs", "[True]", "0 to 3"),
    ({"positions": "x"}, "POSITIONS", "'x'", "('clusters', 'grid')"),
    ({"positions": None}, "POSITIONS", "None", "('clusters', 'grid')"),
    ({"normalize": "l3"}, "NORMALIZE", "'l3'", "('l1', 'l2')"),
]


@pytest.mark.parametrize("changes,key,value,valid", WRONG, ids=lambda v: str(v)[:40])
def test_wrong_settings_are_named(changes, key, value, valid):
    vit = detectron2_vit()
    with pytest.raises(ValueError) as caught:
        expedite(vit, **({"alpha": 1, "grid": (4, 4)} | changes))
    message = str(caught.value)
    assert key in message and value in message and valid in message
    assert not is_expedited(vit)


def test_unknown_settings_are_named(vit):
    with pytest.raises(TypeError, match="'gird'; did you mean 'grid'"):
        expedite(vit, 1, gird=(4, 4))
    with pytest.raises(TypeError, match="no setting 'xyz'; the keys are .*'alpha'"):
        expedite(vit, 1, xyz=1)
    with pytest.raises(ValueError, match="'gird'.*'grid'"):
        expedite_from_node(vit, {"ENABLED": True, "ALPHA": 1, "GIRD": (4, 4)})


def test_grid_larger_than_what_it_covers(vit):
    with pytest.raises(ValueError, match=r"GRID .* 8 x 12 tokens of the map, got \(9, 6\)"):
        with expedite(vit, 1, grid=(9, 6)):
            run(vit, images())
    with pytest.raises(ValueError, match=r"GRID .* 5 x 5 tokens of the window, got \(6, 2\)"):
        expedite(detectron2_vit(), 1, grid=(6, 2), scope="window")


def test_scope_window_needs_window_attention():
    for model in (timm_vit(), detectron2_vit(window_block_indexes=())):
        with pytest.raises(ValueError, match='SCOPE "window" needs'):
            expedite(model, 1, grid=(2, 2), scope="window")


def test_settings_take_what_yaml_gives():
    settings = Settings(alpha=[0, 2], grid=[4, 6], temperature=None)
    assert settings.alpha == settings.alphas == (0, 2)
    assert settings.grid == (4, 6) and settings.temperature == "auto"
    assert Settings().alphas == () and Settings(alpha=3, ratio=1).alphas == (3,)
    hash(settings)


def test_counts_belong_to_the_alphas_they_are_written_with():
    assert Settings(alpha=(2, 0), keep=(0.3, 0.8)) == Settings(alpha=(0, 2), keep=(0.8, 0.3))
    assert Settings(alpha=[2, 0, 1], keep=[20, 90, 0.5]).keep == (90, 0.5, 20)
    seen = {}
    vit = timm_vit()
    with expedite(vit, (2, 0), keep=(0.25, 0.75)) as handle:
        for name, method in handle.blocks.methods.items():
            method.reduce.register_forward_hook(
                lambda m, args, out, name=name: seen.update({name: out[0].features.shape[1]})
            )
        run(vit, images())
    assert seen == {"after_0": 72, "after_2": 24}


@pytest.mark.parametrize("enabled", ["no", "False", 0, 1, None])
def test_enabled_is_true_or_false(vit, enabled):
    node = {"ENABLED": enabled, "ALPHA": 1, "GRID": [4, 6]}
    with pytest.raises(ValueError, match="ENABLED must be True or False, got"):
        expedite_from_node(vit, node)


def test_counts_without_an_alpha_are_refused_in_a_node(vit):
    for key, value in (("GRID", [4, 6]), ("RATIO", 0.7), ("KEEP", 0.5)):
        with pytest.raises(ValueError, match=f"{key} .* needs ALPHA"):
            expedite_from_node(vit, {"ENABLED": True, "ALPHA": None, "BUDGET": None, key: value})
        assert expedite_from_node(vit, {"ENABLED": False, "ALPHA": None, key: value}) is None


def test_the_names_of_methods_are_those_of_the_settings():
    assert sorted(METHODS) == sorted(ON_GRID + OFF_GRID)


def test_a_handle_tells_what_it_does(vit):
    name = type(vit).__name__
    handle = expedite(vit, (2, 1), grid=(4, 6), residual=False)
    text = f"Expedited({name}: method=expedit alpha=1,2 grid=4x6 residual=false, 4 blocks"
    assert repr(handle) == text + ")"
    handle.remove()
    assert repr(handle) == text + ", removed)"
    with expedite(vit, fused_attention=True) as handle:
        assert repr(handle) == f"Expedited({name}: fused_attention=true)"


def test_what_a_budget_chose_is_logged_as_a_line_to_paste(vit, caplog):
    with caplog.at_level("INFO", "expedit_d2"), expedite(vit, budget=0.8) as handle:
        pass
    (line,) = caplog.messages
    asked, chosen = line.removeprefix(f"{type(vit).__name__}: ").split(" -> ")
    assert asked == "budget=0.8"
    assert parse_setting(chosen) == (chosen, handle.settings)


def test_grid_for_a_map():
    assert Settings(alpha=0, grid=(4, 6)).grid_for(4, 6) == (4, 6)
    halves = Settings(alpha=0, ratio=0.5)
    assert halves.grid_for(10, 7) == (5, 4) and halves.grid_for(1, 1) == (1, 1)
    assert Settings(alpha=0, ratio=1).grid_for(10, 7) == (10, 7)


def test_nodes_in_any_case(vit):
    x = images()
    with expedite(vit, 1, grid=(4, 6), neighbors=3):
        expected = run(vit, x)
    for node in (
        {"ENABLED": True, "ALPHA": 1, "GRID": [4, 6], "NEIGHBORS": 3, "TEMPERATURE": None},
        {"alpha": 1, "grid": (4, 6), "neighbors": 3},
    ):
        handle = expedite_from_node(vit, node)
        assert torch.equal(run(vit, x), expected)
        assert expedite_from_node(vit, node) is None  # already is
        handle.remove()
    assert expedite_from_node(vit, {"ENABLED": False, "ALPHA": 1, "GRID": [4, 6]}) is None
    assert not is_expedited(vit)


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
    vit = timm_vit()
    with expedite(vit, 1, ratio=0.5, residual=True, reconstruct_at="head") as handle:
        reduced, rebuild = run_reduced(handle.blocks, embedded(vit, images()))
        logits = torch.ones(2, reduced.shape[1] - vit.num_prefix_tokens, 7)
        torch.testing.assert_close(rebuild(logits), torch.ones(2, *SIZE, 7))


@torch.no_grad()
def test_blocks_without_expedit_have_nothing_to_rebuild():
    vit = timm_vit()
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
    vit, x = timm_vit(), images()
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
