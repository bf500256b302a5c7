"""Data sets by path and in official layouts: the truth gets full marks, from any spelling.

Scenes are lists of segments; a model that "predicts" them goes through ``MaskFormerTrainer.test``
like any other, and so through every loader and evaluator.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog, detection_utils
from detectron2.data.datasets import builtin
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from detectron2.structures import BitMasks, Instances
from detectron2.utils.file_io import PathManager
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from torch import nn

from expedit_d2.data import register_by_path
from expedit_d2.data.panoptic import class_metadata, semantic_path
from expedit_d2.projects import get_cfg
from expedit_d2.projects.Mask2Former import MaskFormerTrainer, register_panoptic_datasets
from expedit_d2.projects.Mask2Former.data import datasets
from support.repository import ROOT, load_tool

SHARED = ROOT.parent / "shared" / "data"
CONFIG = ROOT / "configs/embedded/mask2former.yaml"
TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.VIT.IMG_SIZE": 64,
    "MODEL.VIT.PRETRAIN_IMG_SIZE": 64,
    "MODEL.VIT.EMBED_DIM": 48,
    "MODEL.VIT.DEPTH": 1,
    "MODEL.VIT.WINDOW_BLOCK_INDEXES": [],
    "MODEL.VIT.OUT_CHANNELS": 32,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 8,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 64,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 256,
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": 0.0,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 128,
    "INPUT.IMAGE_SIZE": 64,
    "INPUT.CROP.TYPE": "absolute",
    "INPUT.CROP.SIZE": [48, 48],
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
}
OUTPUTS = ("PANOPTIC", "INSTANCE", "SEMANTIC")

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def catalogs(monkeypatch, tmp_path):
    """Forgets what a test registers, and keeps its cache in the test's folder."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "cache"))


def config(name: str, classes: int, output: Path, outputs: Sequence[str] = OUTPUTS) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIG))
    for key, value in TINY.items():
        cfg.merge_from_list([key, value])
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = classes
    for key in OUTPUTS:
        cfg.MODEL.MASK_FORMER.TEST[f"{key}_ON"] = key in outputs
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.OUTPUT_DIR = str(output / "output")
    return cfg


# -------------------------------------------------------------------------------------- scenes


class Segment(NamedTuple):
    """A class, by its contiguous id, and its pixels (H, W)."""

    category: int
    mask: np.ndarray
    thing: bool = False
    crowd: bool = False


Scene = list[Segment]


def make_scenes(stuff: tuple[int, int], things: tuple[int, int], crowd: bool) -> list[Scene]:
    """Two scenes, 64 x 96: two kinds of ground, three things, perhaps a crowd, some void."""
    scenes = []
    for shift in (0, 5):
        free = np.ones((64, 96), dtype=bool)
        free[:4, :8] = False
        scene = []

        def add(category, top, left, height, width, free=free, scene=scene, **kind):
            mask = np.zeros_like(free)
            mask[top : top + height, left : left + width] = True
            scene.append(Segment(category, mask & free, **kind))
            free &= ~mask

        add(things[0], 10, 10 + shift, 20, 15, thing=True)
        add(things[0], 12, 50, 14 + shift, 20, thing=True)
        add(things[1], 38, 30, 20, 12 + shift, thing=True)
        if crowd:
            add(things[1], 36, 70, 16, 20, thing=True, crowd=True)
        add(stuff[0], 0, 0, 32, 96)
        add(stuff[1], 32, 0, 32, 96)
        scenes.append(scene)
    return scenes


def semantic(scene: Scene) -> np.ndarray:
    labels = np.full(scene[0].mask.shape, 255, dtype=np.uint8)
    for segment in scene:
        labels[segment.mask] = segment.category
    return labels


class Perfect(nn.Module):
    """Predicts the truth; images are told apart by the names of their files."""

    def __init__(self, scenes: dict[str, Scene], classes: int) -> None:
        super().__init__()
        self.scenes, self.classes = scenes, classes

    def forward(self, batch: list[dict]) -> list[dict]:
        return [self.predict(self.scenes[Path(x["file_name"]).name]) for x in batch]

    def predict(self, scene: Scene) -> dict:
        """Crowds are of their class, but are neither segments nor instances."""
        size = scene[0].mask.shape
        ids = torch.zeros(size, dtype=torch.int32)
        scores = torch.zeros(self.classes, *size)
        info = []
        for number, (category, mask, thing, crowd) in enumerate(scene, start=1):
            scores[category, torch.from_numpy(mask)] = 1
            if not crowd:
                ids[torch.from_numpy(mask)] = number
                info.append({"id": number, "category_id": category, "isthing": thing})
        things = [s for s in scene if s.thing and not s.crowd]
        masks = torch.from_numpy(np.stack([s.mask for s in things] or [np.zeros(size, bool)]))
        masks = masks[: len(things)]
        found = Instances(
            size,
            pred_masks=masks,
            pred_boxes=BitMasks(masks).get_bounding_boxes(),
            pred_classes=torch.tensor([s.category for s in things], dtype=torch.int64),
            scores=torch.ones(len(things)),
        )
        return {"panoptic_seg": (ids, info), "instances": found, "sem_seg": scores}


