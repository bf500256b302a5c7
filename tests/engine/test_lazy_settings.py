"""The ``expedit`` node of a LazyConfig is taken as written or refused, as ``MODEL.EXPEDIT`` is."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import instantiate

from expedit_d2.api import is_expedited
from expedit_d2.engine import load_lazy_config, load_lazy_model

CONFIG = """
from detectron2.config import LazyCall as L
from detectron2.modeling import ViT

model = L(ViT)(img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2)
train = dict(device="cpu", init_checkpoint="")
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "vit.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ratio=0.7"], "RATIO 0.7 needs ALPHA"),
        (["grid=[4,4]"], r"GRID \(4, 4\) needs ALPHA"),
        ([], "neither ALPHA nor BUDGET is set"),
        (["alpha=1", "ratio=0.7", "residual=no"], "RESIDUAL must be True or False, got 'no'"),
        (["alpha=1", "ratio=0.7", "enabled=yes"], "ENABLED must be True or False, got 'yes'"),
        (["alpha=1", "ratio=0.7", "method=exepdit"], "METHOD must be one of .*'exepdit'"),
    ],
    ids=str,
)
def test_settings_that_are_wrong(config, overrides, message):
    overrides = [f"expedit.{override}" for override in ["enabled=True", *overrides]]
    with pytest.raises(ValueError, match=message):
        load_lazy_model(load_lazy_config(config, overrides))


def test_settings_that_are_right(config, tmp_path):
    weights = tmp_path / "vit.pth"
    torch.save(instantiate(load_lazy_config(config, []).model).state_dict(), weights)
    overrides = [f"train.init_checkpoint={weights}", "expedit.alpha=1", "expedit.ratio=0.7"]
    assert not is_expedited(load_lazy_model(load_lazy_config(config, overrides)))
    overrides.append("expedit.enabled=True")
    assert is_expedited(load_lazy_model(load_lazy_config(config, overrides)))
