"""A tiny ViTDet as a LazyConfig, its weights, and its evaluation by tools/train_net.py."""

import json
from pathlib import Path

import pytest
import torch

from support.repository import VITDET, load_tool

train_net = load_tool("train_net")

#: In a LazyConfig: the model of the official ViTDet, tiny.
TINY_VITDET = """
model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
model.backbone.net.update(
    img_size=64, patch_size=8, embed_dim=32, depth=3, num_heads=2, window_size=4,
    window_block_indexes=[0, 1], drop_path_rate=0.0, pretrain_img_size=64,
)
model.backbone.update(out_channels=16, scale_factors=(2.0, 1.0, 0.5), square_pad=0)
model.backbone.top_block = None
model.proposal_generator.in_features = ["p2", "p3", "p4"]
model.proposal_generator.head.in_channels = 16
model.proposal_generator.anchor_generator.update(sizes=[[24], [48], [96]], strides=[4, 8, 16])
heads = model.roi_heads
heads.num_classes = 6
for kind in ("box", "mask"):
    heads[kind + "_in_features"] = ["p2", "p3", "p4"]
    heads[kind + "_pooler"].scales = (1 / 4, 1 / 8, 1 / 16)
heads.box_head.update(conv_dims=[16], fc_dims=[16])
heads.box_head.input_shape.channels = heads.mask_head.input_shape.channels = 16
heads.box_predictor.input_shape.channels = 16
heads.box_predictor.test_score_thresh = 0.0
heads.mask_head.conv_dims = [16, 16]
"""

LAZY = (
    """
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
"""
    + TINY_VITDET
    + """
dataloader = dict(
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="{name}", filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=False, image_format="RGB",
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=64, max_size=64)],
        ),
        num_workers=0,
    ),
    evaluator=L(COCOEvaluator)(dataset_name="{name}", output_dir="{output}", use_fast_impl=False),
)
train = model_zoo.get_config("common/train.py").train
"""
)


def make_confident(weights: Path) -> None:
    """Sharpen the classifier of a detector with random weights, so that it finds something."""
    saved = torch.load(weights)
    saved["model"]["roi_heads.box_predictor.cls_score.weight"] *= 1000
    torch.save(saved, weights)


def evaluate(opts, *more, config=VITDET):
    train_net.run(["--eval-only", "--config-file", config, *more, *opts])


def fails(opts, config=VITDET):
    with pytest.raises(SystemExit) as stopped:
        evaluate(opts, config=config)
    message = str(stopped.value)
    assert message.startswith("train_net.py: ") and "\n" not in message
    return message


def predictions(tmp_path):
    (file,) = (tmp_path / "output" / "inference").rglob("coco_instances_results.json")
    return json.loads(file.read_text())