def evaluate(name, scenes, classes, output, outputs=OUTPUTS) -> dict[str, float]:
    """Headlines of the perfect model, rounded."""
    cfg = config(name, classes, output, outputs)
    results = MaskFormerTrainer.test(cfg, Perfect(scenes, classes))
    return {key: round(value, 6) for key, value in headlines(results).items()}


def evaluate_random(name, classes, output, outputs=OUTPUTS) -> dict[str, float]:
    torch.manual_seed(0)
    cfg = config(name, classes, output, outputs)
    return headlines(MaskFormerTrainer.test(cfg, MaskFormerTrainer.build_model(cfg)))


def headlines(results: dict) -> dict[str, float]:
    names = {"panoptic_seg": "PQ", "segm": "AP", "sem_seg": "mIoU"}
    return {names[task]: values[names[task]] for task, values in results.items()}


def perfect(*metrics: str) -> dict[str, float]:
    return dict.fromkeys(metrics, 100.0)


# --------------------------------------------------------------------------------- their files


def write_image(path: Path, scene: Scene) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([semantic(scene)] * 3, axis=2)).save(path)


def write_labels(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


def write_panoptic_png(path: Path, scene: Scene, category_ids: Sequence[int]) -> list[dict]:
    """A panoptic PNG with ids of more than a byte; returns its ``segments_info``."""
    ids = np.zeros(scene[0].mask.shape, dtype=np.int64)
    info = []
    for number, segment in enumerate(scene, start=1):
        ids[segment.mask] = 70001 * number
        info.append(
            {
                "id": 70001 * number,
                "category_id": category_ids[segment.category],
                "area": int(segment.mask.sum()),
                "iscrowd": int(segment.crowd),
                "bbox": mask_util.toBbox(
                    mask_util.encode(np.asfortranarray(segment.mask))
                ).tolist(),
            }
        )
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=2)
    write_labels(path, colors.astype(np.uint8))
    return info


CATEGORIES = [
    {"id": 30, "name": "road", "isthing": 0},  # not in order
    {"id": 3, "name": "cat", "isthing": 1},
    {"id": 8, "name": "sky", "isthing": 0},
    {"id": 9, "name": "dog", "isthing": 1},
]
IDS = (3, 8, 9, 30)  # things 0 and 2: with a gap
SCENES = {
    f"{number}.jpg": scene
    for number, scene in enumerate(make_scenes(stuff=(1, 3), things=(0, 2), crowd=True))
}


def write_panoptic(file: Path, images: Path, pngs: Path) -> Path:
    """SCENES as a COCO panoptic file; returns it."""
    annotations = []
    for number, (name, scene) in enumerate(SCENES.items()):
        write_image(images / name, scene)
        png = f"{number}.png"
        info = write_panoptic_png(pngs / png, scene, IDS)
        annotations.append({"image_id": 10 + number, "file_name": png, "segments_info": info})
    listed = [
        {"id": 10 + number, "file_name": name, "height": 64, "width": 96}
        for number, name in enumerate(SCENES)
    ]
    content = {"images": listed, "annotations": annotations, "categories": CATEGORIES}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


# -------------------------------------------------------------------------------- COCO panoptic


def test_panoptic_by_path_in_the_layout_of_coco(tmp_path):
    labels = tmp_path / "annotations"
    file = write_panoptic(
        labels / "panoptic_val2017.json", tmp_path / "val2017", labels / "panoptic_val2017"
    )
    name = str(file)
    register_by_path([name])
    register_by_path([name])
    before = sorted(tmp_path.rglob("*"))
    assert evaluate(name, SCENES, 4, tmp_path / "run") == perfect("PQ", "AP", "mIoU")
    written = {p.relative_to(tmp_path).parts[0] for p in set(tmp_path.rglob("*")) - set(before)}
    assert written == {"cache", "run"}
    random = evaluate_random(name, 4, tmp_path / "random")
    assert set(random) == {"PQ", "AP", "mIoU"} and max(random.values()) < 50


