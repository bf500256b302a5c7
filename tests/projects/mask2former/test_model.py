"""The whole Mask2Former: official keys and configs, any input, checkpoints, and learning."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import nn

from expedit_d2.projects import Mask2Former, get_cfg
from expedit_d2.projects.Mask2Former import add_maskformer2_config
from support.repository import MASK2FORMER

CONFIGS = Path(Mask2Former.__file__).parent / "configs"
PANOPTIC_R50 = CONFIGS / "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"


def config(path: Path | None = None, **changes) -> CfgNode:
    cfg = get_cfg()
    add_maskformer2_config(cfg)
    if path is not None:
        cfg.merge_from_file(str(path))
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


# ------------------------------------------------------------------------------ official keys


def resnet_keys(depths=(3, 4, 6, 3)) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Detectron2's ResNet with frozen batch norm."""
    keys = {}

    def conv(name: str, inputs: int, outputs: int, side: int) -> None:
        keys[name + ".weight"] = (outputs, inputs, side, side)
        for part in ("weight", "bias", "running_mean", "running_var"):
            keys[f"{name}.norm.{part}"] = (outputs,)

    conv("backbone.stem.conv1", 3, 64, 7)
    inputs = 64
    for stage, depth in enumerate(depths):
        width, outputs = 64 * 2**stage, 256 * 2**stage
        for block in range(depth):
            name = f"backbone.res{stage + 2}.{block}"
            if block == 0:
                conv(f"{name}.shortcut", inputs, outputs, 1)
            conv(f"{name}.conv1", inputs, width, 1)
            conv(f"{name}.conv2", width, width, 3)
            conv(f"{name}.conv3", width, outputs, 1)
            inputs = outputs
    return keys


