"""The shipped heads on the images of the demo, plain and at README's budgets.

After new weights are shipped, ``python tests/support/shipped_heads.py`` writes what
``tests/test_readme_table.py`` expects.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from detectron2.evaluation import DatasetEvaluators, inference_on_dataset
from detectron2.utils.logger import setup_logger

from expedit_d2.cli.workloads import load_workload
from expedit_d2.comparison import expedited_copy
from expedit_d2.data import register_collage
from expedit_d2.data.collage.definition import LARGE_SIZE, REPRESENTATIVE
from expedit_d2.evaluation import Agreement
from expedit_d2.predictions import main_metrics
from expedit_d2.settings import Settings
from support.repository import ROOT

EXPECTED = ROOT / "tests" / "shipped_heads.json"
#: README's headline of each model: half of the blocks' GFLOPs, or 65 % where windows are.
BUDGETS = {"segmenter": 0.5, "dpt": 0.5, "mask2former": 0.5, "vitdet": 0.65}

Measured = dict[str, dict[str, dict[str, float]]]


def measure(folder: Path) -> Measured:
    """Of each model the metrics, "plain" and of its "budget", and the "agreement" of the two.

    Args:
        folder: where the images are rendered.

    Raises:
        OSError: if the backbone's weights cannot be had.
    """
    register_collage()  # whose classes some models want to know
    register_collage(folder, {"train": 1, "val": REPRESENTATIVE}, LARGE_SIZE, name="shipped_heads")
    return {name: _measure(name, budget) for name, budget in BUDGETS.items()}


def _measure(name: str, budget: float) -> dict[str, dict[str, float]]:
    opts = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"]
    opts += ["DATASETS.TEST", "('shipped_heads_val',)"]
    workload = load_workload(ROOT / "configs" / "embedded" / f"dinov2_{name}.yaml", opts)

    def evaluate(settings: Settings | None, agreement: Agreement) -> dict[str, dict[str, float]]:
        model = expedited_copy(workload.model, settings)
        evaluators = DatasetEvaluators([workload.make_evaluator(), agreement])
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its own tables
            return inference_on_dataset(model, workload.loader, evaluators)

    reference = Agreement()
    plain = evaluate(None, reference)
    reduced = evaluate(Settings(budget=budget), Agreement(reference))
    found = {
        "plain": main_metrics(plain),
        "budget": main_metrics(reduced),
        "agreement": reduced["agreement"],
    }
    return {what: {k: round(v, 2) for k, v in values.items()} for what, values in found.items()}


if __name__ == "__main__":
    setup_logger(name="detectron2").setLevel("ERROR")
    with tempfile.TemporaryDirectory() as scenes:
        measured = {"images": REPRESENTATIVE, "models": measure(Path(scenes))}
    EXPECTED.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(EXPECTED)
