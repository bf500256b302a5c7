"""Choose the images of the demo: a few on which all metrics are close to those on many.

On any six images the share of a metric that is kept is off by several percent, as one object is
several points of AP. The best six of a hundred are found by exchanging images at random.
``python tests/support/representative.py`` prints them for ``REPRESENTATIVE`` in
``expedit_d2/data/collage/definition.py``; it takes half an hour on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import numpy as np
import torch
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.utils.logger import setup_logger
from panopticapi.evaluation import pq_compute_single_core
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from expedit_d2.cli.workloads import load_workload, needed_setting
from expedit_d2.comparison import Workload, expedited_copy
from expedit_d2.data import register_collage
from expedit_d2.data.collage.definition import LARGE_SIZE
from expedit_d2.settings import Settings
from support.repository import ROOT

CONFIGS = ROOT / "configs" / "embedded"
MODELS = ("segmenter", "dpt", "mask2former", "vitdet")
OPTS = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"]
OPTS += ["DATASETS.TEST", "('representative_val',)"]
#: How much a point counts by which a share that is kept, or the plain metric, is off.
WEIGHTS = {"plain": 0.3, "budget": 1.0, "tome": 1.0, "expedit": 0.5, "published": 0.2}

#: A metric on a subset of the images, by their positions.
Metric = Callable[[Sequence[int]], float]


def quietly(call: Callable, *args: object) -> object:
    """Without what pycocotools and panopticapi print."""
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*args)


def flat(evaluator: DatasetEvaluator) -> Iterator[DatasetEvaluator]:
    if isinstance(evaluator, DatasetEvaluators):
        for part in evaluator._evaluators:
            yield from flat(part)
    else:
        yield evaluator


def mean_iou(confusions: np.ndarray) -> Metric:
    """Of (images, K + 1, K + 1), predictions by labels; the last of each are ignored."""

    def metric(chosen: Sequence[int]) -> float:
        matrix = confusions[list(chosen)].sum(0)[:-1, :-1].astype(float)
        hits, labels, predicted = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
        valid = labels > 0
        return 100 * float(np.mean((hits / (labels + predicted - hits).clip(1))[valid]))

    return metric


def panoptic_quality(counts: np.ndarray) -> Metric:
    """Of (images, K, 4): the sum of IoUs, the numbers of matches, false and missed segments."""

    def metric(chosen: Sequence[int]) -> float:
        iou, hits, false, missed = counts[list(chosen)].sum(0).T
        size = hits + false / 2 + missed / 2
        return 100 * float(np.mean((iou / size.clip(1e-9))[size > 0]))

    return metric


def mean_of(values: Sequence[float]) -> Metric:
    return lambda chosen: float(np.mean([values[i] for i in chosen]))


def average_precision(evaluation: COCOeval) -> Metric:
    """Of an evaluation whose images have been evaluated."""
    images = list(evaluation.params.imgIds)
    results = np.array(evaluation.evalImgs, dtype=object).reshape(-1, len(images))

    def metric(chosen: Sequence[int]) -> float:
        chosen = sorted(chosen)
        evaluation.params.imgIds = evaluation._paramsEval.imgIds = [images[i] for i in chosen]
        evaluation.evalImgs = results[:, chosen].ravel().tolist()
        quietly(evaluation.accumulate)
        precision = evaluation.eval["precision"]
        return 100 * float(precision[precision > -1].mean())

    return metric


def coco_metrics(evaluator: COCOEvaluator, images: Sequence[int]) -> Iterator[tuple[str, Metric]]:
    ids = {v: k for k, v in evaluator._metadata.thing_dataset_id_to_contiguous_id.items()}
    found = [one for image in evaluator._predictions for one in image["instances"]]
    for task in evaluator._tasks or ("bbox", "segm"):
        left_out = {"segm": "bbox", "bbox": ""}[task]  # masks have other areas than boxes
        results = [{k: v for k, v in one.items() if k != left_out} for one in found]
        results = [{**one, "category_id": ids[one["category_id"]]} for one in results]
        truth = evaluator._coco_api
        evaluation = COCOeval(truth, quietly(truth.loadRes, results), task)
        evaluation.params.imgIds = list(images)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        quietly(evaluation.evaluate)
        yield {"bbox": "box AP", "segm": "mask AP"}[task], average_precision(evaluation)


def panoptic_counts(evaluator: COCOPanopticEvaluator) -> np.ndarray:
    truth = json.loads(Path(evaluator._metadata.panoptic_json).read_text())
    classes = {one["id"]: one for one in truth["categories"]}
    labels = {one["image_id"]: one for one in truth["annotations"]}
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        for found in evaluator._predictions:
            (Path(folder) / found["file_name"]).write_bytes(found["png_string"])
            pair = [(labels[found["image_id"]], found)]
            root = evaluator._metadata.panoptic_root
            quality = quietly(pq_compute_single_core, 0, pair, root, folder, classes)
            of = [quality[one] for one in classes]
            counts.append([(one.iou, one.tp, one.fp, one.fn) for one in of])
    return np.array(counts)


def metrics_of(name: str, settings: Settings | None, workload: Workload) -> dict[str, Metric]:
    """The metrics of a model with these settings, after running it on all images."""
    model = expedited_copy(workload.model, settings)
    evaluators = list(flat(workload.make_evaluator()))
    confusions, images = [], []
    for evaluator in evaluators:
        evaluator.reset()
    for batch in tqdm(workload.images(), desc=name, total=len(workload), disable=None):
        with torch.no_grad():
            outputs = model(batch)
        images += [item["image_id"] for item in batch]
        for evaluator in evaluators:
            if isinstance(evaluator, SemSegEvaluator):
                evaluator.reset()
            evaluator.process(batch, outputs)
            if isinstance(evaluator, SemSegEvaluator):
                confusions.append(evaluator._conf_matrix)
    found: dict[str, Metric] = {}
    for evaluator in evaluators:
        if isinstance(evaluator, SemSegEvaluator):
            found["mIoU"] = mean_iou(np.array(confusions))
        elif isinstance(evaluator, COCOPanopticEvaluator):
            found["PQ"] = panoptic_quality(panoptic_counts(evaluator))
        elif isinstance(evaluator, COCOEvaluator):
            found |= coco_metrics(evaluator, images)
        else:
            found["δ1"] = mean_of([row["d1"] for row in evaluator.rows])
    return found


def measure(name: str) -> dict[tuple[str, str, str], Metric]:
    """By model, metric and setting."""
    plain = CONFIGS / f"dinov2_{name}.yaml"
    workload = load_workload(plain, OPTS)
    settings = {"plain": None}
    for path in sorted(CONFIGS.glob(f"{plain.stem}_*.yaml")):
        settings[path.stem.removeprefix(f"{plain.stem}_")] = needed_setting(path, OPTS)
    return {
        (name, metric, setting): value
        for setting, chosen in settings.items()
        for metric, value in metrics_of(f"{name}, {setting}", chosen, workload).items()
    }


class Distance:
    """How far the metrics on a subset are from those on all images, in weighted points."""

    def __init__(self, metrics: dict[tuple[str, str, str], Metric], images: int) -> None:
        self.metrics = metrics
        self.all = self.shares(range(images))

    def shares(self, chosen: Sequence[int]) -> dict[tuple[str, str, str], float]:
        """Percent of the plain model's metric; the plain model's metric as it is."""
        values = {key: metric(chosen) for key, metric in self.metrics.items()}
        return {
            (name, metric, setting): 100 * value / max(values[name, metric, "plain"], 1e-9)
            if setting != "plain"
            else value
            for (name, metric, setting), value in values.items()
        }

    def of(self, chosen: Sequence[int]) -> float:
        shares = self.shares(chosen)
        off = []
        for (name, metric, setting), expected in self.all.items():
            difference = abs(shares[name, metric, setting] - expected)
            if setting == "plain":
                difference *= 100 / expected
            off.append(difference * WEIGHTS[setting.split("_")[0]])
        return max(off) + float(np.mean(off)) / 5


def search(distance: Distance, images: int, count: int, seconds: float, seed: int) -> list[int]:
    """The nearest subset that exchanging one image at a time finds, from many starts."""
    numbers = random.Random(seed)
    best: tuple[float, list[int]] = (np.inf, [])
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        starts = [numbers.sample(range(images), count) for _ in range(60)]
        near, chosen = min((distance.of(start), start) for start in starts)
        failed = 0
        while failed < 250 and time.monotonic() < end:
            trial = list(chosen)
            others = [image for image in range(images) if image not in chosen]
            trial[numbers.randrange(count)] = numbers.choice(others)
            far = distance.of(trial)
            failed += 1
            if far < near:
                near, chosen, failed = far, trial, 0
        if near < best[0]:
            best = near, sorted(chosen)
            print(f"{best[0]:.2f} points: {best[1]}", flush=True)
    return best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=600, help="of the search")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    setup_logger(name="detectron2").setLevel("ERROR")
    with tempfile.TemporaryDirectory() as folder:
        register_collage()
        counts = {"train": 1, "val": args.images}
        register_collage(folder, counts, LARGE_SIZE, name="representative")
        metrics: dict[tuple[str, str, str], Metric] = {}
        for name in MODELS:
            metrics |= measure(name)
        distance = Distance(metrics, args.images)
        chosen = search(distance, args.images, args.count, args.seconds, args.seed)
    for key, share in distance.shares(chosen).items():
        print(*key, f"{share:.1f}, on all {distance.all[key]:.1f}")


if __name__ == "__main__":
    main()
