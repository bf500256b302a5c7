"""Keys that do nothing with a method are refused, wherever they come from."""

from __future__ import annotations

import pytest
from detectron2.config import get_cfg

from expedit_d2 import add_expedit_config, expedite
from expedit_d2.api import expedite_from_node
from expedit_d2.engine import merge_file
from expedit_d2.settings import Settings, describe, parse_setting
from support.repository import ROOT
from support.vits import timm_vit

UNREAD = [
    ({"method": "merge", "keep": 0.5, "window": 3}, "WINDOW 3", "expedit, hard", "merge"),
    ({"keep": 0.5, "scope": "window"}, "SCOPE 'window'", "expedit, hard, pool", "merge"),
    ({"method": "tome", "keep": 0.5, "schedule": "equal"}, "SCHEDULE 'equal'", "merge", "tome"),
    ({"method": "density", "keep": 0.5, "rounds": 3}, "ROUNDS 3", "merge", "density"),
    ({"ratio": 0.5, "rounds": 3}, "ROUNDS 3", "merge", "expedit"),
    ({"method": "pool", "ratio": 0.5, "iterations": 3}, "ITERATIONS 3", "expedit, hard", "pool"),
    ({"method": "hard", "ratio": 0.5, "temperature": 0.1}, "TEMPERATURE 0.1", "expedit", "hard"),
    ({"method": "hard", "ratio": 0.5, "neighbors": 3}, "NEIGHBORS 3", "expedit", "hard"),
    ({"method": "pool", "keep": 0.5}, "KEEP 0.5", "density, merge, tome", "pool"),
]


@pytest.mark.parametrize("settings,key,readers,method", UNREAD, ids=str)
def test_a_key_that_does_nothing_is_refused(settings, key, readers, method):
    words = f"{key} (for METHOD {readers}) would do nothing with METHOD {method}, which reads "
    vit = timm_vit()
    for attempt in (
        lambda: Settings(alpha=1, **settings),
        lambda: expedite(vit, alpha=1, **settings),
        lambda: expedite_from_node(vit, {"ENABLED": True, "ALPHA": 1, **settings}),
        lambda: parse_setting(" ".join(f"{k}={v}" for k, v in {"alpha": 1, **settings}.items())),
    ):
        with pytest.raises(ValueError) as caught:
            attempt()
        assert words in str(caught.value)


@pytest.mark.parametrize("settings,key,readers,method", UNREAD, ids=str)
def test_its_default_is_taken(settings, key, readers, method):
    name = key.split()[0].lower()
    default = getattr(Settings(), name)
    if name != "keep":
        assert getattr(Settings(alpha=1, **(settings | {name: default})), name) == default


def test_a_budget_is_checked_once_its_method_is_known():
    settings = Settings(budget=0.5, iterations=3)  # which method is not known yet
    assert settings.method is None
    with pytest.raises(ValueError, match=r"ITERATIONS 3 .* would do nothing with METHOD merge"):
        expedite(timm_vit(), budget=0.5, iterations=3)
    with expedite(timm_vit(), budget=0.7, method="expedit", iterations=3) as handle:
        assert handle.settings.iterations == 3


def test_the_method_is_checked_first():
    with pytest.raises(ValueError, match="METHOD must be one of .*'merg'"):
        Settings(alpha=-1, method="merg", rounds=0, keep=7.5)


def test_keys_of_a_base_config_are_not_dropped_in_silence():
    """METHOD merge on top of the published operator, as with an override on the command line."""
    cfg = get_cfg()
    add_expedit_config(cfg)
    merge_file(cfg, ROOT / "configs" / "expedit" / "published.yaml")
    cfg.MODEL.EXPEDIT.merge_from_list(["ENABLED", True, "ALPHA", 1, "METHOD", "merge", "KEEP", 0.5])
    with pytest.raises(ValueError, match="would do nothing with METHOD merge") as caught:
        Settings.from_node(cfg.MODEL.EXPEDIT)
    for key in ("SCOPE 'window'", "TEMPERATURE 0.01", "NORMALIZE 'l2'", "NEIGHBOR_WINDOW 0"):
        assert key in str(caught.value)


def test_config_keys_and_defaults_are_those_of_settings():
    cfg = get_cfg()
    add_expedit_config(cfg)
    node = cfg.MODEL.EXPEDIT
    assert node.pop("ENABLED") is False
    assert {key.lower(): value for key, value in node.items()} == {
        **vars(Settings()),
        "method": None,
    }
    for key in node:
        assert f"\n        {key.lower()}: " in Settings.__doc__


@pytest.mark.parametrize("temperature", [None, "auto"])
def test_both_forms_of_the_automatic_temperature_are_one(temperature):
    settings = Settings(alpha=1, ratio=0.5, temperature=temperature)
    assert settings == Settings(alpha=1, ratio=0.5)
    assert describe(settings) == "alpha=1 ratio=0.5"
