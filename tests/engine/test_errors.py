"""What is a sentence and what is a defect; interruptions; several processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from expedit_d2.engine import one_sentence
from expedit_d2.engine.errors import explain
from expedit_d2.engine.trainer import Trainer
from expedit_d2.operators import TokenClustering
from support.repository import ROOT, VITDET, load_tool


def sentence_of(action) -> str | None:
    try:
        action()
    except Exception as error:
        return explain(error)
    raise AssertionError("nothing was raised")


def raising(error):
    def action():
        raise error

    return action


class Broken(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: TokenClustering(grid=(0, 3)), ["grid", "(0, 3)"]),
        (lambda: open("/no/such/file"), ["'/no/such/file'", "no such file", "give an existing"]),
        (lambda: open("/"), ["'/'", "is a directory", "give a file"]),
        (lambda: Image.open(__file__), ["cannot identify image file", "test_errors.py"]),
        (lambda: yaml.safe_load("a: [1,"), ["line 1", "invalid YAML"]),
        (
            lambda: BACKBONE_REGISTRY.get("build_resnet"),
            ["MODEL.BACKBONE.NAME", "resnet_backbone?"],
        ),
        (lambda: DatasetCatalog.get("coco_2017_vall"), ["'coco_2017_vall'", "coco_2017_val?"]),
        (lambda: __import__("no_such_package"), ["'no_such_package'", "pip"]),
        (raising(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried")), ["GPU", "INPUT.MIN"]),
        (raising(RuntimeError("DefaultCPUAllocator: can't allocate memory")), ["CPU", "--batch"]),
        (raising(MemoryError()), ["out of memory", "MODEL.DEVICE"]),
        (
            raising(RuntimeError("Found no NVIDIA driver on your system: CUDA")),
            ["MODEL.DEVICE cpu"],
        ),
        (raising(RuntimeError("bind: Address already in use EADDRINUSE")), ["--dist-url", "port"]),
    ],
)
def test_what_libraries_raise_is_a_sentence(action, words):
    sentence = sentence_of(action)
    assert sentence and "\n" not in sentence
    assert all(word in sentence for word in words), sentence


def unpack():
    _first, _second = [1]


@pytest.mark.parametrize(
    "action",
    [
        raising(TypeError("a bug")),
        raising(AttributeError("a bug")),
        raising(RuntimeError("a bug")),
        raising(KeyError("bbox")),
        raising(IndexError("list index out of range")),
        unpack,
        lambda: int("x"),
        lambda: {}["bbox"],
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: __import__("expedit_d2.no_such_part"),
    ],
)
def test_a_defect_keeps_its_traceback(action):
    assert sentence_of(action) is None
    with pytest.raises(Exception) as raised, one_sentence("tool.py"):
        action()
    assert raised.value.__traceback__ is not None


def test_errors_of_a_loaders_worker():
    def load(error):
        return lambda: list(DataLoader(Broken(error), num_workers=1))

    assert sentence_of(load(ValueError("the file\nis none"))).startswith("the file is none")
    assert sentence_of(load(FileNotFoundError("there is no x.png"))) == "there is no x.png"
    assert sentence_of(load(TypeError("a bug"))) is None


def test_one_sentence_and_status(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="^tool.py: too big$") as stopped, one_sentence("tool.py"):
        raise ValueError("too\n big")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "tool.py: too big\n"
    monkeypatch.setenv("EXPEDIT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="too big"), one_sentence("tool.py"):
        raise ValueError("too big")


TOOLS = {
    "train_net": (["--config-file", VITDET], "no checkpoint"),
    "compare": ([], "the same command resumes"),
    "tune": (["--keep", "99"], "the same command resumes"),
    "draw": (["--config-file", VITDET, "--output", "some/folder"], "some/folder"),
    "demo": (["--output", "some/folder"], "some/folder"),
    "export": (["--config-file", VITDET, "--output", "x.onnx"], "nothing was written"),
    "paper_tables": ([], "the rows that are done"),
    "benchmark_backbone": (["--config-file", VITDET], "nothing was written"),
    "benchmark_operators": ([], "nothing was written"),
}


@pytest.mark.parametrize("name", TOOLS)
def test_interruptions_say_what_is_kept(name, monkeypatch, capsys):
    arguments, kept = TOOLS[name]
    tool = load_tool(name)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "main", interrupted)
    with pytest.raises(SystemExit) as stopped:
        tool.run(arguments)
    assert stopped.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}.py: interrupted; ") and kept in line


def test_an_error_in_training_is_a_sentence_in_the_log_too(tiny_opts, capfd, monkeypatch):
    def fails(self):
        raise error

    train_net = load_tool("train_net")
    monkeypatch.setattr(Trainer, "run_step", fails)
    command = ["--config-file", VITDET, *tiny_opts, "SOLVER.MAX_ITER", "1"]
    error = ValueError("the image x.png cannot be read")
    with pytest.raises(SystemExit, match="x.png cannot be read") as stopped:
        train_net.run(command)
    assert stopped.value.code == 2
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out.replace("Logging error ---\nTraceback", "")
    error = TypeError("a bug")
    with pytest.raises(TypeError, match="a bug"):
        train_net.run(command)


@pytest.mark.slow
def test_one_sentence_of_several_processes():
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--eval-only"]
    command += ["--num-gpus", "2", "--config-file", VITDET, "MODEL.WEIGHTS", "none.pth"]
    done = subprocess.run([*command, "MODEL.DEVICE", "cpu"], capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1] == "train_net.py: MODEL.WEIGHTS: there is no file 'none.pth'"
    )
    assert "Traceback" not in done.stderr + done.stdout


MODULE = """
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN


@META_ARCH_REGISTRY.register()
class MyRCNN(GeneralizedRCNN):
    def forward(self, inputs):
        print(f"my model on {len(inputs)} images")
        return super().forward(inputs)


DatasetCatalog.register("my_images", lambda: list(DatasetCatalog.get("{name}")))
MetadataCatalog.get("my_images").set(
    evaluator_type="coco", json_file=MetadataCatalog.get("{name}").json_file,
    thing_classes=MetadataCatalog.get("{name}").thing_classes,
    thing_dataset_id_to_contiguous_id=MetadataCatalog.get("{name}").thing_dataset_id_to_contiguous_id,
)
"""


def test_a_module_of_ones_own(tiny_opts, tiny_data, tmp_path, monkeypatch, capsys):
    DatasetCatalog.get(tiny_data[1])  # its metadata
    (tmp_path / "models_of_ones_own.py").write_text(MODULE.replace("{name}", tiny_data[1]))
    (tmp_path / "my_config.yaml").write_text(
        f"_BASE_: {VITDET}\nMODEL: {{META_ARCHITECTURE: MyRCNN}}\n"
    )
    config = ["--config-file", str(tmp_path / "my_config.yaml")]
    opts = [*tiny_opts, "DATASETS.TEST", "('my_images',)"]
    train_net = load_tool("train_net")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        for module in (
            str(tmp_path / "models_of_ones_own.py"),
            "models_of_ones_own",
        ):  # the second time it is known
            train_net.run(["--eval-only", "--import", module, *config, *opts])
            assert "my model on 1 images" in capsys.readouterr().out
    finally:
        sys.modules.pop("models_of_ones_own", None)
        DatasetCatalog.remove("my_images")
        MetadataCatalog.remove("my_images")
