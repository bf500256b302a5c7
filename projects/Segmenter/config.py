"""Config keys of Segmenter. The encoder has those of every timm ViT here, ``MODEL.TIMM``."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode as CN

from expedit_d2.backbones import add_timm_config
from expedit_d2.config import add_expedit_config, add_keys
from expedit_d2.engine import add_solver_config

__all__ = ["add_segmenter_config"]

# Beside it, the model reads of MODEL.TIMM: NAME, PRETRAINED, CHECKPOINT, DROP_PATH_RATE, KWARGS
# (img_size, patch_size), FREEZE, GRAD_CHECKPOINTING; and MODEL.SEM_SEG_HEAD.{NUM_CLASSES,
# IGNORE_VALUE}.
_SEGMENTER: dict[str, Any] = {
    # "linear": one layer, token by token (Seg-L). "mask_transformer": class embeddings attend
    # together with the tokens, masks are their products (Seg-L-Mask).
    "DECODER": "mask_transformer",
    "DECODER_LAYERS": 2,  # transformer blocks of the mask transformer
    "DECODER_DIM": None,  # their width, 64 for each head; None: as the encoder's
    "DECODER_DROPOUT": 0.1,  # in these blocks
    # Scores are normed over the K classes, which keeps them within sqrt(K - 1) times a learnt
    # scale. It starts at this; with few classes more than 1 lets the model be certain early on.
    "SCORE_SCALE": 1.0,
    # Added to the variance in the encoder's norms; None: what the timm model has, mostly 1e-6.
    # Official checkpoints were trained with 1e-5.
    "NORM_EPS": None,
    # Inference: side of the square windows, and from one to the next, in pixels of the resized
    # image. 0: the whole image at once, whatever its size.
    "WINDOW_SIZE": 512,
    "WINDOW_STRIDE": 512,
    "WINDOW_BATCH": 4,  # windows, of all images together, that run at once
}

# As in Mask2Former's configs: colour distortion of SSD, and cropping again while one class fills
# more than this share of the crop.
_INPUT: dict[str, Any] = {"COLOR_AUG_SSD": False, "CROP": {"SINGLE_CATEGORY_MAX_AREA": 1.0}}


def add_segmenter_config(cfg: CN) -> None:
    """Add every key that Segmenter's configs use and ``cfg`` does not have yet."""
    add_timm_config(cfg)
    add_expedit_config(cfg)
    add_solver_config(cfg)
    add_keys(cfg, {"MODEL": {"SEGMENTER": _SEGMENTER}, "INPUT": _INPUT})
