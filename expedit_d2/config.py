"""Config keys: ``MODEL.EXPEDIT``, and how keys are added to a config that others add theirs to."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from detectron2.config import CfgNode as CN

__all__ = ["add_expedit_config", "add_keys"]


def add_keys(node: CN, defaults: Mapping[str, Any]) -> None:
    """Add keys to a config node; mappings are nodes of their own.

    Nodes and keys that are there already, as another project made them, stay as they are.
    """
    for key, value in defaults.items():
        if isinstance(value, Mapping) and not isinstance(value, CN):
            add_keys(node.setdefault(key, CN()), value)
        else:
            node.setdefault(key, deepcopy(value))


def add_expedit_config(cfg: CN) -> None:
    """Add ``MODEL.EXPEDIT``: the keyword arguments of `expedit_d2.expedite`, in upper case.

    A key whose default is None takes values of several types; None is that key's automatic value.
    """
    expedit = {
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
    }
    add_keys(cfg, {"MODEL": {"EXPEDIT": expedit}})
