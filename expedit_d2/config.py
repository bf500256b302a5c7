"""Configuration keys: ``MODEL.EXPEDIT``, and ``MODEL.VIT`` and ``MODEL.TIMM`` of the backbones."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode as CN

__all__ = ["add_expedit_config", "add_timm_config", "add_vit_config"]

_BACKBONE = {
    # Folder where the outputs of a frozen backbone are kept while heads train; "": none are.
    "FEATURE_CACHE": "",
}


def _add_node(parent: CN, name: str, defaults: dict[str, Any]) -> None:
    """Add keys to a node; a node or key that some other project already made stays as it is."""
    if name not in parent:
        parent[name] = CN()
    for key, value in defaults.items():
        if key not in parent[name]:
            parent[name][key] = value


def add_expedit_config(cfg: CN) -> None:
    """Add ``MODEL.EXPEDIT``: the keyword arguments of `expedit_d2.expedite`, in upper case.

    A key whose default is None takes values of several types; None is that key's automatic value.
    """
    _add_node(
        cfg.MODEL,
        "EXPEDIT",
        {
            "ENABLED": False,
            # Instead of ALPHA and the counts below: share of the GFLOPs of the transformer's blocks
            # to spend, in (0, 1); they follow from a rule (expedit_d2/budget.py).
            "BUDGET": None,
            # How tokens are reduced: expedit, merge, tome, density, pool or hard (one file each in
            # expedit_d2/methods). None: merge with KEEP, expedit with GRID or RATIO, and with
            # BUDGET what is best for the transformer.
            "METHOD": None,
            # Number of transformer blocks run before clustering, 0 to depth - 1. None: off.
            "ALPHA": None,
            # Clusters (h, w): of the map, or of each attention window with SCOPE "window".
            "GRID": None,
            # Instead of GRID: clusters along each side as a share of the tokens, in (0, 1].
            "RATIO": None,
            # For METHOD merge, tome and density, instead: tokens left behind the last ALPHA, as a
            # share of all in (0, 1] or a number, or one value for each ALPHA.
            "KEEP": None,
            # How METHOD merge spreads one KEEP over several ALPHAs: the share that is merged is
            # "falling" from the first to the last, or "equal". None: falling, and with BUDGET what
            # is best for the transformer.
            "SCHEDULE": None,
            # Rounds of bipartite matching in each merge of METHOD merge.
            "ROUNDS": 2,
            # "map": cluster the whole map. "window": each attention window for itself.
            "SCOPE": "map",
            # Soft k-means steps (the paper's kappa).
            "ITERATIONS": 5,
            # Multiplies squared distances (the paper's tau): a number, or None / "auto" to
            # follow the scale of the features.
            "TEMPERATURE": None,
            # A token may join clusters within this odd side, in cells, of its home cell.
            "WINDOW": 5,
            # Clusters that a token is rebuilt from (the paper's k).
            "NEIGHBORS": 20,
            # Rebuild from clusters within this odd side of the home cell; 0: from all (the paper).
            "NEIGHBOR_WINDOW": 5,
            # Rebuild weights: "l1" sum to one (the paper), "l2" have unit norm (published code).
            "NORMALIZE": "l1",
            # Scaled dot-product attention in the model's own attention layers, also where ENABLED
            # is False: the same outputs but for rounding, in less time and memory.
            "FUSED_ATTENTION": False,
            # Add log(cluster size) to the attention logits of each key.
            "SIZE_AWARE": True,
            # Relative positions follow the "clusters", or a regular "grid" (the published code).
            "POSITIONS": "clusters",
            # Rebuild the change (refined - clusters) on top of the original tokens; the paper
            # replaces the tokens. None: as it is best for METHOD, for those on a grid True.
            "RESIDUAL": None,
            # "backbone": rebuild the tokens behind the last block. "head": run a head that can do
            # so (Segmenter's) on the clusters and rebuild its class logits, as published.
            "RECONSTRUCT_AT": "backbone",
        },
    )


def add_vit_config(cfg: CN) -> None:
    """Add ``MODEL.VIT``, the keys of the ``D2ViT`` backbone. Defaults are ViTDet-B."""
    _add_node(cfg.MODEL, "BACKBONE", _BACKBONE)
    _add_node(
        cfg.MODEL,
        "VIT",
        {
            "IMG_SIZE": 1024,  # pixels; sets the length of global relative-position tables
            "PATCH_SIZE": 16,  # pixels
            "EMBED_DIM": 768,
            "DEPTH": 12,
            "NUM_HEADS": 12,
            "MLP_RATIO": 4.0,
            "QKV_BIAS": True,
            "DROP_PATH_RATE": 0.1,
            "USE_ABS_POS": True,
            "USE_REL_POS": True,
            "WINDOW_SIZE": 14,  # tokens along a side of an attention window
            "WINDOW_BLOCK_INDEXES": [0, 1, 3, 4, 6, 7, 9, 10],  # the others attend globally
            "RESIDUAL_BLOCK_INDEXES": [],
            "PRETRAIN_IMG_SIZE": 224,
            "PRETRAIN_USE_CLS_TOKEN": True,
            # Simple feature pyramid: levels, finest first, and their size relative to the tokens.
            "OUT_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
            "SCALE_FACTORS": [4.0, 2.0, 1.0, 0.5],
            "OUT_CHANNELS": 256,
            "SQUARE_PAD": 0,  # pad images to a square of this side; 0 keeps their shape
            "FREEZE": False,  # train the pyramid and what follows, not the ViT itself
            # Weights of a plain ViT to start from (MAE, DINOv2, …), in timm's names; LayerScale is
            # folded into the layers before it.
            "CHECKPOINT": "",
        },
    )


def add_timm_config(cfg: CN) -> None:
    """Add ``MODEL.TIMM``, the keys of ``build_timm_vit_backbone``."""
    _add_node(cfg.MODEL, "BACKBONE", _BACKBONE)
    _add_node(
        cfg.MODEL,
        "TIMM",
        {
            # A plain ViT of timm's: vit_large_patch14_reg4_dinov2, vit_large_patch16_dinov3, …
            "NAME": "vit_base_patch16_224",
            "PRETRAINED": False,  # weights of this name, from the Hugging Face hub or its cache
            "CHECKPOINT": "",  # a file of weights instead, in timm's format or the authors'
            "DROP_PATH_RATE": 0.0,
            # Further arguments of timm.create_model, by their own names; for config files only.
            "KWARGS": CN(new_allowed=True),
            # Pixels of the image along the side of a token, a power of two. Where the patch has
            # another size images are resized by patch / stride. None: the power of two nearest to
            # the patch, so 16 for patches of 14, and no resizing for 8, 16 and 32.
            "STRIDE": None,
            # Simple feature pyramid: levels, finest first, and their size relative to the tokens.
            "OUT_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
            "SCALE_FACTORS": [4.0, 2.0, 1.0, 0.5],
            "OUT_CHANNELS": 256,
            "SQUARE_PAD": 0,  # pad images to a square of this side; 0 keeps their shape
            "FREEZE": False,  # train the pyramid and what follows, not the ViT itself
            "GRAD_CHECKPOINTING": False,  # run blocks twice in training, to save memory
        },
    )
