"""Official Segmenter checkpoints to Detectron2's format.

An official run is a folder with ``checkpoint.pth`` and ``variant.yml``, the settings it was trained
with. Names of weights are the same here, but that the classifier of the pretrained ViT is left
out. `convert_checkpoint` writes the weights and a config that builds their model.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from .config import add_segmenter_config
from .modeling.decoder import DECODERS

__all__ = ["Report", "config_of", "convert_checkpoint", "match_weights"]

_PIXELS = {
    "vit": ([127.5, 127.5, 127.5], [127.5, 127.5, 127.5]),
    "deit": ([123.675, 116.280, 103.530], [58.395, 57.120, 57.375]),
}
_TEST_SETS = {
    "ade20k": "ade20k_sem_seg_val",
    "cityscapes": "cityscapes_fine_sem_seg_val",
    "pascal_context": "pascal_context_60_val",
}
# Official names that timm has under another one; sizes are given anyway.
_BACKBONES = {"vit_base_patch8_384": "vit_base_patch8_224"}
# Longest side of an evaluated image, in shortest ones; the most that any data set has.
_ASPECT = 8


@dataclass(frozen=True)
class Report:
    """What became of every weight.

    Attributes:
        mapped: names that were taken over.
        classifier: names that belong to the classifier of the pretrained ViT, left out.
        unknown: other names that the model does not have, left out.
        missing: names of the model that the checkpoint does not have.
        misshapen: name, shape in the checkpoint and shape in the model, where these differ.
    """

    mapped: tuple[str, ...]
    classifier: tuple[str, ...]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def __str__(self) -> str:
        left = len(self.classifier) + len(self.unknown)
        lines = [
            f"{len(self.mapped)} weights taken over, {left} left out, {len(self.missing)} missing, "
            f"{len(self.misshapen)} of another shape"
        ]
        for names, what in (
            (self.classifier, "left out, classifier of the pretrained ViT"),
            (self.unknown, "left out, not in the model"),
            (self.missing, "missing in the checkpoint"),
        ):
            lines += [f"{what}: {', '.join(names)}"] if names else []
        lines += [
            f"wrong shape: {name} is {found} in the checkpoint and {wanted} in the model"
            for name, found, wanted in self.misshapen
        ]
        return "\n".join(lines)


def match_weights(weights: Mapping[str, Tensor], model: nn.Module) -> Report:
    """Compare the weights of an official checkpoint with those of a model, by name and shape."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    both = [name for name in weights if name in own]
    wrong = [name for name in both if tuple(weights[name].shape) != own[name]]
    left = [name for name in weights if name not in own]
    classifier = [n for n in left if n.startswith(("encoder.head.", "encoder.head_dist."))]
    return Report(
        mapped=tuple(name for name in both if name not in wrong),
        classifier=tuple(classifier),
        unknown=tuple(name for name in left if name not in classifier),
        missing=tuple(name for name in own if name not in weights),
        misshapen=tuple((name, tuple(weights[name].shape), own[name]) for name in wrong),
    )


class _VariantLoader(yaml.SafeLoader):
    """Plain YAML, and the tuples that the official code writes."""


_VariantLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: loader.construct_sequence(node)
)