@pytest.mark.parametrize(
    "spelling,images,pngs",
    [
        ("{root}/p.json", "", "p"),
        ("{root}/p.json", "images", ""),
        ("{root}/p.json@far/away", "far/away", "p"),
        ("{root}/p.json@{root}/far@maps", "far", "maps"),
        ("{root}/p.json@@{root}/maps", "images", "maps"),
    ],
)
def test_spellings_of_panoptic_files(tmp_path, spelling, images, pngs):
    write_panoptic(tmp_path / "p.json", tmp_path / images, tmp_path / pngs)
    name = spelling.format(root=tmp_path)
    register_by_path([name])
    meta = MetadataCatalog.get(name)
    assert meta.thing_classes == ["cat", "dog"]
    assert meta.stuff_classes == ["cat", "sky", "dog", "road"]
    assert meta.evaluator_type == "coco_panoptic_seg"
    for record, scene in zip(DatasetCatalog.get(name), SCENES.values(), strict=True):
        assert Path(record["file_name"]).parent == tmp_path / images
        assert Path(record["pan_seg_file_name"]).parent == tmp_path / pngs
        assert [s["category_id"] for s in record["segments_info"]] == [s.category for s in scene]
        assert [s["isthing"] for s in record["segments_info"]] == [s.thing for s in scene]
        drawn = detection_utils.read_image(record["sem_seg_file_name"])
        assert drawn.dtype == np.uint8 and np.array_equal(drawn, semantic(scene))


def test_instances_of_a_panoptic_file_are_written_once_and_again_after_a_change(tmp_path):
    file = write_panoptic(tmp_path / "p.json", tmp_path, tmp_path / "p")
    register_by_path([str(file)])
    json_file = MetadataCatalog.get(str(file)).json_file
    first = Path(PathManager.get_local_path(json_file))
    assert first.parent == tmp_path / "cache" / "by_path"
    stamp = first.stat().st_mtime_ns
    assert PathManager.get_local_path(json_file) == str(first)
    assert first.stat().st_mtime_ns == stamp
    with PathManager.open(json_file) as opened:
        assert opened.read() == first.read_text()
    coco = COCO(str(first))
    things = [s for scene in SCENES.values() for s in scene if s.thing]
    for annotation, segment in zip(coco.loadAnns(coco.getAnnIds()), things, strict=True):
        assert np.array_equal(coco.annToMask(annotation), segment.mask)
        assert annotation["category_id"] == IDS[segment.category]
        assert annotation["iscrowd"] == segment.crowd and annotation["area"] == segment.mask.sum()
    content = json.loads(file.read_text())
    content["annotations"].pop()
    file.write_text(json.dumps(content))
    second = Path(PathManager.get_local_path(json_file))
    assert second != first and len(json.loads(second.read_text())["images"]) == 1


def test_semantic_labels_of_more_than_255_classes(tmp_path):
    categories = [{"id": i, "name": str(i), "isthing": 0} for i in range(300)]
    ignore = class_metadata(categories)["ignore_label"]
    write_panoptic_png(tmp_path / "a.png", SCENES["0.jpg"], IDS)
    segments = [{"id": 70001, "category_id": 255}, {"id": 70001 * 3, "category_id": 299}]
    path = semantic_path(str(tmp_path / "a.png"), segments, ignore)
    labels = detection_utils.read_image(path)
    assert np.unique(labels).tolist() == [255, 299, 65535]
    assert np.array_equal(labels == 299, SCENES["0.jpg"][2].mask)


def test_crowds_count_neither_for_nor_against(tmp_path):
    name = str(write_panoptic(tmp_path / "p.json", tmp_path, tmp_path / "p"))
    register_by_path([name])
    found = {k: [s._replace(crowd=False) for s in scene] for k, scene in SCENES.items()}
    results = evaluate(name, found, 4, tmp_path, ("PANOPTIC", "INSTANCE"))
    assert results == perfect("PQ", "AP")
    wrong = {
        k: [s._replace(category=0, crowd=False) if s.crowd else s for s in scene]
        for k, scene in SCENES.items()
    }
    assert evaluate(name, wrong, 4, tmp_path, ("PANOPTIC",))["PQ"] < 100


@pytest.mark.parametrize(
    "mapper,classes",
    [
        ("mask_former_panoptic", {0, 1, 2, 3}),
        ("mask_former_semantic", {0, 1, 2, 3}),
        ("coco_panoptic_lsj", {0, 1, 2, 3}),
    ],
)
def test_mappers_read_panoptic_files(tmp_path, mapper, classes):
    name = str(write_panoptic(tmp_path / "p.json", tmp_path, tmp_path / "p"))
    register_by_path([name])
    cfg = config(name, 4, tmp_path)
    cfg.INPUT.DATASET_MAPPER_NAME = mapper
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 1.0
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.9
    seen: set[int] = set()
    for _, batch in zip(range(4), MaskFormerTrainer.build_train_loader(cfg), strict=False):
        for sample in batch:
            assert sample["instances"].gt_masks.shape[1:] == sample["image"].shape[1:]
            seen |= set(sample["instances"].gt_classes.tolist())
    assert seen == classes


