"""Settings: what they take, what they refuse, and in which words."""

from __future__ import annotations

import pytest
import torch

from expedit_d2 import expedite
from expedit_d2.api import expedite_from_node, is_expedited
from expedit_d2.settings import Settings, parse_setting
from support.vits import detectron2_vit, images, run, timm_vit_of_any_size

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
    for model in (timm_vit_of_any_size(), detectron2_vit(window_block_indexes=())):
        with pytest.raises(ValueError, match='SCOPE "window" needs'):
            expedite(model, 1, grid=(2, 2), scope="window")


def test_settings_take_what_yaml_gives():
    settings = Settings(alpha=[0, 2], grid=[4, 6], temperature=None)
    assert settings.alpha == settings.alphas == (0, 2)
    assert settings.grid == (4, 6)
    assert settings == Settings(alpha=(0, 2), grid=(4, 6), temperature="auto")
    assert Settings().alphas == () and Settings(alpha=3, ratio=1).alphas == (3,)
    hash(settings)


def test_counts_belong_to_the_alphas_they_are_written_with():
    assert Settings(alpha=(2, 0), keep=(0.3, 0.8)) == Settings(alpha=(0, 2), keep=(0.8, 0.3))
    assert Settings(alpha=[2, 0, 1], keep=[20, 90, 0.5]).keep == (90, 0.5, 20)
    seen = {}
    vit = timm_vit_of_any_size()
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
    assert parse_setting(chosen)[1] == handle.settings
    assert all(f" {key}=" in f" {chosen}" for key in ("method", "alpha", "keep"))


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
        with pytest.raises(ValueError, match="already expedited"):
            expedite_from_node(vit, node)
        handle.remove()
    assert expedite_from_node(vit, {"ENABLED": False, "ALPHA": 1, "GRID": [4, 6]}) is None
    assert not is_expedited(vit)
