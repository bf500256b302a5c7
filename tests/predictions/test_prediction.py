"""A kind of prediction that is added in one file: tables, report and pictures have it."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from torch import nn

from expedit_d2.comparison import Comparison, Options, Workload, compare, to_csv, to_markdown
from expedit_d2.comparison.session import expedited_copy
from expedit_d2.comparison.tables import to_terminal
from expedit_d2.engine import import_modules
from expedit_d2.predictions import PREDICTIONS, Prediction, lower_is_better, register_prediction
from expedit_d2.report import write_report
from expedit_d2.settings import Settings
from expedit_d2.visualize import side_by_side
from support.vits import timm_vit

# All that a kind needs: its record, its agreement, its picture and its metric.
KIND = '''
import numpy as np
from detectron2.evaluation import DatasetEvaluator

from expedit_d2.predictions import Metric, Prediction, register_prediction


@register_prediction
class Signs(Prediction):
    key = "signs_of_pixels"
    name = "signs"
    metrics = (Metric("signs", "wrong", "wrong signs", lower_is_better=True),)

    def keep(self, output):
        return {"signs": (output > 0).numpy()}

    def terms(self, mine, plain):
        same = mine["signs"] == plain["signs"]
        return np.array([same.sum(), same.size])

    def draw(self, image, output, metadata):
        return np.where((output > 0).numpy()[..., None], image, 0).astype(np.uint8)

    def differ(self, plain, other):
        return ((plain > 0) != (other > 0)).numpy()


class SignEvaluator(DatasetEvaluator):
    """How many percent of the pixels have not the sign of the label."""

    def reset(self):
        self.wrong = []

    def process(self, inputs, outputs):
        for item, output in zip(inputs, outputs):
            self.wrong.append(((output["signs_of_pixels"] > 0) != item["label"]).float().mean())

    def evaluate(self):
        return {"signs": {"wrong": 100 * float(np.mean(self.wrong))}}
'''
SETTINGS = Settings(alpha=1, grid=(2, 3))


class _SignModel(nn.Module):
    """A ViT, and one number for each of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = timm_vit()
        self.head = nn.Linear(32, 1)
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1))
        self.register_buffer("pixel_std", torch.ones(3, 1, 1))

    def forward(self, inputs):
        images = torch.stack([x["image"] for x in inputs]).float() / 255
        tokens = self.vit.forward_features(images)[:, 1:]
        scores = self.head(tokens).squeeze(-1).unflatten(1, (8, 12))
        scores = scores - scores.mean((1, 2), keepdim=True)
        planes = scores.repeat_interleave(4, 1).repeat_interleave(4, 2)
        return [{"signs_of_pixels": plane} for plane in planes]


@pytest.fixture
def signs(tmp_path, monkeypatch):
    """The module with the kind, imported as the tools do."""
    (tmp_path / "my_signs.py").write_text(KIND)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = dict(PREDICTIONS)
    import_modules(["my_signs"])
    yield sys.modules["my_signs"]
    del sys.modules["my_signs"]
    PREDICTIONS.clear()
    PREDICTIONS.update(known)


@pytest.fixture
def workload(signs):
    torch.manual_seed(0)
    items = [
        {
            "image": torch.randint(256, (3, 32, 48), dtype=torch.uint8),
            "image_id": index,
            "label": torch.rand(32, 48) > 0.5,
            "height": 32,
            "width": 48,
        }
        for index in range(3)
    ]
    return Workload(
        name="signs",
        model=_SignModel().eval(),
        dataset="random",
        loader=[[item] for item in items],
        make_evaluator=signs.SignEvaluator,
    )


def test_tables_and_report_have_a_new_kind(workload, tmp_path):
    comparison = compare(workload, {"few": SETTINGS}, Options(timed_images=0, progress=False))
    plain, few = comparison.rows
    with torch.no_grad():
        models = (workload.model, expedited_copy(workload.model, SETTINGS))
        maps = [
            torch.stack([m(batch)[0]["signs_of_pixels"] > 0 for batch in workload.loader])
            for m in models
        ]
    labels = torch.stack([item["label"] for (item,) in workload.loader])
    agreement = 100 * (maps[0] == maps[1]).double().mean().item()
    assert 50 < agreement < 100
    assert few.agreement == {"signs": pytest.approx(agreement)}
    wrong = [100 * (found != labels).double().mean().item() for found in maps]
    assert plain.metrics == {"wrong signs": pytest.approx(wrong[0])}
    # Less is better.
    kept = 100 * wrong[0] / wrong[1]
    assert comparison.retained(few, "wrong signs") == pytest.approx(kept)

    for text in (to_terminal(comparison), to_markdown(comparison)):
        assert "wrong signs" in text and f"{wrong[1]:.2f}" in text and f"{kept:.1f} %" in text
        assert f"{agreement:.1f}" in text
    _, line = csv.DictReader(io.StringIO(to_csv(comparison)))
    assert float(line["wrong signs"]) == pytest.approx(wrong[1])
    assert float(line["wrong signs kept"]) == pytest.approx(kept)
    assert float(line["agreement, signs"]) == pytest.approx(agreement)
    assert (
        json.loads(comparison.to_json())["rows"][1]["agreement"]["signs"] == few.agreement["signs"]
    )
    assert Comparison.from_json(comparison.to_json()) == comparison
    page = write_report([comparison], [], tmp_path / "report.html").read_text()
    assert "wrong signs" in page and "agree, signs" in page


def test_pictures_have_a_new_kind(workload):
    (item,) = workload.loader[0]
    (row,) = side_by_side(workload.model, SETTINGS, item, Metadata(), "RGB")
    assert list(row)[2:4] == ["signs, plain", "signs, expedit"]
    with torch.no_grad():
        positive = (workload.model([item])[0]["signs_of_pixels"] > 0).numpy()
    assert np.array_equal(row["signs, plain"].any(-1), positive & row["image"].any(-1))


def test_results_depend_on_the_file_of_a_kind(workload, signs):
    before = workload.fingerprint
    file = Path(signs.__file__)
    file.write_text(file.read_text() + "\nCHANGED = True\n")
    assert replace(workload).fingerprint != before


def test_a_kind_shares_nothing_with_others(signs):
    assert lower_is_better("wrong signs") and not lower_is_better("mIoU")
    with pytest.raises(ValueError, match="shares a key, name or metric with 'signs'"):
        register_prediction(signs.Signs)
    with pytest.raises(TypeError):  # it does not say how it is drawn
        register_prediction(type("Half", (Prediction,), {"key": "half", "name": "half"}))