def test_train_net_trains_and_evaluates_by_path(tmp_path):
    name = str(write_panoptic(tmp_path / "p.json", tmp_path, tmp_path / "p"))
    cfg = config(name, 4, tmp_path)
    cfg.SOLVER.MAX_ITER = 1
    cfg.TEST.EVAL_PERIOD = 1
    (tmp_path / "config.yaml").write_text(cfg.dump())
    load_tool("train_net").run(["--config-file", str(tmp_path / "config.yaml")])
    metrics = (tmp_path / "output" / "metrics.json").read_text().splitlines()[-1]
    assert {"panoptic_seg/PQ", "segm/AP", "sem_seg/mIoU"} <= set(json.loads(metrics))


def _without_isthing(content):
    del content["categories"][0]["isthing"]


def _without_iscrowd(content):
    del content["annotations"][0]["segments_info"][0]["iscrowd"]


def _of_no_image(content):
    content["annotations"][1]["image_id"] = 99


def _of_no_category(content):
    content["annotations"][0]["segments_info"][0]["category_id"] = 77


def _of_one_name(content):
    content["images"][1]["file_name"] = "deep/0.png"


@pytest.mark.parametrize(
    "spoil,message",
    [
        (_without_isthing, "'road' has no 'isthing'"),
        (_without_iscrowd, "image 10 has no 'iscrowd'"),
        (_of_no_image, "image_id 99"),
        (_of_no_category, "category_id 77"),
        (_of_one_name, "named '0'"),
    ],
)
def test_broken_panoptic_files_are_refused_at_once(tmp_path, spoil, message):
    file = write_panoptic(tmp_path / "p.json", tmp_path, tmp_path / "p")
    content = json.loads(file.read_text())
    spoil(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"DATASETS.*p.json is no COCO panoptic file.*{message}"):
        register_by_path([str(file)])