def head_keys(
    channels=(256, 512, 1024, 2048), dim=256, classes=133, queries=100, encoder=6, decoder=9
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the head, from the architecture: 3 levels, 8 heads, 4 points."""
    keys = {}

    def affine(name: str, inputs: int, outputs: int, kernel: tuple[int, ...] = ()) -> None:
        keys[name + ".weight"] = (outputs, inputs, *kernel)
        keys[name + ".bias"] = (outputs,)

    def norm(name: str) -> None:
        keys[name + ".weight"] = keys[name + ".bias"] = (dim,)

    pixel = "sem_seg_head.pixel_decoder"
    for level, inputs in enumerate(reversed(channels[1:])):
        affine(f"{pixel}.input_proj.{level}.0", inputs, dim, (1, 1))
        norm(f"{pixel}.input_proj.{level}.1")
    keys[f"{pixel}.transformer.level_embed"] = (3, dim)
    for layer in range(encoder):
        name = f"{pixel}.transformer.encoder.layers.{layer}"
        affine(f"{name}.self_attn.sampling_offsets", dim, 8 * 3 * 4 * 2)
        affine(f"{name}.self_attn.attention_weights", dim, 8 * 3 * 4)
        affine(f"{name}.self_attn.value_proj", dim, dim)
        affine(f"{name}.self_attn.output_proj", dim, dim)
        norm(f"{name}.norm1")
        affine(f"{name}.linear1", dim, 1024)
        affine(f"{name}.linear2", 1024, dim)
        norm(f"{name}.norm2")
    keys[f"{pixel}.adapter_1.weight"] = (dim, channels[0], 1, 1)
    norm(f"{pixel}.adapter_1.norm")
    keys[f"{pixel}.layer_1.weight"] = (dim, dim, 3, 3)
    norm(f"{pixel}.layer_1.norm")
    affine(f"{pixel}.mask_features", dim, dim, (1, 1))

    predictor = "sem_seg_head.predictor"
    for layer in range(decoder):
        for kind, attention in (("self", "self_attn"), ("cross", "multihead_attn")):
            name = f"{predictor}.transformer_{kind}_attention_layers.{layer}"
            keys[f"{name}.{attention}.in_proj_weight"] = (3 * dim, dim)
            keys[f"{name}.{attention}.in_proj_bias"] = (3 * dim,)
            affine(f"{name}.{attention}.out_proj", dim, dim)
            norm(f"{name}.norm")
        name = f"{predictor}.transformer_ffn_layers.{layer}"
        affine(f"{name}.linear1", dim, 2048)
        affine(f"{name}.linear2", 2048, dim)
        norm(f"{name}.norm")
    norm(f"{predictor}.decoder_norm")
    keys[f"{predictor}.query_feat.weight"] = (queries, dim)
    keys[f"{predictor}.query_embed.weight"] = (queries, dim)
    keys[f"{predictor}.level_embed.weight"] = (3, dim)
    affine(f"{predictor}.class_embed", dim, classes + 1)
    for layer in range(3):
        affine(f"{predictor}.mask_embed.layers.{layer}", dim, dim)
    keys["criterion.empty_weight"] = (classes + 1,)
    return keys


def build_on_meta(cfg: CfgNode) -> nn.Module:
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def test_r50_has_the_official_state_dict():
    model = build_on_meta(config(PANOPTIC_R50))
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert found == resnet_keys() | head_keys()
    # 44 M in the paper (table 1).
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 44


@pytest.mark.parametrize(
    "path,classes,queries",
    [
        ("coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml", 80, 100),
        ("ade20k/panoptic-segmentation/maskformer2_R50_bs16_160k.yaml", 150, 100),
        ("ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml", 150, 100),
    ],
)
def test_other_tasks_have_the_same_head_but_for_its_classes(path, classes, queries):
    state = build_on_meta(config(CONFIGS / path)).state_dict()
    found = {k: tuple(v.shape) for k, v in state.items() if not k.startswith("backbone.")}
    assert found == head_keys(classes=classes, queries=queries)


@pytest.mark.parametrize("size,dim", [("base", 768), ("large", 1024)])
def test_plain_vit_fits_the_head(size, dim, monkeypatch):
    # Detectron2's ViT reads numbers off a linspace, which the meta device does not have.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    path = f"coco/panoptic-segmentation/vit/maskformer2_vit_{size}_bs16_50ep.yaml"
    model = build_on_meta(config(CONFIGS / path))
    assert model.backbone.net.pos_embed.shape[-1] == dim
    strides = {k: s.stride for k, s in model.backbone.output_shape().items()}
    assert strides == {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    found = {k: tuple(v.shape) for k, v in model.sem_seg_head.state_dict().items()}
    expected = head_keys(channels=(256,) * 4)
    expected.pop("criterion.empty_weight")
    assert {"sem_seg_head." + k: v for k, v in found.items()} == expected


# ------------------------------------------------------------------------------------- configs

OFFICIAL_STYLE = """
MODEL:
  META_ARCHITECTURE: "MaskFormer"
  BACKBONE: {FREEZE_AT: 0, NAME: "D2SwinTransformer"}
  RESNETS: {STEM_TYPE: "basic", RES5_MULTI_GRID: [1, 1, 1], NORM: "SyncBN"}
  SWIN: {EMBED_DIM: 192, DEPTHS: [2, 2, 18, 2], NUM_HEADS: [6, 12, 24, 48], WINDOW_SIZE: 12,
         APE: False, DROP_PATH_RATE: 0.3, PATCH_NORM: True, PRETRAIN_IMG_SIZE: 384}
  SEM_SEG_HEAD: {NAME: "MaskFormerHead", LOSS_WEIGHT: 1.0, MASK_DIM: 256, NORM: "GN",
                 PIXEL_DECODER_NAME: "MSDeformAttnPixelDecoder", COMMON_STRIDE: 4,
                 DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES: ["res3", "res4", "res5"],
                 TRANSFORMER_ENC_LAYERS: 6}
  MASK_FORMER:
    TRANSFORMER_IN_FEATURE: "multi_scale_pixel_decoder"
    ENC_LAYERS: 0
    ENFORCE_INPUT_PROJ: False
    OVERSAMPLE_RATIO: 3.0
    TEST: {SEMANTIC_ON: True, PANOPTIC_ON: True, OVERLAP_THRESHOLD: 0.8}
SOLVER:
  OPTIMIZER: "ADAMW"
  BACKBONE_MULTIPLIER: 0.1
  LR_SCHEDULER_NAME: "WarmupPolyLR"
  CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: "full_model", CLIP_VALUE: 0.01, NORM_TYPE: 2.0}
INPUT:
  MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * 640) for x in range(5, 21)]"]
  CROP:
    ENABLED: True
    TYPE: "absolute"
    SIZE: (640, 640)
    SINGLE_CATEGORY_MAX_AREA: 1.0
  COLOR_AUG_SSD: True
  SIZE_DIVISIBILITY: 640
  DATASET_MAPPER_NAME: "mask_former_panoptic"
TEST:
  AUG: {ENABLED: False, MIN_SIZES: [320, 480], MAX_SIZE: 4480, FLIP: True}
