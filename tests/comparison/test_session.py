"""Measuring: results of a real detector, what is stored, and going on after an interruption."""

import copy
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from torch import nn

from expedit_d2.cli.workloads import load_workload
from expedit_d2.comparison import (
    Comparison,
    Options,
    Store,
    compare,
    register_images,
    share_weights,
    to_csv,
    to_markdown,
)
from expedit_d2.comparison import session as session_module
from expedit_d2.comparison.origin import data_digest
from expedit_d2.projects import load_cfg
from expedit_d2.settings import Settings
from support.repository import VITDET

pytestmark = pytest.mark.slow

QUIET = Options(timed_images=0, progress=False)
SETTINGS = {
    # As many clusters as tokens and no softness: nothing may change.
    "same": Settings(alpha=1, grid=(8, 8), temperature=1e6),
    "half": Settings(alpha=1, ratio=0.5),
}


@pytest.fixture
def workload(confident_opts):
    return load_workload(VITDET, confident_opts)


@pytest.fixture
def forwards(monkeypatch):
    """Every forward of a detector, as the class of its backbone's blocks."""
    from detectron2.modeling import GeneralizedRCNN

    seen = []
    original = GeneralizedRCNN.forward

    def forward(self, *args):
        seen.append(type(self.backbone.net.blocks).__name__)
        return original(self, *args)

    monkeypatch.setattr(GeneralizedRCNN, "forward", forward)
    return seen