def test_missing_panoptic_pngs_are_named(tmp_path):
    name = str(write_panoptic(tmp_path / "p.json", tmp_path, tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=r"DATASETS.*first panoptic PNG 0\.png is not in"):
        register_by_path([name])
    assert name not in DatasetCatalog.list()


def test_quality_without_stuff_is_refused(tmp_path):
    file = write_panoptic(tmp_path / "p.json", tmp_path, tmp_path / "p")
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["isthing"] = 1
    file.write_text(json.dumps(content))
    register_by_path([str(file)])
    with pytest.raises(ValueError, match="has no stuff.*PANOPTIC_ON False"):
        evaluate(str(file), SCENES, 4, tmp_path)


# ---------------------------------------------------------------------------- folders of labels


@pytest.fixture
def folder(tmp_path) -> Path:
    """Label PNGs one folder down; images beside, in ``images``."""
    for name, scene in SCENES.items():
        write_labels(tmp_path / "labels" / "val" / "town" / f"{name[:-4]}.png", semantic(scene))
        write_image(tmp_path / "images" / "val" / "town" / name, scene)
    return tmp_path / "labels" / "val"


@pytest.mark.parametrize("given", ["", "@{root}/images/val", "@../images/val"])
def test_semantic_folders(folder, tmp_path, given):
    name = f"{folder}{given.format(root=tmp_path)}"
    register_by_path([name])
    assert MetadataCatalog.get(name).stuff_classes == ["0", "1", "2", "3"]
    assert evaluate(name, SCENES, 4, tmp_path, ("SEMANTIC",)) == perfect("mIoU")
    assert set(evaluate_random(name, 4, tmp_path, ("SEMANTIC",))) == {"mIoU"}


@pytest.mark.parametrize("file", ["classes.txt", "classes.json"])
def test_names_of_classes_may_be_listed(folder, tmp_path, file):
    names = ["cat", "sky", "dog", "road", "unseen"]
    text = "\n".join(names) + "\n" if file.endswith("txt") else json.dumps(names)
    (folder / file).write_text(text)
    register_by_path([str(folder)])
    assert MetadataCatalog.get(str(folder)).stuff_classes == names
    assert evaluate(str(folder), SCENES, 5, tmp_path, ("SEMANTIC",)) == perfect("mIoU")


def test_labels_and_images_of_one_folder(tmp_path):
    for name, scene in SCENES.items():
        write_labels(tmp_path / f"{name[:-4]}.png", semantic(scene))
        write_image(tmp_path / name, scene)
    register_by_path([str(tmp_path)])
    records = DatasetCatalog.get(str(tmp_path))
    assert [Path(r["file_name"]).name for r in records] == ["0.jpg", "1.jpg"]


def test_labels_that_are_no_classes_are_refused(folder, tmp_path):
    (folder / "classes.txt").write_text("cat\nsky\n")
    register_by_path([str(folder)])
    with pytest.raises(ValueError, match="has the label 3, but .* has 2 classes"):
        known = {k: [s for s in scene if s.category < 2] for k, scene in SCENES.items()}
        evaluate(str(folder), known, 2, tmp_path, ("SEMANTIC",))
    with pytest.raises(ValueError, match="has 2 classes, but the model has 9 .*NUM_CLASSES"):
        evaluate(str(folder), SCENES, 9, tmp_path, ("SEMANTIC",))


def test_broken_folders_are_named(folder, tmp_path):
    def refuses(name, error, match):
        valid = ".*valid are" if error is FileNotFoundError else ""
        with pytest.raises(error, match=f"DATASETS.TEST or DATASETS.TRAIN.*{match}{valid}"):
            register_by_path([name])

    refuses(f"{tmp_path}/nothing@images", FileNotFoundError, "nothing does not exist")
    refuses(f"{tmp_path}@{tmp_path}/nothing", FileNotFoundError, "no image in")
    (tmp_path / "empty").mkdir()
    refuses(f"{tmp_path}/empty", FileNotFoundError, "no PNG in the folder")
    (folder / "classes.json").write_text('{"0": "cat"}')
    refuses(str(folder), ValueError, "does not list 1 to 255 names")
    (folder / "classes.json").write_text("{")
    refuses(str(folder), ValueError, "cannot be read")
    (folder / "classes.json").unlink()
    (tmp_path / "images" / "val" / "town" / "1.jpg").unlink()
    refuses(str(folder), FileNotFoundError, r"no image of 1 labels, .*1\.png")
    write_image(folder / "town" / "0.png", SCENES["0.jpg"])
    refuses(str(folder), ValueError, "has colours")


# ------------------------------------------------------------------------------- COCO instances


@pytest.fixture
def coco(tmp_path) -> Callable[[str, str], Path]:
    """Writes a two-category instance file with one image; returns a function of their places."""

    def write(file, image):
        for path in (tmp_path / file, tmp_path / image):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20)).save(tmp_path / image)
        annotation = {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4], "area": 12}
        content = {
            "images": [{"id": 7, "file_name": "a.png", "height": 20, "width": 30}],
            "annotations": [annotation | {"iscrowd": 0, "segmentation": [[1, 2, 4, 2, 4, 6]]}],
            "categories": [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}],
        }
        (tmp_path / file).write_text(json.dumps(content))
        return tmp_path / file

    return write


@pytest.mark.parametrize(
    "image", ["labels/a.png", "labels/images/a.png", "images/a.png", "val2017/a.png"]
)
def test_images_are_found_near_the_file(coco, tmp_path, image):
    name = str(coco("labels/instances_val2017.json", image))
    register_by_path([name, "coco_2017_val"])
    register_by_path([name])
    meta = MetadataCatalog.get(name)
    assert meta.thing_classes == ["cat", "dog"] and meta.evaluator_type == "coco"
    (record,) = DatasetCatalog.get(name)
    assert Path(record["file_name"]).resolve() == (tmp_path / image).resolve()
    assert record["annotations"][0]["category_id"] == 1


@pytest.mark.parametrize("given", ["{root}/far/aw@y", "far/aw@y"])
def test_the_image_folder_can_be_given(coco, tmp_path, given):
    name = f"{coco('x.json', 'far/aw@y/a.png')}@{given.format(root=tmp_path)}"
    register_by_path((name,))
    assert DatasetCatalog.get(name)[0]["file_name"] == str(tmp_path / "far" / "aw@y" / "a.png")


def test_names_of_another_kind_are_left_alone():
    before = DatasetCatalog.list()
    register_by_path(["collage_val", f"nothing_{uuid.uuid4().hex}", "folder/nothing"])
    assert DatasetCatalog.list() == before


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError) as error:
        register_by_path(["no/such.json"])
    for part in ("DATASETS.TEST", "DATASETS.TRAIN", "'no/such.json'", "does not exist", "valid"):
        assert part in str(error.value)


def test_missing_images_are_named(coco, tmp_path):
    file = coco("labels/instances.json", "elsewhere/a.png")
    with pytest.raises(FileNotFoundError, match=r"first image a\.png is not in .*labels.*images"):
        register_by_path([str(file)])
    with pytest.raises(FileNotFoundError, match="DATASETS.TEST"):
        register_by_path([f"{file}@{tmp_path / 'nowhere'}"])
    assert str(file) not in DatasetCatalog.list()


