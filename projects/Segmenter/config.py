"""Config keys of Segmenter. The encoder has those of every timm ViT here, ``MODEL.TIMM``."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode as CN

from expedit_d2.backbones import add_timm_config
from expedit_d2.config import add_expedit_config, add_keys
from expedit_d2.engine import add_solver_config

__all__ = ["add_segmenter_config"]

# The model also reads MODEL.TIMM.{NAME, PRETRAINED, CHECKPOINT, DROP_PATH_RATE, KWARGS (img_size,
# patch_size), FREEZE, GRAD_CHECKPOINTING} and MODEL.SEM_SEG_HEAD.{NUM_CLASSES, IGNORE_VALUE}.
_SEGMENTER: dict[str, Any] = {
    # "linear": one linear layer on each token (Seg-L). "mask_transformer": class embeddings and
    # tokens attend to each other, and their products are the masks (Seg-L-Mask).
    "DECODER": "mask_transformer",
    "DECODER_LAYERS": 2,  # transformer blocks of the mask transformer
    "DECODER_DIM": None,  # their width, 64 per head; None: that of the encoder
    "DECODER_DROPOUT": 0.1,  # in these blocks
    # Initial value of the learnt scale of the scores, which are normalised over the K classes and
    # so limited to sqrt(K - 1) times it. With few classes, more than 1 allows confident scores
    # early.
    "SCORE_SCALE": 1.0,
    # Epsilon of the encoder's norms; None: that of the timm model, mostly 1e-6. Official
    # checkpoints were trained with 1e-5.
    "NORM_EPS": None,
    # Inference: side and stride of the square windows, in pixels of the resized image. 0: the whole
    # image at once.
    "WINDOW_SIZE": 512,
    "WINDOW_STRIDE": 512,
    "WINDOW_BATCH": 4,  # windows, of all images together, that run at once
}

# As in Mask2Former's configs: colour distortion of SSD, and cropping again while one class fills
# more than this share of the crop.
_INPUT: dict[str, Any] = {"COLOR_AUG_SSD": False, "CROP": {"SINGLE_CATEGORY_MAX_AREA": 1.0}}


def add_segmenter_config(cfg: CN) -> None:
    """Add the config keys of Segmenter that ``cfg`` does not have yet."""
    add_timm_config(cfg)
    add_expedit_config(cfg)
    add_solver_config(cfg)
    add_keys(cfg, {"MODEL": {"SEGMENTER": _SEGMENTER}, "INPUT": _INPUT})