def _read_variant(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {str(path)!r}, which official runs have")
    try:
        variant = yaml.load(path.read_text(), Loader=_VariantLoader)
        if not isinstance(variant["net_kwargs"], dict):
            raise TypeError("its net_kwargs are no mapping")
    except (yaml.YAMLError, UnicodeError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is no variant.yml of Segmenter: {error!r}") from None
    return variant


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
        if not all(isinstance(value, Tensor) for value in weights.values()):
            raise TypeError("its 'model' has values that are no tensors")
    except pickle.UnpicklingError as error:
        # Not loaded without this protection: a pickle may run any code.
        raise ValueError(
            f"{str(path)!r} is no checkpoint, or holds objects besides tensors and plain values, "
            "which are not read from files of others; if you trust it, save its 'model' alone "
            f"under 'model' in a new checkpoint.pth: {error}"
        ) from None
    except (RuntimeError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is no checkpoint of Segmenter: {error!r}") from None
    return dict(weights)


def config_of(variant: Mapping[str, Any], weights: str = "") -> CfgNode:
    """The config keys that a ``variant.yml`` says something about.

    Args:
        variant: its content; ``net_kwargs``, and optionally ``dataset_kwargs`` and
            ``inference_kwargs``.
        weights: path of the converted weights.

    Raises:
        ValueError: for settings that this project does not have.
    """
    net = variant["net_kwargs"]
    needed = ("backbone", "decoder", "image_size", "patch_size", "n_cls", "normalization")
    absent = [key for key in needed if key not in net]
    if absent:
        raise ValueError(f"variant.yml: net_kwargs lacks {', '.join(absent)}")
    sides = net["image_size"]
    sides = {sides} if isinstance(sides, int) else set(sides)
    if len(sides) != 1:
        raise ValueError(f"variant.yml: image_size must be a square, got {net['image_size']}")
    settings = net["decoder"] if isinstance(net["decoder"], Mapping) else {}
    decoder = settings.get("name")
    if decoder not in DECODERS:
        raise ValueError(
            f"variant.yml: the name of decoder must be {' or '.join(DECODERS)}, got {decoder!r}"
        )
    if net["normalization"] not in _PIXELS:
        raise ValueError(
            f"variant.yml: normalization must be one of {sorted(_PIXELS)}, got "
            f"{net['normalization']!r}"
        )
    (side,) = sides
    mean, std = _PIXELS[net["normalization"]]
    inference = variant.get("inference_kwargs", {})
    shortest = inference.get("im_size", side)
    data_set = variant.get("dataset_kwargs", {}).get("dataset")
    segmenter = {
        "DECODER": decoder,
        "NORM_EPS": 1e-5,
        "WINDOW_SIZE": inference.get("window_size", side),
        "WINDOW_STRIDE": inference.get("window_stride", side),
    }
    if decoder == "mask_transformer":
        segmenter["DECODER_LAYERS"] = settings.get("n_layers", 2)
        segmenter["DECODER_DROPOUT"] = settings.get("dropout", 0.1)
    return CfgNode(
        {
            "MODEL": {
                "META_ARCHITECTURE": "Segmenter",
                "WEIGHTS": weights,
                "PIXEL_MEAN": mean,
                "PIXEL_STD": std,
                "TIMM": {
                    "NAME": _BACKBONES.get(net["backbone"], net["backbone"]),
                    "DROP_PATH_RATE": float(net.get("drop_path_rate", 0.0)),
                    "KWARGS": {"img_size": side, "patch_size": net["patch_size"]},
                },
                "SEGMENTER": segmenter,
                "SEM_SEG_HEAD": {"NUM_CLASSES": net["n_cls"]},
            },
            "INPUT": {
                "FORMAT": "RGB",
                "MIN_SIZE_TEST": shortest,
                "MAX_SIZE_TEST": shortest * _ASPECT,
            },
            "DATASETS": {"TEST": [_TEST_SETS[data_set]] if data_set in _TEST_SETS else []},
            "VERSION": 2,
        }
    )


def _build_on_meta(config: CfgNode, net: Mapping[str, Any]) -> nn.Module:
    """The model of a config without its weights; shapes cannot tell the number of heads."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    add_segmenter_config(cfg)
    cfg.merge_from_other_cfg(config)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    encoder = model.encoder
    found = {"n_layers": len(encoder.blocks), "n_heads": encoder.blocks[0].attn.num_heads}
    for key, value in found.items():
        if net.get(key, value) != value:
            raise ValueError(
                f"variant.yml: {key} is {net[key]}, but timm's {cfg.MODEL.TIMM.NAME} has {value}"
            )
    return model


def convert_checkpoint(source: str | os.PathLike, target: str | os.PathLike) -> Report:
    """Convert an official checkpoint.

    Args:
        source: the official ``checkpoint.pth``, with ``variant.yml`` beside it.
        target: file to write; the config is written beside it, with the suffix ``.yaml``.

    Returns:
        What became of every weight; nothing is missing or misshapen.

    Raises:
        FileNotFoundError: if one of the two official files is not there, or no folder to write to.
        FileExistsError: if a file to be written is there already.
        ValueError: if the files are something else, or the weights do not fit.
    """
    source, target = Path(source), Path(target)
    config_file = target.with_suffix(".yaml")
    if target == config_file:
        raise ValueError(f"{str(target)!r} is for weights; the config gets the suffix .yaml")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(target.parent)!r} to write to")
    for path in (target, config_file):
        if path.exists():
            raise FileExistsError(f"{str(path)!r} is there already; choose another name")
    variant = _read_variant(source.parent / "variant.yml")
    config = config_of(variant, str(target.resolve()))
    weights = _read_weights(source)
    report = match_weights(weights, _build_on_meta(config, variant["net_kwargs"]))
    if report.missing or report.misshapen:
        raise ValueError(f"the weights do not fit the model of variant.yml:\n{report}")
    torch.save({"model": {name: weights[name] for name in report.mapped}}, target)
    config_file.write_text(config.dump())
    return report
