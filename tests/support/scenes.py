"""Made-up scenes, their files in several formats, and a model that predicts the truth.

Scenes are lists of segments; what "predicts" them goes through ``MaskFormerTrainer.test`` like
any other model, and so through every loader and evaluator.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Instances
from PIL import Image
from pycocotools import mask as mask_util
from torch import nn

from expedit_d2.projects import get_cfg
from expedit_d2.projects.Mask2Former import MaskFormerTrainer
from support.repository import MASK2FORMER

TINY = {
    "MODEL.VIT.DEPTH": 1,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": 0.0,
    "INPUT.CROP.TYPE": "absolute",
    "INPUT.CROP.SIZE": [48, 48],
}
OUTPUTS = ("PANOPTIC", "INSTANCE", "SEMANTIC")


def config(name: str, classes: int, output: Path, outputs: Sequence[str] = OUTPUTS) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(MASK2FORMER)
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