@pytest.mark.parametrize("text", ["{", "[]", '{"images": []}', '{"images": [{"id": 1}]}'])
def test_a_file_of_another_format_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="no COCO instance file"):
        register_by_path([str(tmp_path / "x.json")])


# ----------------------------------------------------------------------------- official layouts


@pytest.fixture
def official(monkeypatch, tmp_path) -> Path:
    """The folder of all data sets; Detectron2's and our names lead there."""
    root = tmp_path / "datasets"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    monkeypatch.setattr(DatasetCatalog, "data", {})
    monkeypatch.setattr(MetadataCatalog, "data", {})
    for register in (
        builtin.register_all_coco,
        builtin.register_all_ade20k,
        builtin.register_all_cityscapes,
        builtin.register_all_cityscapes_panoptic,
    ):
        register(str(root))
    register_panoptic_datasets()
    return root


def write_official(
    scenes: dict[str, Scene],
    meta: Metadata,
    image_id: Callable[[str], int | str],
) -> None:
    """Images, semantic and panoptic PNGs, and both JSON files, where the metadata say."""
    classes = meta.stuff_dataset_id_to_contiguous_id
    things = meta.thing_dataset_id_to_contiguous_id
    images, panoptic, instances = [], [], []
    for name, scene in scenes.items():
        png = f"{Path(name).stem}.png"
        write_image(Path(meta.image_root) / name, scene)
        write_labels(Path(meta.sem_seg_root) / png, semantic(scene))
        info = write_panoptic_png(Path(meta.panoptic_root) / png, scene, list(classes))
        image = {"id": image_id(Path(name).stem), "file_name": name, "height": 64, "width": 96}
        images.append(image)
        panoptic.append({"image_id": image["id"], "file_name": png, "segments_info": info})
        for segment, s in zip(scene, info, strict=True):
            if segment.thing:
                code = mask_util.encode(np.asfortranarray(segment.mask))
                code["counts"] = code["counts"].decode()
                own = {"image_id": image["id"], "id": len(instances) + 1, "segmentation": code}
                instances.append({**s, **own})
    for file, ids, annotated in (
        (meta.panoptic_json, classes, panoptic),
        (meta.json_file, things, instances),
    ):
        # Official files of ADE20K do not agree on names.
        categories = [{"id": i, "name": f"another {i}", "isthing": int(i in things)} for i in ids]
        content = {"images": images, "annotations": annotated, "categories": categories}
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps(content))


def test_ade20k(official, tmp_path):
    wall, floor, bed, person = 0, 3, 7, 12
    scenes = {
        f"ADE_val_0000000{i}.jpg": scene
        for i, scene in enumerate(make_scenes((wall, floor), (bed, person), crowd=False), start=1)
    }
    name = "ade20k_panoptic_val"
    write_official(scenes, MetadataCatalog.get(name), str)
    top = official / "ADEChallengeData2016"
    for path in (
        "images/validation/ADE_val_00000001.jpg",
        "annotations_detectron2/validation/ADE_val_00000001.png",
        "ade20k_panoptic_val/ADE_val_00000001.png",
        "ade20k_panoptic_val.json",
        "ade20k_instance_val.json",
    ):
        assert (top / path).is_file()
    assert evaluate(name, scenes, 150, tmp_path) == perfect("PQ", "AP", "mIoU")
    assert set(evaluate_random(name, 150, tmp_path)) == {"PQ", "AP", "mIoU"}
    name = "ade20k_sem_seg_val"
    assert evaluate(name, scenes, 150, tmp_path, ("SEMANTIC",)) == perfect("mIoU")
    assert set(evaluate_random(name, 150, tmp_path, ("SEMANTIC",))) == {"mIoU"}
    name = "ade20k_instance_val"
    things = {bed: 0, person: 3}
    numbered = {
        k: [s._replace(category=things[s.category]) for s in scene if s.thing]
        for k, scene in scenes.items()
    }
    assert evaluate(name, numbered, 100, tmp_path, ("INSTANCE",)) == perfect("AP")
    assert set(evaluate_random(name, 100, tmp_path, ("INSTANCE",))) == {"AP"}


def test_coco(official, tmp_path):
    dog, pizza, sky, wall = 16, 53, 119, 131
    scenes = {
        f"00000000000{i}.jpg": scene
        for i, scene in enumerate(make_scenes((sky, wall), (dog, pizza), crowd=True))
    }
    name = "coco_2017_val_panoptic_with_sem_seg"
    write_official(scenes, MetadataCatalog.get(name), int)
    for path in (
        "val2017/000000000001.jpg",
        "panoptic_val2017/000000000001.png",
        "panoptic_semseg_val2017/000000000001.png",
        "annotations/panoptic_val2017.json",
        "annotations/instances_val2017.json",
    ):
        assert (official / "coco" / path).is_file()
    assert evaluate(name, scenes, 133, tmp_path) == perfect("PQ", "AP", "mIoU")
    assert set(evaluate_random(name, 133, tmp_path)) == {"PQ", "AP", "mIoU"}


