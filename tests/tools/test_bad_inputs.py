"""Bad command lines: every tool ends with exit status 2 and one sentence that says what to mend."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog

from expedit_d2.data import register_collage
from support.detector import LAZY
from support.random_weights import write_random_weights
from support.repository import ROOT, SEGMENTER, VITDET, load_tool

HALF = "alpha=1 ratio=0.5"
EXPEDIT = "MODEL.EXPEDIT.ALPHA 1 MODEL.EXPEDIT.RATIO 0.5"

FILES = {
    "empty.yaml": "",
    "comment.yaml": "# MODEL:\n",
    "text.yaml": "a model, please\n",
    "list.yaml": "- MODEL\n- DATASETS\n",
    "cut.yaml": "MODEL:\n  EXPEDIT: {ALPHA: 1, RA",
    "cut_section.yaml": "MODEL:\n  EXPED",
    "tabs.yaml": "MODEL:\n\tWEIGHTS: x\n",
    "twice.yaml": f"_BASE_: {VITDET}\nMODEL:\n  MASK_ON: True\n  MASK_ON: False\n",
    "number_key.yaml": f"_BASE_: {VITDET}\nMODEL:\n  5: True\n",
    "self.yaml": "_BASE_: self.yaml\n",
    "loop_a.yaml": "_BASE_: loop_b.yaml\n",
    "loop_b.yaml": "_BASE_: loop_a.yaml\n",
    "inside.yaml": "MODEL: &model\n  EXPEDIT: *model\n",
    "lost.yaml": "MODEL:\n  MASK_ON: True\n_BASE_: nowhere.yaml\n",
    "base_number.yaml": "_BASE_: {a: 1}\n",
    "unknown.yaml": f"_BASE_: {VITDET}\nMODEL:\n  EXPEDIT:\n    ALFA: 4\n",
    "on_unknown.yaml": "_BASE_: unknown.yaml\nMODEL: {MASK_ON: True}\n",
    "types.yaml": f"_BASE_: {VITDET}\nMODEL:\n  ROI_HEADS:\n    NUM_CLASSES: many\n",
    "nothing.yaml": f"_BASE_: {VITDET}\nMODEL:\n  WEIGHTS:\n",
    "tiny.yaml": f"_BASE_: {VITDET}\n",
    "tiny_half.yaml": f"_BASE_: {VITDET}\nMODEL:\n  EXPEDIT: {{ALPHA: 1, RATIO: 0.5}}\n",
    "tiny_plain.yaml": f"_BASE_: {VITDET}\n",
    "broken.py": "model = dict(\ntrain = 3\n",
    "fails.py": "import torch\nmodel = torch.no_such_thing()\n",
    "needs.py": "import no_such_package\nmodel = dict()\n",
    "no_model.py": "train = dict(device='cpu')\n",
    "no_train.py": "model = dict()\n",
    "no_data.py": "model = dict()\ntrain = dict(device='cpu')\n",
    "module_broken.py": "def f(:\n",
    "module_needs.py": "import no_such_package\n",
    "results.json": "[]",
    "text.json": "no results\n",
    "torn.json": '{"model": "vit',
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the command lines below are filled in with: files, and overrides for a tiny model."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (folder / name).write_text(content)
    (folder / "binary.yaml").write_bytes(bytes(range(128, 256)))
    (folder / "folder.yaml").mkdir()
    (folder / "no_images").mkdir()
    data = folder.name
    register_collage(root=folder, counts={"train": 2, "val": 2}, size=(64, 64), name=data)
    write_random_weights(VITDET, folder / "weights.pth")
    (folder / "vitdet.py").write_text(
        LAZY.replace("{name}", f"{data}_val").replace("{output}", str(folder / "out"))
    )
    model = instantiate(LazyConfig.load(str(folder / "vitdet.py")).model)
    torch.save({"model": model.state_dict()}, folder / "lazy.pth")
    words = {
        "d": str(folder),
        "vitdet": VITDET,
        "segmenter": SEGMENTER,
        "tiny": [
            *("MODEL.WEIGHTS", str(folder / "weights.pth")),
            *("DATASETS.TRAIN", f"('{data}_train',)"),
            *("DATASETS.TEST", f"('{data}_val',)"),
            *("OUTPUT_DIR", str(folder / "out")),
        ],
        "lazy": [
            f"train.init_checkpoint={folder}/lazy.pth",
            f"train.output_dir={folder}/out",
            "train.device=cpu",
        ],
        "expedit": EXPEDIT.split(),
    }
    yield words
    for split in ("train", "val"):
        DatasetCatalog.remove(f"{data}_{split}")
        MetadataCatalog.remove(f"{data}_{split}")


def filled(command: list[str], places: dict) -> list[str]:
    """`{tiny}`, `{lazy}` and `{expedit}` become several arguments; the others are filled in."""
    arguments: list[str] = []
    for word in command:
        whole = places.get(word.strip("{}"))
        arguments += whole if isinstance(whole, list) else [word.format_map(places)]
    return arguments


TRAIN = ["--config-file", "{vitdet}", "{tiny}"]
EVAL = ["--eval-only", *TRAIN]
COMPARE = ["--config-file", "{vitdet}", "--output", "{d}/out", "--timed", "0", "--batch", "1"]
LAZY_EVAL = ["--eval-only", "--config-file", "{d}/vitdet.py", "{lazy}"]

#: Tool, command line, and words of its sentence.
CASES: list[tuple[str, list[str], list[str]]] = [
    # Configs that are none
    ("train_net", ["--config-file", "{d}/none.yaml"], ["no config file", "none.yaml"]),
    ("train_net", ["--config-file", "{d}/folder.yaml"], ["no config file", "folder.yaml"]),
    ("train_net", ["--config-file", ""], ["no config file ''"]),
    ("train_net", ["--eval-only"], ["required", "--config-file"]),
    ("train_net", ["--config-file", "{d}/empty.yaml"], ["empty.yaml is empty", "MODEL"]),
    ("compare", ["--config-file", "{d}/comment.yaml"], ["comment.yaml is empty", "MODEL"]),
    ("draw", ["--config-file", "{d}/text.yaml"], ["text.yaml has 'a model, please'"]),
    ("tune", ["--config-file", "{d}/list.yaml", "--keep", "9"], ["list.yaml has a list", "keys"]),
    ("train_net", ["--config-file", "{d}/cut.yaml"], ["cut.yaml, line 2", "invalid YAML"]),
    ("train_net", ["--config-file", "{d}/cut_section.yaml"], ["MODEL is a node", "EXPED"]),
    ("export", ["--config-file", "{d}/tabs.yaml", "--output", "{d}/x.onnx"], ["tabs.yaml, line 2"]),
    ("train_net", ["--config-file", "{d}/binary.yaml"], ["binary.yaml is not a text file"]),
    ("train_net", ["--config-file", "{d}/twice.yaml"], ["line 4", "MASK_ON is given twice"]),
    ("train_net", ["--config-file", "{d}/number_key.yaml"], ["line 3", "must be a name", "'5'"]),
    ("train_net", ["--config-file", "{d}/inside.yaml"], ["inside.yaml", "refers to itself"]),
    # Bases
    ("train_net", ["--config-file", "{d}/self.yaml"], ["self.yaml", "_BASE_", "itself"]),
    ("demo", ["--config-file", "{d}/loop_a.yaml", "--expedit", "{d}/loop_a.yaml"], ["itself"]),
    ("train_net", ["--config-file", "{d}/lost.yaml"], ["lost.yaml, line 3", "'nowhere.yaml'"]),
    ("train_net", ["--config-file", "{d}/base_number.yaml"], ["line 1", "_BASE_ must be a file"]),
    # Keys and values
    (
        "train_net",
        ["--config-file", "{d}/unknown.yaml"],
        ["unknown.yaml, line 4", "MODEL.EXPEDIT.ALFA", "did you mean MODEL.EXPEDIT.ALPHA"],
    ),
    ("compare", ["--config-file", "{d}/on_unknown.yaml"], ["bad", "unknown.yaml, line 4", "ALFA"]),
    (
        "train_net",
        ["--config-file", "{d}/types.yaml"],
        ["types.yaml, line 4", "NUM_CLASSES must be a whole number", "'many'"],
    ),
    (
        "train_net",
        ["--config-file", "{d}/nothing.yaml"],
        ["nothing.yaml, line 3", "MODEL.WEIGHTS must be text", "got nothing"],
    ),
    ("train_net", [*EVAL, "OUTPUT_DIR", "None"], ["OUTPUT_DIR must be text", "got 'None'"]),
    (
        "train_net",
        [*EVAL, "MODEL.EXPEDIT.ALFA", "1"],
        ["MODEL.EXPEDIT.ALFA", "MODEL.EXPEDIT.ALPHA"],
    ),
    ("train_net", [*EVAL, "EXPEDIT.ALPHA", "1"], ["EXPEDIT.ALPHA", "MODEL.EXPEDIT.ALPHA"]),
    ("train_net", [*EVAL, "model.weights", "x"], ["model.weights", "did you mean MODEL.WEIGHTS"]),
    ("train_net", [*EVAL, "MODEL.WEIGHTS"], ["'MODEL.WEIGHTS' has no value"]),
    ("train_net", [*EVAL, "MODEL.WEIGHTS.X", "1"], ["no config key 'MODEL.WEIGHTS.X'"]),
    ("train_net", [*EVAL, "MODEL.MASK_ON=False"], ["KEY VALUE", "'MODEL.MASK_ON=False'"]),
    ("train_net", [*EVAL, "MODEL", "{{'A': 1}}"], ["MODEL is a node"]),
    ("train_net", [*EVAL, "MODEL.MASK_ON", "maybe"], ["MODEL.MASK_ON", "True or False", "'maybe'"]),
    ("train_net", [*EVAL, "SOLVER.BASE_LR", "1"], ["SOLVER.BASE_LR", "number with a point", "'1'"]),
    ("draw", [*TRAIN, "INPUT.MIN_SIZE_TEST", "big"], ["MIN_SIZE_TEST", "whole number", "'big'"]),
    ("train_net", [*EVAL, "DATASETS.TEST", "collage_val"], ["DATASETS.TEST must be a list"]),
    ("train_net", [*EVAL, "INPUT.FORMAT", "RGBA"], ["INPUT.FORMAT", "BGR", "'RGBA'"]),
    ("train_net", [*EVAL, "INPUT.MIN_SIZE_TEST", "-5"], ["INPUT.MIN_SIZE_TEST", "0 or more", "-5"]),
    ("draw", [*TRAIN, "MODEL.PIXEL_MEAN", "[1.0]"], ["MODEL.PIXEL_MEAN", "each channel", "[1.0]"]),
    ("train_net", [*EVAL, "MODEL.VIT.WINDOW_SIZE", "-1"], ["MODEL.VIT.WINDOW_SIZE", "got -1"]),
    ("train_net", [*EVAL, "MODEL.RPN.IN_FEATURES", "['p9']"], ["IN_FEATURES", "'p9'", "backbone"]),
    ("train_net", [*TRAIN, "SOLVER.CHECKPOINT_PERIOD", "0"], ["SOLVER.CHECKPOINT_PERIOD", "got 0"]),
    ("train_net", [*TRAIN, "DATASETS.TRAIN", "(5,)"], ["DATASETS.TRAIN", "names or paths", "(5,)"]),
    # Devices
    ("train_net", [*EVAL, "MODEL.DEVICE", "banana"], ["MODEL.DEVICE", "cpu", "'banana'"]),
    (
        "compare",
        [*COMPARE, "--", "{tiny}", "MODEL.DEVICE", "cuda:99"],
        ["MODEL.DEVICE", "'cuda:99'"],
    ),
    ("train_net", [*LAZY_EVAL, "train.device=banana"], ["train.device", "cpu", "'banana'"]),
    ("paper_tables", ["--device", "tpu"], ["--device", "'tpu'"]),
    # Data sets
    ("train_net", [*EVAL, "DATASETS.TEST", "()"], ["DATASETS.TEST is empty"]),
    ("compare", [*COMPARE, "--setting", HALF, "--", "{tiny}", "DATASETS.TEST", "()"], ["is empty"]),
    ("draw", [*TRAIN, "{expedit}", "DATASETS.TEST", "()"], ["DATASETS.TEST is empty"]),
    (
        "train_net",
        [*EVAL, "DATASETS.TEST", "('coco_2017_vall',)"],
        ["DATASETS.TEST", "'coco_2017_vall'", "did you mean coco_2017_val"],
    ),
    ("train_net", [*TRAIN, "DATASETS.TRAIN", "()"], ["DATASETS.TRAIN is empty"]),
    ("train_net", [*TRAIN, "DATASETS.TRAIN", "('colage_train',)"], ["did you mean collage_train"]),
    ("draw", [*TRAIN, "{expedit}", "DATASETS.TEST", "('nope',)"], ["DATASETS.TEST", "'nope'"]),
    (
        "compare",
        [*COMPARE, "--images", "{d}/no_images", "--setting", HALF, "--", "{tiny}"],
        ["no images", "no_images"],
    ),
    # Models
    (
        "train_net",
        [*EVAL, "MODEL.META_ARCHITECTURE", "GeneralizedRCN"],
        ["MODEL.META_ARCHITECTURE", "'GeneralizedRCN'", "did you mean GeneralizedRCNN", "--import"],
    ),
    (
        "compare",
        [*COMPARE, "--setting", HALF, "--", "{tiny}", "MODEL.BACKBONE.NAME", "D2VIT"],
        ["MODEL.BACKBONE.NAME", "'D2VIT'", "D2ViT"],
    ),
    ("train_net", [*EVAL, "MODEL.ROI_HEADS.NAME", "Heads"], ["MODEL.ROI_HEADS.NAME", "'Heads'"]),
    ("train_net", [*EVAL, "MODEL.WEIGHTS", "{d}/none.pth"], ["MODEL.WEIGHTS", "none.pth"]),
    # Training
    ("train_net", [*TRAIN, "SOLVER.IMS_PER_BATCH", "0"], ["SOLVER.IMS_PER_BATCH", "got 0"]),
    ("train_net", [*TRAIN, "SOLVER.IMS_PER_BATCH", "-2"], ["SOLVER.IMS_PER_BATCH", "got -2"]),
    ("train_net", [*TRAIN, "SOLVER.MAX_ITER", "0"], ["SOLVER.MAX_ITER", "got 0"]),
    ("train_net", [*TRAIN, "SOLVER.OPTIMIZER", "ADAM"], ["SOLVER.OPTIMIZER", "ADAMW", "'ADAM'"]),
    # Numbers
    ("compare", [*COMPARE, "--first", "-1"], ["--first", "1 or more", "'-1'"]),
    ("compare", [*COMPARE, "--first", "0"], ["--first", "1 or more", "'0'"]),
    ("tune", ["--timed", "-1"], ["--timed", "0 or more", "'-1'"]),
    ("compare", ["--batch", "0"], ["--batch", "1 or more", "'0'"]),
    ("compare", ["--threads", "0"], ["--threads", "1 or more", "'0'"]),
    ("compare", ["--pictures", "-1"], ["--pictures", "0 or more", "'-1'"]),
    ("demo", ["--pictures", "few"], ["--pictures", "whole number", "'few'"]),
    ("draw", [*TRAIN, "--count", "0"], ["--count", "1 or more", "'0'"]),
    ("draw", ["--num-gpus", "-2", *TRAIN], ["--num-gpus", "1 or more", "'-2'"]),
    ("train_net", ["--num-gpus", "0", *TRAIN], ["--num-gpus", "1 or more", "'0'"]),
    ("train_net", ["--machine-rank", "1", *TRAIN], ["--machine-rank", "below --num-machines"]),
    ("train_net", ["--num-machines", "2", *TRAIN], ["--dist-url", "tcp://HOST:PORT"]),
    ("train_net", ["--num-gpus", "2", "--compare", *TRAIN], ["--compare", "--num-gpus at 1"]),
    ("export", ["--config-file", "x", "--output", "y", "--size", "0x64"], ["--size", "'0x64'"]),
    ("export", ["--config-file", "x", "--output", "y", "--benchmark", "-1"], ["--benchmark"]),
    ("benchmark_backbone", ["--config-file", "{vitdet}", "--batch", "0"], ["--batch", "'0'"]),
    ("benchmark_families", ["--models", "ResNet"], ["--models ResNet", "SWAG ViT-L"]),
    ("benchmark_families", ["--models", "swag", "--budget", "1.5"], ["BUDGET", "(0, 1)", "1.5"]),
    ("benchmark_operators", ["--repeats", "0"], ["--repeats", "1 or more", "'0'"]),
    ("paper_tables", ["--threads", "-1"], ["--threads", "1 or more"]),
    # Options and settings
    ("compare", ["--seting", HALF], ["unrecognized", "--seting"]),
    ("compare", [*COMPARE, "--dtype", "int8"], ["--dtype", "'int8'", "float32"]),
    ("compare", [*COMPARE, "--setting", "alfa=1"], ["alfa"]),
    ("compare", [*COMPARE, "--expedit", "{d}/none.yaml"], ["no config file", "none.yaml"]),
    ("demo", ["--models", "vitdett"], ["--models must be among", "'vitdett'"]),
    ("demo", ["--config-file", "{vitdet}", "--", "{tiny}"], ["--config-file needs --expedit"]),
    ("demo", ["--expedit", "{vitdet}"], ["--expedit goes with --config-file"]),
    (
        "demo",
        ["--config-file", "{vitdet}", "--expedit", "{d}/tiny_plain.yaml", "--", "{tiny}"],
        ["tiny_plain.yaml", "MODEL.EXPEDIT.ALPHA", "nothing to compare"],
    ),
    (
        "demo",
        ["--config-file", "{vitdet}", "--expedit", "{d}/none.yaml", "--", "{tiny}"],
        ["no config file", "none.yaml"],
    ),
    ("draw", TRAIN, ["vitdet.yaml", "MODEL.EXPEDIT.ALPHA", "nothing to compare"]),
    ("train_net", ["--compare", *TRAIN], ["EXPEDIT.ALPHA nor", "nothing to compare"]),
    ("train_net", [*TRAIN, "--", "--eval-only", "x"], ["'--eval-only' follows the config"]),
    ("tune", ["--config-file", "{vitdet}", "--", "{tiny}"], ["there is no target"]),
    ("paper_tables", ["--models", "SAM"], ["--models must be among", "'SAM'"]),
    # Where to write
    ("compare", ["--output", "{d}/tiny.yaml", "--setting", HALF], ["--output", "is a file"]),
    ("tune", ["--output", "{d}/tiny.yaml/x", "--keep", "9"], ["--output", "is a file"]),
    ("demo", ["--output", "{d}/tiny.yaml"], ["--output", "tiny.yaml' is a file"]),
    ("draw", [*TRAIN, "{expedit}", "--output", "{d}/tiny.yaml"], ["--output", "is a file"]),
    ("train_net", [*EVAL, "OUTPUT_DIR", "{d}/tiny.yaml"], ["OUTPUT_DIR", "is a file"]),
    ("train_net", [*LAZY_EVAL, "train.output_dir={d}/tiny.yaml"], ["train.output_dir", "a file"]),
    ("export", ["--config-file", "{segmenter}", "--output", "{d}"], ["--output", "is a folder"]),
    ("report", ["{d}/results.json", "--output", "{d}"], ["--output", "is a folder"]),
    ("paper_tables", ["--json", "{d}"], ["--json", "is a folder"]),
    ("benchmark_operators", ["--json", "{d}/tiny.yaml/x"], ["--json", "is a file"]),
    (
        "slim_checkpoint",
        ["{d}/none.pth", "{d}/out.pth"],
        ["there is no file", "none.pth"],
    ),
    ("slim_checkpoint", ["{d}/weights.pth", "{d}/tiny.yaml/x"], ["target", "is a file"]),
    ("slim_checkpoint", ["{d}/weights.pth", "{d}/lazy.pth"], ["lazy.pth", "already exists"]),
    ("slim_checkpoint", ["{d}/weights.pth"], ["required", "target"]),
    ("train_net", [*EVAL, "OUTPUT_DIR", ""], ["OUTPUT_DIR is empty"]),
    ("benchmark_operators", ["--sizes", "8x8:4x4"], ["--neighbors", "16", "8x8:4x4", "got 20"]),
    # Reports and conversions
    ("report", ["{d}/none.json"], ["none.json", "no such file"]),
    ("report", ["{d}/text.json"], ["text.json", "not the JSON of a comparison"]),
    ("report", ["{d}/torn.json"], ["torn.json", "not the JSON of a comparison"]),
    ("report", [], ["required", "results"]),
    ("convert_segmenter", ["{d}/none.pth", "{d}/x.pth"], ["variant.yml", "official runs"]),
    ("convert_dpt", ["a.pt", "b.pth", "--config-file", "{d}/empty.yaml"], ["empty.yaml is empty"]),
    ("convert_dpt", ["a.pt", "b.pth"], ["required", "--config-file"]),
    # Export
    (
        "export",
        ["--config-file", "{vitdet}", "--output", "{d}/x.onnx", "--", "{tiny}"],
        ["ViTDet", "any size", "--fixed"],
    ),
    (
        "export",
        ["--config-file", "{vitdet}", "--output", "{d}/x.pt2", "--", "{tiny}", "{expedit}"]
        + ["MODEL.EXPEDIT.ENABLED", "True"],
        ["ViTDet", "any size", "--fixed"],
    ),
    (
        "export",
        ["--config-file", "{segmenter}", "--output", "{d}/x.onnx", "--", "MODEL.DEVICE", "cpu"]
        + ["MODEL.EXPEDIT.ENABLED", "True", "MODEL.EXPEDIT.BUDGET", "0.5"],
        ["METHOD merge", "any size", "--fixed"],
    ),
    (
        "export",
        ["--config-file", "{segmenter}", "--output", "{d}/x.pt2", "--check"],
        ["--check", "--format onnx"],
    ),
    # LazyConfigs
    ("train_net", ["--config-file", "{d}/none.py"], ["no config file", "none.py"]),
    ("train_net", ["--config-file", "{d}/broken.py"], ["broken.py, line 1", "never closed"]),
    ("draw", ["--config-file", "{d}/fails.py"], ["fails.py, line 2", "no_such_thing"]),
    ("compare", ["--config-file", "{d}/needs.py"], ["needs.py, line 1", "no_such_package"]),
    ("train_net", ["--config-file", "{d}/no_model.py"], ["no_model.py", "needs 'model'"]),
    (
        "export",
        ["--config-file", "{d}/no_train.py", "--output", "{d}/x.onnx"],
        ["no_train.py", "needs 'train'", "common/train.py"],
    ),
    (
        "compare",
        ["--config-file", "{d}/no_data.py", "--setting", HALF, "--output", "{d}/out"],
        ["no_data.py", "dataloader.test.dataset", "common/data/coco.py"],
    ),
    (
        "train_net",
        [*LAZY_EVAL, "expedit.alfa=1"],
        ["'alfa' in expedit", "did you mean alpha", "+expedit.alfa"],
    ),
    (
        "compare",
        ["--config-file", "{d}/vitdet.py", "{lazy}", "model.bakbone.square_pad=0"],
        ["'bakbone' in model", "did you mean backbone"],
    ),
    ("train_net", [*LAZY_EVAL, "train.init_chekpoint=x"], ["did you mean init_checkpoint"]),
    ("train_net", [*LAZY_EVAL, "MODEL.WEIGHTS", "x"], ["key.path=value", "'MODEL.WEIGHTS'"]),
    ("train_net", [*LAZY_EVAL, "~train.device"], ["cannot be deleted", "~train.device"]),
    ("train_net", [*LAZY_EVAL, "expedit.alpha=1,2"], ["key.path=value", "expedit.alpha=1,2"]),
    ("train_net", [*LAZY_EVAL, "train.init_checkpoint="], ["train.init_checkpoint is empty"]),
    ("draw", ["--config-file", "{d}/vitdet.py", "{lazy}"], ["vitdet.py", "nothing to compare"]),
    (
        "train_net",
        ["--compare", "--config-file", "{d}/vitdet.py", "{lazy}"],
        ["nothing to compare"],
    ),
    (
        "export",
        ["--config-file", "{d}/vitdet.py", "--output", "{d}/x.onnx", "{lazy}"],
        ["ViTDet", "any size", "--fixed"],
    ),
    # Modules of one's own
    ("train_net", ["--import", "no_such_module", *TRAIN], ["--import", "'no_such_module'"]),
    ("compare", ["--import", "{d}/none.py"], ["--import", "no file", "none.py"]),
    ("draw", ["--import", "{d}/module_broken.py", *TRAIN], ["module_broken.py, line 1"]),
    ("tune", ["--import", "{d}/module_needs.py", "--keep", "9"], ["'no_such_package'"]),
    ("demo", ["--import", ".relative"], ["--import must be a module", "'.relative'"]),
]


@pytest.mark.parametrize(("tool", "command", "words"), CASES)
def test_one_sentence(tool, command, words, places, capfd):
    with pytest.raises(SystemExit) as stopped:
        load_tool(tool).run(filled(command, places))
    assert stopped.value.code == 2
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err
    (line,) = [part for part in captured.err.splitlines() if part.startswith(f"{tool}.py: ")]
    assert captured.err.splitlines()[-1] == line == str(stopped.value)
    assert all(word in line for word in words), line
    assert len(line.split()) > 4  # not words alone


def test_every_tool_is_tried():
    # These two run without Detectron2 and have tests of their own.
    alone = {"install", "benchmark_gpu"}
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} - alone
    assert {tool for tool, _, _ in CASES} == tools
    assert len(CASES) >= 60