VERSION: 2
"""


@pytest.mark.filterwarnings("ignore")
def test_official_yaml_parses(tmp_path):
    path = tmp_path / "official.yaml"
    path.write_text(OFFICIAL_STYLE)
    cfg = config(path)
    assert cfg.INPUT.MIN_SIZE_TRAIN[0] == 320 and cfg.INPUT.MIN_SIZE_TRAIN[-1] == 1280
    assert cfg.MODEL.SWIN.DEPTHS == [2, 2, 18, 2]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_configs_parse(path):
    cfg = config(path)
    assert cfg.MODEL.META_ARCHITECTURE == "MaskFormer"
    if not path.name.startswith("Base-"):
        assert cfg.DATASETS.TRAIN and cfg.DATASETS.TEST


def test_config_replaces_nothing_and_may_be_added_again():
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.75
    cfg.MODEL.SWIN = CfgNode({"EMBED_DIM": 128})
    add_maskformer2_config(cfg)
    add_maskformer2_config(cfg)
    assert cfg.SOLVER.OPTIMIZER == "SGD"
    assert cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA == 0.75
    assert cfg.MODEL.SWIN.EMBED_DIM == 128 and cfg.MODEL.SWIN.WINDOW_SIZE == 7
    first, second = config(), config()
    first.MODEL.SWIN.DEPTHS.append(1)
    assert second.MODEL.SWIN.DEPTHS == [2, 2, 6, 2]


# ---------------------------------------------------------------------------------- tiny model

METADATA = "mask2former_test"
MetadataCatalog.get(METADATA).thing_dataset_id_to_contiguous_id = {1: 0, 2: 1}


def tiny_config(**changes) -> CfgNode:
    """Two things (0, 1), two kinds of stuff (2, 3); 8 x 8 tokens of a 64 x 64 image."""
    cfg = config(Path(MASK2FORMER))
    tiny = {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4, "DATASETS.TRAIN": [METADATA]}
    for key, value in (tiny | {k.replace("__", "."): v for k, v in changes.items()}).items():
        cfg.merge_from_list([key, value])
    return cfg


def scene() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two squares and a disk on two kinds of ground: image, classes (G,), masks (G, 64, 64)."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    squares = [
        (x >= 6) & (x < 26) & (y >= 8) & (y < 28),
        (x >= 36) & (x < 58) & (y >= 32) & (y < 54),
    ]
    disk = (x - 46) ** 2 + (y - 16) ** 2 < 100
    things = squares[0] | squares[1] | disk
    masks = torch.stack([*squares, disk, (y < 32) & ~things, (y >= 32) & ~things])
    colors = torch.tensor(
        [[220, 40, 40], [210, 60, 30], [30, 60, 220], [90, 200, 90], [60, 60, 60]]
    )
    image = (masks[:, None] * colors[:, :, None, None]).sum(0).float()
    return image + torch.randn(image.shape) * 5, torch.tensor([0, 0, 1, 2, 3]), masks


def sample(height: int = 64, width: int = 64) -> dict:
    image, classes, masks = scene()
    instances = Instances((height, width), gt_classes=classes, gt_masks=masks[:, :height, :width])
    return {"image": image[:, :height, :width], "instances": instances}


@pytest.mark.slow
def test_it_learns_one_scene_and_finds_its_segments():
    model = build_model(tiny_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    item = sample()
    totals = []
    for step in range(140):
        if step == 110:
            optimizer.param_groups[0]["lr"] = 4e-4
        losses = model([item])
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0] / 5

    model.eval()
    with torch.no_grad():
        # Twice the size, as an input that was made smaller would be asked for.
        [out] = model([{"image": item["image"], "height": 128, "width": 128}])
    panoptic, segments = out["panoptic_seg"]
    _, classes, masks = scene()
    big = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert sorted(s["category_id"] for s in segments) == classes.tolist()
    for segment in segments:
        found = panoptic == segment["id"]
        assert segment["isthing"] == (segment["category_id"] < 2)
        same = big[classes == segment["category_id"]]
        overlap = max(((found & m).sum() / (found | m).sum()).item() for m in same)
        assert overlap > 0.85
    wanted = (big * classes[:, None, None]).sum(0)
    assert (out["sem_seg"].argmax(0) == wanted).float().mean() > 0.93
    confident = out["instances"][out["instances"].scores > 0.5]
    assert sorted(confident.pred_classes.tolist()) == [0, 0, 1]


def test_batches_of_other_shapes_give_every_image_its_own_size():
    model = build_model(tiny_config()).eval()
    inputs = [
        {"image": torch.rand(3, 40, 90) * 255, "height": 75, "width": 150},
        {"image": torch.rand(3, 64, 33) * 255},
    ]
    with torch.no_grad():
        together = model(inputs)
    for out, size in zip(together, [(75, 150), (64, 33)], strict=True):
        assert out["sem_seg"].shape == (4, *size)
        assert out["panoptic_seg"][0].shape == size
        assert out["instances"].pred_masks.shape[1:] == size
        assert (
            torch.isfinite(out["sem_seg"]).all() and torch.isfinite(out["instances"].scores).all()
        )


def test_training_pads_the_targets_of_a_batch():
    model = build_model(tiny_config())
    wide, tall = sample(40, 64), sample(64, 40)
    targets = []
    model.criterion.register_forward_pre_hook(lambda module, args: targets.extend(args[1]))
    tall["instances"].gt_masks = BitMasks(tall["instances"].gt_masks)
    losses = model([wide, tall])
    for target, (height, width) in zip(targets, [(40, 64), (64, 40)], strict=True):
        assert target["masks"].shape == (5, 64, 64)
        assert not target["masks"][:, height:].any() and not target["masks"][:, :, width:].any()
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bf16_autocast_trains_and_infers():
    model = build_model(tiny_config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([sample()])
        sum(losses.values()).backward()
        model.eval()
        with torch.no_grad():
            [out] = model([{"image": sample()["image"]}])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert out["sem_seg"].shape == (4, 64, 64) and torch.isfinite(out["sem_seg"]).all()


def test_semantic_output_may_be_resized_after_the_masks_are_combined():
    state, outs, item = None, [], {**sample(), "height": 32, "width": 48}
    for before in (False, True):
        cfg = tiny_config(
            MODEL__MASK_FORMER__TEST__PANOPTIC_ON=False,
            MODEL__MASK_FORMER__TEST__INSTANCE_ON=False,
            MODEL__MASK_FORMER__TEST__SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE=before,
        )
        model = build_model(cfg).eval()
        state = state or model.state_dict()
        model.load_state_dict(state)
        with torch.no_grad():
            outs.append(model([item])[0])
    assert all(set(out) == {"sem_seg"} for out in outs)
    assert outs[0]["sem_seg"].shape == outs[1]["sem_seg"].shape == (4, 32, 48)
    assert 0 < (outs[0]["sem_seg"] - outs[1]["sem_seg"]).abs().mean() < 0.01


@pytest.mark.parametrize("version", [1, 2])
def test_released_checkpoints_load_through_the_checkpointer(tmp_path, version):
    """Version 1 names: no ``pixel_decoder.``, and ``static_query``; neither has metadata."""
    model = build_model(tiny_config())
    state = {}
    for key, value in model.state_dict().items():
        if version == 1:
            key = key.replace("pixel_decoder.", "").replace("query_feat", "static_query")
        state[key] = value
    torch.save({"model": state}, tmp_path / "model.pth")
    fresh = build_model(tiny_config())
    result = DetectionCheckpointer(fresh)._load_model({"model": dict(state)})
    assert not result.missing_keys and not result.unexpected_keys
    DetectionCheckpointer(fresh).load(str(tmp_path / "model.pth"))
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"MODEL__SEM_SEG_HEAD__PIXEL_DECODER_NAME": "Nope"}, "PIXEL_DECODER_NAME"),
        ({"MODEL__SEM_SEG_HEAD__PIXEL_DECODER_NAME": "SemSegFPNHead"}, "PIXEL_DECODER_NAME"),
        ({"MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME": "Nope"}, "TRANSFORMER_DECODER_NAME"),
        ({"MODEL__MASK_FORMER__TRANSFORMER_IN_FEATURE": "res5"}, "TRANSFORMER_IN_FEATURE"),
        ({"MODEL__MASK_FORMER__DEC_LAYERS": 0}, "DEC_LAYERS"),
        ({"MODEL__SEM_SEG_HEAD__DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS": 5}, "N_HEADS"),
        ({"DATASETS__TRAIN": ["mask2former_no_such_set"]}, "thing_dataset_id_to_contiguous_id"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(tiny_config(**changes))


def test_some_output_must_be_on():
    off = {f"MODEL__MASK_FORMER__TEST__{x}_ON": False for x in ("SEMANTIC", "INSTANCE", "PANOPTIC")}
    with pytest.raises(ValueError, match="SEMANTIC_ON"):
        build_model(tiny_config(**off))


def test_polygons_as_targets_are_refused():
    item = sample()
    item["instances"] = Instances(
        (64, 64),
        gt_classes=torch.tensor([0]),
        gt_masks=PolygonMasks([[torch.tensor([0.0, 0, 9, 0, 9, 9]).numpy()]]),
    )
    with pytest.raises(ValueError, match="INPUT.MASK_FORMAT"):
        build_model(tiny_config())([item])
