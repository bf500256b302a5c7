"""Evaluation on two processes gives the metrics of one; pictures are shared between them."""

import json

import pytest
import torch
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset
from detectron2.utils import comm
from PIL import Image

from expedit_d2.data import register_collage
from expedit_d2.engine import launch
from expedit_d2.evaluation import Agreement
from expedit_d2.projects import load_cfg, trainer_of
from support.repository import DPT, ROOT, SEGMENTER, VITDET, load_tool

pytestmark = pytest.mark.slow

EXPEDIT = [
    *("MODEL.EXPEDIT.ENABLED", "True"),
    *("MODEL.EXPEDIT.ALPHA", "1"),
    *("MODEL.EXPEDIT.RATIO", "0.6"),
]
SMALL = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.TIMM.KWARGS.img_size", "64"),
    *("MODEL.TIMM.KWARGS.embed_dim", "24"),
    *("MODEL.TIMM.KWARGS.depth", "4"),
    *("MODEL.SEGMENTER.WINDOW_SIZE", "0"),
    *("DATALOADER.NUM_WORKERS", "0"),
    *("INPUT.MIN_SIZE_TEST", "64"),
]
MODELS = {
    "vitdet": (VITDET, []),
    "segmenter": (SEGMENTER, [*SMALL, *EXPEDIT]),
    "dpt": (DPT, EXPEDIT),
}


def evaluate_all(folder):
    """Metrics and agreement of each model, written by the main process."""
    torch.set_num_threads(1)
    register_collage(root=folder, counts={"train": 1, "val": 5}, size=(64, 64), name="five")
    results = {name: evaluate(*model, folder) for name, model in MODELS.items()}
    if comm.is_main_process():
        path = f"{folder}/{comm.get_world_size()}.json"
        with open(path, "w", encoding="utf-8") as file:
            json.dump(results, file)


def evaluate(config, opts, folder):
    dataset = "five_val"
    cfg = load_cfg(config, [*opts, "DATASETS.TEST", f"('{dataset}',)", "OUTPUT_DIR", folder])
    trainer = trainer_of(cfg)
    torch.manual_seed(0)
    model = trainer.build_model(cfg).eval()
    loader = trainer.build_test_loader(cfg, dataset)
    reference = Agreement()
    inference_on_dataset(model, loader, reference)
    with torch.no_grad():  # another model than the reference
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    evaluators = [trainer.build_evaluator(cfg, dataset), Agreement(reference)]
    results = inference_on_dataset(model, loader, DatasetEvaluators(evaluators))
    return {"images": len(loader), **(results or {})}


def test_two_processes_give_the_metrics_of_one(catalogs, tmp_path):
    results = []
    for processes in (1, 2):
        launch(evaluate_all, processes, dist_url="auto", args=(str(tmp_path),))
        results.append(json.loads((tmp_path / f"{processes}.json").read_text(encoding="utf-8")))
    one, two = results
    assert one.keys() == two.keys() == MODELS.keys()
    for name in MODELS:
        assert (one[name].pop("images"), two[name].pop("images")) == (5, 3)
        assert "agreement" in one[name] and one[name].keys() == two[name].keys()
        for task in one[name]:
            assert two[name][task] == pytest.approx(one[name][task], nan_ok=True), (name, task)


def test_pictures_of_a_folder_are_drawn_by_two_processes(tmp_path, capfd):
    photos, pictures = tmp_path / "photos", tmp_path / "pictures"
    photos.mkdir()
    for name in ("b.png", "a.jpg", "c.JPG"):
        Image.new("RGB", (64, 64), "gray").save(photos / name)
    (photos / "notes.txt").write_text("no image", encoding="utf-8")
    config = ROOT / "configs" / "embedded" / "small_segmenter_expedit_16x16.yaml"
    command = ["--num-gpus", "2", "--images", photos, "--output", pictures]
    command += ["--config-file", config, "MODEL.DEVICE", "cpu"]
    load_tool("draw").run([str(argument) for argument in command])
    assert "3 pictures" in capfd.readouterr().out
    names = sorted(path.name for path in pictures.iterdir())
    assert names == ["000_a.png", "001_b.png", "002_c.png"]
