"""Overrides of a YAML config: what may be unset, and what may not."""

import pytest

from expedit_d2.engine import merge_overrides
from expedit_d2.projects import load_cfg
from support.repository import VITDET


def test_keys_that_may_be_none_can_be_unset():
    cfg = load_cfg(VITDET, ["MODEL.EXPEDIT.GRID", "(3, 3)", "MODEL.EXPEDIT.ALPHA", "2"])
    merge_overrides(cfg, ["MODEL.EXPEDIT.GRID", "None", "MODEL.EXPEDIT.RATIO", "0.7"])
    assert cfg.MODEL.EXPEDIT.GRID is None and cfg.MODEL.EXPEDIT.RATIO == 0.7


def test_keys_that_need_a_value_cannot():
    with pytest.raises(ValueError, match="MODEL.WEIGHTS must be text"):
        load_cfg(VITDET, ["MODEL.WEIGHTS", "None"])
