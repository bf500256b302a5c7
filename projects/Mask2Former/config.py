"""Config keys of Mask2Former: those of the official repository, with its defaults.

Official YAML files parse unchanged. Keys that another project has already added are not replaced.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode as CN

from expedit_d2.backbones import add_swin_config
from expedit_d2.config import add_keys
from expedit_d2.engine import add_solver_config

__all__ = ["add_maskformer2_config"]

_MASK_FORMER: dict[str, Any] = {
    # Losses: whether every decoder layer is supervised, and the weights of "no object" and of the
    # class, dice and mask terms (also in the matching costs).
    "DEEP_SUPERVISION": True,
    "NO_OBJECT_WEIGHT": 0.1,
    "CLASS_WEIGHT": 1.0,
    "DICE_WEIGHT": 1.0,
    "MASK_WEIGHT": 20.0,
    # Number of points at which masks are compared, oversampling factor to find uncertain points,
    # and share of uncertain points.
    "TRAIN_NUM_POINTS": 112 * 112,
    "OVERSAMPLE_RATIO": 3.0,
    "IMPORTANCE_SAMPLE_RATIO": 0.75,
    # Transformer decoder. DEC_LAYERS counts predictions, one more than layers, as the queries also
    # predict before the first. ENC_LAYERS is a key of MaskFormer that is not used.
    "TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
    "TRANSFORMER_IN_FEATURE": "res5",  # must be set to "multi_scale_pixel_decoder"
    "NHEADS": 8,
    "DROPOUT": 0.1,  # in the pixel decoder; the transformer decoder has none
    "DIM_FEEDFORWARD": 2048,
    "ENC_LAYERS": 0,
    "DEC_LAYERS": 6,
    "PRE_NORM": False,
    "HIDDEN_DIM": 256,
    "NUM_OBJECT_QUERIES": 100,
    "ENFORCE_INPUT_PROJ": False,
    # Images are padded to a multiple of this; negative: the backbone's size_divisibility.
    "SIZE_DIVISIBILITY": 32,
    # Kinds of output, and thresholds of the panoptic map.
    "TEST": {
        "SEMANTIC_ON": True,
        "INSTANCE_ON": False,
        "PANOPTIC_ON": False,
        "OBJECT_MASK_THRESHOLD": 0.0,
        "OVERLAP_THRESHOLD": 0.0,
        # Resize masks to the output size before they are combined; always done for panoptic and
        # instance output.
        "SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": False,
    },
}

_SEM_SEG_HEAD: dict[str, Any] = {
    # Pixel decoder; the default is that of MaskFormer, which is not part of this project.
    "PIXEL_DECODER_NAME": "BasePixelDecoder",
    "MASK_DIM": 256,
    "TRANSFORMER_ENC_LAYERS": 0,
    "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": ["res3", "res4", "res5"],
    "DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS": 4,
    "DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS": 8,
}

_INPUT: dict[str, Any] = {
    # Training mapper: a name in data.mappers.MAPPERS.
    "DATASET_MAPPER_NAME": "mask_former_semantic",
    # The mask_former_ mappers: SSD's colour augmentation, largest share of one class in a crop
    # (others are cropped again), and side of the square to pad to (negative: none).
    "COLOR_AUG_SSD": False,
    "CROP": {"SINGLE_CATEGORY_MAX_AREA": 1.0},
    "SIZE_DIVISIBILITY": -1,
    # The _lsj mappers (large scale jitter): side of the square crop, range of scales.
    "IMAGE_SIZE": 1024,
    "MIN_SCALE": 0.1,
    "MAX_SCALE": 2.0,
}

# DeepLab's keys, which official YAML files set and nothing uses.
_RESNETS: dict[str, Any] = {
    "STEM_TYPE": "deeplab",
    "RES4_DILATION": 1,
    "RES5_MULTI_GRID": [1, 2, 4],
}


def add_maskformer2_config(cfg: CN) -> None:
    """Add the keys of official Mask2Former configs that ``cfg`` does not have yet.

    ``SOLVER.OPTIMIZER``, which official YAML files set, is shared by all projects here.
    """
    add_solver_config(cfg)
    add_swin_config(cfg)
    model = {"MASK_FORMER": _MASK_FORMER, "SEM_SEG_HEAD": _SEM_SEG_HEAD, "RESNETS": _RESNETS}
    add_keys(cfg, {"MODEL": model, "INPUT": _INPUT})
