"""LazyConfigs in the official layout of ViTDet, with paths as data sets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from PIL import Image

from expedit_d2.cli.workloads import load_workload
from expedit_d2.comparison import Options, compare
from expedit_d2.data import collage
from expedit_d2.settings import Settings
from support.detector import TINY_VITDET
from support.repository import load_tool

train_net = load_tool("train_net")

# configs/common/coco_loader_lsj.py
LOADER = """
import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
image_size = 64
dataloader.train.mapper.augmentations = [
    L(T.ResizeScale)(
        min_scale=0.1, max_scale=2.0, target_height=image_size, target_width=image_size
    ),
    L(T.FixedSizeCrop)(crop_size=(image_size, image_size)),
    L(T.RandomFlip)(horizontal=True),
]
dataloader.train.mapper.image_format = "RGB"
dataloader.train.total_batch_size = 2
dataloader.train.mapper.recompute_boxes = True
dataloader.train.mapper.instance_mask_format = "bitmask"
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=image_size, max_size=image_size),
]
"""

# configs/COCO/mask_rcnn_vitdet_b_100ep.py, with a tiny model
CONFIG = (
    """
from functools import partial

from detectron2 import model_zoo
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from fvcore.common.param_scheduler import MultiStepParamScheduler

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler

from ..common.coco_loader_lsj import dataloader
"""
    + TINY_VITDET.replace("square_pad=0", "square_pad=64")
    + """
train = model_zoo.get_config("common/train.py").train
train.amp.enabled = True
train.ddp.fp16_compression = True
train.init_checkpoint = ""
train.max_iter = 1
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[1], num_updates=2),
    warmup_length=0.5,
    warmup_factor=0.001,
)
optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=3, lr_decay_rate=0.7)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
"""
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A rendered data set: its folder, and the path of a COCO file in the package's form."""
    root = tmp_path_factory.mktemp("scenes")
    folder = collage.write_collage(root, {"train": 2, "val": 3}, (64, 64))
    return f"{folder}/annotations/instances_val.json@{folder}/val"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The config's file, and overrides that name its weights."""
    root = tmp_path_factory.mktemp("vitdet")
    files = {"common/coco_loader_lsj.py": LOADER, "COCO/mask_rcnn_vitdet_tiny.py": CONFIG}
    for name, text in files.items():
        (root / "configs" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "configs" / name).write_text(text)
    file = root / "configs" / "COCO" / "mask_rcnn_vitdet_tiny.py"
    torch.manual_seed(0)
    model = instantiate(LazyConfig.load(str(file)).model)
    torch.save({"model": model.state_dict()}, root / "weights.pth")
    opts = [f"train.init_checkpoint={root}/weights.pth", "train.device=cpu"]
    opts += [f"dataloader.{split}.num_workers=0" for split in ("train", "test")]
    return str(file), [*opts, f"train.output_dir={root}/output"]


def run(config, *opts, flags=("--eval-only",)):
    file, common = config
    train_net.run([*flags, "--config-file", file, *common, *opts])


@pytest.fixture
def fails(capsys):
    """Runs the tool, which must end with one sentence; returns that."""

    def fail(config, *opts, **options):
        with pytest.raises(SystemExit) as stopped:
            run(config, *opts, **options)
        if isinstance(stopped.value.code, str):
            return stopped.value.code
        return capsys.readouterr().err.strip().splitlines()[-1]

    return fail


def test_paths_are_evaluated_as_by_name(config, scenes, catalogs, tmp_path):
    """The evaluator follows, as official configs say, and gives what Detectron2 gives by name."""
    from detectron2.data.datasets import register_coco_instances

    results = []
    json_file, images = scenes.split("@")
    register_coco_instances("scenes_by_name", {}, json_file, images)
    for number, name in enumerate((scenes, "scenes_by_name")):
        folder = tmp_path / str(number)
        run(
            config,
            f"dataloader.test.dataset.names={name}",
            f"+dataloader.evaluator.output_dir={folder}",
        )
        results.append(json.loads((folder / "coco_instances_results.json").read_text()))
    assert results[0] and results[0] == results[1]