def test_ade20k_instances_are_the_hundred_things():
    for split in ("train", "val"):
        meta = MetadataCatalog.get(f"ade20k_instance_{split}")
        panoptic = MetadataCatalog.get(f"ade20k_panoptic_{split}")
        assert meta.thing_classes == panoptic.thing_classes and len(meta.thing_classes) == 100
        ids = meta.thing_dataset_id_to_contiguous_id
        assert list(ids.values()) == list(range(100)) and [*ids][:4] == [7, 8, 10, 12]
        assert meta.evaluator_type == "coco"
        assert meta.json_file.endswith(f"ADEChallengeData2016/ade20k_instance_{split}.json")


def write_cityscapes(root: Path) -> dict[str, Scene]:
    """Road and sky, cars and people: images, the four label files of each, panoptic labels."""
    road, sky, person, car = (
        next(c for c in CITYSCAPES_CATEGORIES if c["name"] == name)
        for name in ("road", "sky", "person", "car")
    )
    kinds = {c["trainId"]: c for c in (road, sky, person, car)}
    made = make_scenes(
        *[(a["trainId"], b["trainId"]) for a, b in ((sky, road), (car, person))], False
    )
    scenes, images, annotations = {}, [], []
    for number, scene in enumerate(made):
        stem = f"frankfurt_000000_00029{number}"
        scenes[f"{stem}_leftImg8bit.png"] = scene
        write_image(root / f"leftImg8bit/val/frankfurt/{stem}_leftImg8bit.png", scene)
        labels = np.zeros((64, 96), dtype=np.uint8)
        ids = np.zeros((64, 96), dtype=np.uint16)
        objects = []
        for index, segment in enumerate(scene):
            kind = kinds[segment.category]
            labels[segment.mask] = kind["id"]
            ids[segment.mask] = kind["id"] * 1000 + index if segment.thing else kind["id"]
            rows, columns = np.nonzero(segment.mask)
            left, top, right, bottom = columns.min(), rows.min(), columns.max(), rows.max()
            corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
            polygon = [[int(x), int(y)] for x, y in corners]
            # Later ones are on top.
            objects.insert(0, {"label": kind["name"], "polygon": polygon})
        gt = root / "gtFine/val/frankfurt"
        write_labels(gt / f"{stem}_gtFine_labelIds.png", labels)
        write_labels(gt / f"{stem}_gtFine_labelTrainIds.png", semantic(scene))
        write_labels(gt / f"{stem}_gtFine_instanceIds.png", ids)
        polygons = {"imgHeight": 64, "imgWidth": 96, "objects": objects}
        (gt / f"{stem}_gtFine_polygons.json").write_text(json.dumps(polygons))
        png = f"{stem}_gtFine_panoptic.png"
        by_class = {c: kind["id"] for c, kind in kinds.items()}
        info = write_panoptic_png(root / "gtFine/cityscapes_panoptic_val" / png, scene, by_class)
        images.append({"id": stem, "file_name": f"{stem}_gtFine_leftImg8bit.png"})
        annotations.append({"image_id": stem, "file_name": png, "segments_info": info})
    categories = [{k: c[k] for k in ("id", "name", "isthing")} for c in CITYSCAPES_CATEGORIES]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "gtFine/cityscapes_panoptic_val.json").write_text(json.dumps(content))
    return scenes


def test_cityscapes_panoptic_quality_needs_no_other_package(official, tmp_path):
    scenes = write_cityscapes(official / "cityscapes")
    name = "cityscapes_fine_panoptic_val"
    assert evaluate(name, scenes, 19, tmp_path, ("PANOPTIC",)) == perfect("PQ")
    assert set(evaluate_random(name, 19, tmp_path, ("PANOPTIC",))) == {"PQ"}