def test_shared_copy_has_the_same_tensors_and_its_own_modules():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    twin = share_weights(model)
    assert twin is not model and twin[0] is not model[0]
    for mine, theirs in zip(twin.state_dict().values(), model.state_dict().values(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()


def test_comparison_of_a_real_detector(workload):
    before = copy.deepcopy(workload.model.state_dict())
    options = Options(timed_images=2, batch=3, progress=False)
    comparison = compare(workload, SETTINGS, options)
    plain, same, half = comparison.rows
    assert [r.name for r in comparison.rows] == ["plain", "same", "half"]
    assert [r.settings for r in comparison.rows] == [None, *SETTINGS.values()]
    assert (comparison.model, comparison.images) == ("vitdet", 4)
    assert set(plain.metrics) == {"box AP", "mask AP"}
    assert plain.agreement == same.agreement == {"instances": 100.0}
    assert same.metrics == pytest.approx(plain.metrics)
    assert half.flops.total < plain.flops.total and half.flops.clustering > 0
    assert plain.parameters == sum(p.numel() for p in workload.model.parameters())
    for row in comparison.rows:
        assert row.latency.median > 0 and row.baseline.median > 0 and row.throughput > 0
        assert row.peak_memory > 64 * 64 * 4
    assert 0 < plain.launches < half.launches
    assert comparison.speedup(plain) == comparison.batched_speedup(plain) == 1.0
    now = comparison.conditions
    assert (now.timed_images, now.batch, now.threads) == (2, 3, torch.get_num_threads())
    assert Comparison.from_json(comparison.to_json()) == comparison
    after = workload.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_half_precision_runs_by_autocast(workload):
    plain = compare(workload, {}, QUIET).plain
    options = replace(QUIET, dtype="bfloat16")
    store = Store(None)
    compare(workload, {}, QUIET, store)
    mixed = compare(workload, {}, options, store)
    assert len(store.results) == 2  # none taken for the other
    assert mixed.conditions.dtype == "bfloat16"
    assert mixed.plain.flops == plain.flops


def test_nothing_finished_is_run_again(workload, tiny_opts, tmp_path, forwards):
    options = Options(timed_images=2, batch=2, progress=False)
    first = compare(workload, SETTINGS, options, Store(tmp_path / "store"))
    assert len(forwards) > 4 * 3
    lines = (tmp_path / "store" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [
        f"vitdet: {name}, {kind}"
        for name in ("plain", "same", "half")
        for kind in ("quality", "speed")
    ]
    # As a new process would: everything from the files.
    forwards.clear()
    again = load_workload(VITDET, [*tiny_opts, "OUTPUT_DIR", str(tmp_path / "elsewhere")])
    second = compare(again, SETTINGS, options, Store(tmp_path / "store"))
    assert forwards == []
    assert second.rows == first.rows
    # Of a further setting only itself; the plain model's outputs are kept.
    more = {**SETTINGS, "more": Settings(alpha=2, ratio=0.5)}
    compare(again, more, QUIET, Store(tmp_path / "store"))
    assert set(forwards) == {"ExpeditedBlocks"}
    # The name of a setting is none of its values.
    forwards.clear()
    compare(again, {"renamed": SETTINGS["half"]}, QUIET, Store(tmp_path / "store"))
    assert forwards == []


def test_timed_together_the_plain_model_runs_once_a_round(workload, tmp_path, forwards):
    apart = Options(timed_images=2, batch=3, progress=False)
    compare(workload, SETTINGS, apart, Store(None))
    alone = forwards.count("ModuleList")
    forwards.clear()
    options = replace(apart, time_together=True)
    store = Store(tmp_path / "store")
    found = compare(workload, SETTINGS, options, store)
    # Two rounds of two images, and four of batches, for two settings.
    assert alone - forwards.count("ModuleList") == 2 * (2 + 1 + 3)
    plain, *reduced = found.rows
    for row in found.rows:
        assert row.latency.median > 0 and row.peak_memory > 64 * 64 * 4
        assert row.baseline == plain.latency
        assert row.baseline_throughput == plain.throughput > 0
    assert found.speedup(plain) == 1.0 and all(found.speedup(row) for row in reduced)
    assert store.reused == 0
    # With the same keys as apart: nothing is measured again, together or not.
    forwards.clear()
    again = Store(tmp_path / "store")
    assert compare(workload, SETTINGS, apart, again).rows == found.rows
    assert compare(workload, SETTINGS, options, again).rows == found.rows
    assert forwards == [] and again.reused == 12


def test_a_model_that_fails_while_timed_together_costs_the_others_nothing(workload, monkeypatch):
    failing = []
    original = session_module.peak_memory

    def peak_memory(call, device):
        failing.append(call)
        if len(failing) in (3, 6):  # "half": together with the others, and alone
            raise ValueError("no memory left")
        return original(call, device)

    monkeypatch.setattr(session_module, "peak_memory", peak_memory)
    options = Options(timed_images=1, batch=1, progress=False, time_together=True)
    found = compare(workload, SETTINGS, options)
    assert [row.name for row in found.rows] == ["plain", "same"]
    assert found.failed == {"half": "no memory left"}
    assert all(row.latency.median > 0 for row in found.rows)


def test_what_results_depend_on_is_in_their_key(workload, tiny_opts):
    same = load_workload(VITDET, [*tiny_opts, "MODEL.EXPEDIT.ALPHA", "1"])
    assert same.fingerprint == workload.fingerprint
    others = [
        load_workload(VITDET, [*tiny_opts, "INPUT.MIN_SIZE_TEST", "56"]),
        load_workload(VITDET, tiny_opts, limit=3),
        replace(workload, dataset="another"),
        replace(workload, make_evaluator=None),
    ]
    other_weights = replace(workload, model=copy.deepcopy(workload.model))
    with torch.no_grad():
        next(other_weights.model.parameters()).add_(1e-6)
    found = [s.fingerprint for s in (workload, *others, other_weights)]
    assert len(set(found)) == len(found)


def test_weights_that_change_after_a_comparison(workload):
    changed = replace(workload, model=copy.deepcopy(workload.model))
    store = Store(None)
    before = compare(changed, {}, QUIET, store)
    with torch.no_grad():
        for parameter in changed.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = compare(changed, {}, QUIET, store)
    assert store.reused == 0 and after.plain.metrics != before.plain.metrics


def test_arrays_in_records_count_by_their_content():
    for kind in (lambda x: x, torch.from_numpy):
        zeros = np.zeros((64, 64))
        other = zeros.copy()
        other[30, 30] = 7
        digests = {data_digest([{"sem_seg": kind(x)}], []) for x in (zeros, other, zeros.T)}
        assert len(digests) == 2
        assert data_digest([{"sem_seg": kind(zeros.astype("f4"))}], []) not in digests


class Interrupting:
    """Evaluates as Agreement does, until Ctrl-C at a certain image of a certain run."""

    def __init__(self, monkeypatch, run, image):
        from expedit_d2.evaluation import Agreement

        runs = [0]

        class Interrupted(Agreement):
            def process(self, inputs, outputs):
                super().process(inputs, outputs)
                self.count = getattr(self, "count", 0) + 1
                if self.count == 1:
                    runs[0] += 1
                if (runs[0], self.count) == (run, image):
                    raise KeyboardInterrupt

        monkeypatch.setattr(session_module, "Agreement", Interrupted)


def test_interruption_leaves_a_table_and_the_next_run_goes_on(
    workload, tmp_path, forwards, monkeypatch
):
    whole = compare(workload, SETTINGS, QUIET)
    saved = []
    with monkeypatch.context() as patch:
        Interrupting(patch, run=3, image=2)
        store = Store(tmp_path)
        partial = compare(workload, SETTINGS, QUIET, store, save=saved.append)
    assert partial.unfinished == ["half"]
    assert partial.rows == whole.rows[:2]
    assert Comparison.from_json(partial.to_json()) == partial
    assert "Not finished: half" in to_markdown(partial) and "same" in to_csv(partial)
    assert [c.unfinished for c in saved] == [["same", "half"], ["half"]]
    forwards.clear()
    resumed = compare(workload, SETTINGS, QUIET, Store(tmp_path))
    assert resumed.rows == whole.rows and not resumed.unfinished
    assert forwards == ["ExpeditedBlocks"] * 6  # four images, and two to count FLOPs and launches


def test_interrupted_before_anything_is_finished(workload, monkeypatch):
    Interrupting(monkeypatch, run=1, image=1)
    with pytest.raises(KeyboardInterrupt):
        compare(workload, SETTINGS, QUIET)


def test_results_that_were_cut_off_are_computed_again(tmp_path):
    store = Store(tmp_path)
    store.put("a", {"x": [1.5]}, "first")
    store.put("b", {})
    store.put_arrays("c", {"plain": np.arange(3)})
    file = tmp_path / "results.jsonl"
    file.write_text(file.read_text() + '{"label": "", "key": "d", "val')
    again = Store(tmp_path)
    assert again.get("a") == {"x": [1.5]} and again.get("d") is None
    assert again.get_arrays("c")["plain"].tolist() == [0, 1, 2] and again.get_arrays("a") is None
    again.put("d", {"four": 4})
    again.put("e", {"five": 5})
    found = [Store(tmp_path).get(key) for key in "ade"]
    assert found == [{"x": [1.5]}, {"four": 4}, {"five": 5}]


def test_images_without_labels(tiny_opts, tiny_data, tmp_path):
    files = [record["file_name"] for record in DatasetCatalog.get(tiny_data[1])]
    folder = files[0].rsplit("/", 1)[0]
    workload = load_workload(VITDET, tiny_opts, images=folder)
    half = {"half": SETTINGS["half"]}
    bare = compare(workload, half, QUIET)
    labelled = compare(load_workload(VITDET, tiny_opts), half, QUIET)
    assert (bare.images, bare.plain.metrics) == (4, {})
    assert [r.agreement for r in bare.rows] == [r.agreement for r in labelled.rows]
    assert [r.flops for r in bare.rows] == [r.flops for r in labelled.rows]
    assert len(load_workload(VITDET, tiny_opts, images=f"{folder}/*.png", limit=3)) == 3
    assert len(load_workload(VITDET, tiny_opts, images=files[0])) == 1
    with pytest.raises(FileNotFoundError, match="no images at .*none"):
        register_images(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="no images at"):
        register_images(f"{folder}/*.jpg")


def test_first_images_have_agreement_alone(tiny_opts):
    first = compare(load_workload(VITDET, tiny_opts, limit=2), {}, QUIET)
    assert (first.images, first.plain.metrics) == (2, {})
    assert compare(load_workload(VITDET, tiny_opts, limit=4), {}, QUIET).plain.metrics
    with pytest.raises(ValueError, match="at least one image .* got 0"):
        load_workload(VITDET, tiny_opts, limit=0)


def test_what_cannot_be_compared_fails_at_once(workload, forwards):
    with pytest.raises(ValueError, match="ALPHA must be in 0 to 2.* got 7"):
        compare(workload, {"a": SETTINGS["half"], "b": Settings(alpha=7, ratio=0.5)}, QUIET)
    with pytest.raises(ValueError, match="must not be named 'plain'"):
        compare(workload, {"plain": SETTINGS["half"]}, QUIET)
    assert forwards == []
    with pytest.raises(ValueError, match="dtype must be one of .* got 'int8'"):
        Options(dtype="int8")
    with pytest.raises(ValueError, match="batch must be 1 or more, got 0"):
        Options(batch=0)
    assert asdict(Options())["timed_images"] > 0


def test_settings_of_the_config_do_not_reach_the_plain_model(tiny_opts):
    from expedit_d2.api import is_expedited

    opts = ["MODEL.EXPEDIT.ENABLED", "True", "MODEL.EXPEDIT.ALPHA", "1"]
    opts = [*tiny_opts, *opts, "MODEL.EXPEDIT.RATIO", "0.5"]
    assert load_cfg(VITDET, opts).MODEL.EXPEDIT.ENABLED
    assert not is_expedited(load_workload(VITDET, opts).model)