@pytest.mark.slow
def test_comparison_and_training_by_path(config, scenes, catalogs, tmp_path):
    names = [f"dataloader.{split}.dataset.names={scenes}" for split in ("train", "test")]
    workload = load_workload(config[0], [*config[1], *names])
    settings = {"half": Settings(alpha=1, ratio=0.5)}
    comparison = compare(workload, settings, Options(timed_images=0, progress=False))
    assert [set(row.metrics) for row in comparison.rows] == [{"box AP", "mask AP"}] * 2
    run(config, *names, f"train.output_dir={tmp_path}", flags=())
    assert "bbox/AP" in (tmp_path / "metrics.json").read_text()


def test_what_does_not_fit_is_said_before_anything_runs(config, scenes, catalogs, tmp_path, fails):
    test = f"dataloader.test.dataset.names={scenes}"
    json_file, images = scenes.split("@")
    content = json.loads(Path(json_file).read_text())
    content["categories"].append({"id": 7, "name": "cube"})
    (tmp_path / "seven.json").write_text(json.dumps(content))
    path = f"{tmp_path}/seven.json@{images}"
    message = fails(config, f"dataloader.test.dataset.names={path}")
    for part in (
        "dataloader.test.dataset.names: ",
        "has 7 classes, but the model has 6 (model.roi_heads.num_classes)",
    ):
        assert part in message
    # Also before training.
    message = fails(
        config, f"dataloader.train.dataset.names={scenes}", test.replace(scenes, path), flags=()
    )
    assert "has 7 classes, but the model has 6" in message
    other = "dataloader.evaluator.dataset_name=coco_2017_val"
    message = fails(config, test, other)
    assert "dataloader.evaluator.dataset_name is 'coco_2017_val'" in message
    message = fails(config, "dataloader.test.dataset.names=nowhere.json")
    assert "dataloader.test.dataset.names names 'nowhere.json'" in message
    message = fails(config, "dataloader.test.dataset.names=nowhere")
    assert "dataloader.test.dataset.names: there is no data set 'nowhere'" in message


def test_broken_image_is_named(config, scenes, catalogs, tmp_path, fails):
    """Also when a worker process reads it."""
    json_file, images = scenes.split("@")
    content = json.loads(Path(json_file).read_text())
    for image in content["images"]:
        source = Image.open(f"{images}/{image['file_name']}")
        source.save(tmp_path / image["file_name"])
    broken = tmp_path / content["images"][1]["file_name"]
    broken.write_bytes(broken.read_bytes()[:-1000])
    for workers in (0, 1):
        message = fails(
            config,
            f"dataloader.test.dataset.names={json_file}@{tmp_path}",
            f"dataloader.test.num_workers={workers}",
        )
        assert message.startswith(f"train_net.py: {broken} cannot be read as an image")
        assert "\n" not in message


def test_16_bit_images_are_read(config, scenes, catalogs, tmp_path):
    """A grayscale image with 16 bits gives the predictions of the same image with 8."""
    json_file, images = scenes.split("@")
    content = json.loads(Path(json_file).read_text())
    results = []
    for bits in (8, 16):
        folder = tmp_path / str(bits)
        folder.mkdir()
        for image in content["images"]:
            gray = np.asarray(Image.open(f"{images}/{image['file_name']}").convert("L"))
            gray = gray if bits == 8 else gray.astype(np.uint16) * 256 + 77
            Image.fromarray(gray).save(folder / image["file_name"])
        run(
            config,
            f"dataloader.test.dataset.names={json_file}@{folder}",
            f"+dataloader.evaluator.output_dir={folder}/out",
        )
        results.append(json.loads((folder / "out" / "coco_instances_results.json").read_text()))
    assert results[0] and results[0] == results[1]