def test_cityscapes_says_what_to_install(official, tmp_path, monkeypatch):
    scenes = write_cityscapes(official / "cityscapes")
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    for name, outputs, packages in (
        ("cityscapes_fine_panoptic_val", OUTPUTS, "cityscapesscripts"),
        ("cityscapes_fine_sem_seg_val", ("SEMANTIC",), "cityscapesscripts"),
        ("cityscapes_fine_instance_seg_val", ("INSTANCE",), "cityscapesscripts shapely"),
    ):
        with pytest.raises(ModuleNotFoundError, match=f"{name}.*: pip install {packages}$"):
            evaluate(name, scenes, 19, tmp_path, outputs)
    cfg = config(name, 8, tmp_path, ("INSTANCE",))
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_instance"
    (tmp_path / "config.yaml").write_text(cfg.dump())
    with pytest.raises(SystemExit, match="^train_net.py: the data set .* pip install"):
        load_tool("train_net").run(["--config-file", str(tmp_path / "config.yaml")])
    register_panoptic_datasets()
    assert getattr(DatasetCatalog[name].args[-1], "func", None) is None  # wrapped once


def test_cityscapes(official, tmp_path, monkeypatch):
    pytest.importorskip("cityscapesscripts")
    monkeypatch.chdir(tmp_path)  # cityscapesScripts writes matches.json wherever it runs
    scenes = write_cityscapes(official / "cityscapes")
    name = "cityscapes_fine_panoptic_val"
    assert evaluate(name, scenes, 19, tmp_path) == perfect("PQ", "AP", "mIoU")
    assert set(evaluate_random(name, 19, tmp_path)) == {"PQ", "AP", "mIoU"}
    name = "cityscapes_fine_sem_seg_val"
    assert evaluate(name, scenes, 19, tmp_path, ("SEMANTIC",)) == perfect("mIoU")
    pytest.importorskip("shapely")
    name = "cityscapes_fine_instance_seg_val"
    classes = MetadataCatalog.get(name).thing_classes
    things = {13: classes.index("car"), 11: classes.index("person")}
    numbered = {
        k: [s._replace(category=things[s.category]) for s in scene if s.thing]
        for k, scene in scenes.items()
    }
    assert evaluate(name, numbered, 8, tmp_path, ("INSTANCE",)) == perfect("AP")
    assert set(evaluate_random(name, 8, tmp_path, ("INSTANCE",))) == {"AP"}


# ----------------------------------------------------------------------------------- real images


def shared(folder: str) -> Path:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"shared/data/{folder} is not here")
    return SHARED / folder


def test_real_panoptic_sample(tmp_path):
    root = shared("coco_panoptic_sample")
    name = f"{root}/panoptic_examples.json@input_images"
    register_by_path([name])
    scenes = {}
    for record in DatasetCatalog.get(name):
        colors = np.asarray(Image.open(record["pan_seg_file_name"])).astype(np.int64)
        ids = colors @ [1, 256, 65536]
        scenes[Path(record["file_name"]).name] = [
            Segment(s["category_id"], ids == s["id"], s["isthing"], bool(s["iscrowd"]))
            for s in record["segments_info"]
        ]
    assert any(s.crowd for scene in scenes.values() for s in scene)
    assert evaluate(name, scenes, 133, tmp_path) == perfect("PQ", "AP", "mIoU")
    assert set(evaluate_random(name, 133, tmp_path)) == {"PQ", "AP", "mIoU"}


def test_real_ade20k_sample(tmp_path):
    """Its labels begin at 1, with 0 for "other": prepared as the official script does."""
    root = shared("ade20k_sample")
    scenes = {}
    for file in sorted((root / "annotations").iterdir()):
        labels = np.asarray(Image.open(file)) - np.uint8(1)
        write_labels(tmp_path / "labels" / file.name, labels)
        scenes[f"{file.stem}.jpg"] = [
            Segment(int(c), labels == c) for c in np.unique(labels) if c != 255
        ]
    names = MetadataCatalog.get("ade20k_sem_seg_val").stuff_classes
    (tmp_path / "labels" / "classes.json").write_text(json.dumps(names))
    name = f"{tmp_path}/labels@{root}/images"
    register_by_path([name])
    assert evaluate(name, scenes, 150, tmp_path, ("SEMANTIC",)) == perfect("mIoU")
    assert set(evaluate_random(name, 150, tmp_path, ("SEMANTIC",))) == {"mIoU"}


def test_real_instances(tmp_path):
    name = str(shared("minicoco") / "labels" / "val.json")
    register_by_path([name])
    records = DatasetCatalog.get(name)
    assert len(records) == 10 and all(Path(r["file_name"]).is_file() for r in records)
    truth = COCO(name)
    scenes = {
        Path(record["file_name"]).name: [
            Segment(a["category_id"] - 1, truth.annToMask(a).astype(bool), True, bool(a["iscrowd"]))
            for a in truth.imgToAnns[record["image_id"]]
        ]
        for record in records
    }
    assert evaluate(name, scenes, 3, tmp_path, ("INSTANCE",)) == perfect("AP")
    assert set(evaluate_random(name, 3, tmp_path, ("INSTANCE",))) == {"AP"}
