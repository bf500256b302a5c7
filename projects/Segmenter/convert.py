"""Converts official Segmenter checkpoints to Detectron2's format.

An official run is a folder with ``checkpoint.pth`` and ``variant.yml``, the settings it was trained
with. Weights have the same names here; only the classifier of the pretrained ViT is left out.
`convert_checkpoint` writes the weights and a config that builds their model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from expedit_d2.engine import check_new_file, surplus_layers
from expedit_d2.files import check_finite, fetch, read_weights

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
# Official name -> timm's, where they differ; the sizes come from variant.yml.
_BACKBONES = {"vit_base_patch8_384": "vit_base_patch8_224"}
# Largest aspect ratio of an evaluated image, by data set; others get the largest of these.
_ASPECTS = {"ade20k": 4, "cityscapes": 2, "pascal_context": 8}


@dataclass(frozen=True)
class Report:
    """Result of matching the weights of a checkpoint with a model.

    Attributes:
        mapped: names that are converted.
        classifier: names of the classifier of the pretrained ViT, which are dropped.
        unknown: other names that the model does not have, which are dropped.
        missing: names of the model that the checkpoint does not have.
        misshapen: name, shape in the checkpoint and shape in the model, if these differ.
    """

    mapped: tuple[str, ...]
    classifier: tuple[str, ...]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def wrong(self) -> list[str]:
        """Reasons why the weights do not fit the model."""
        return [
            f"{name} is {found} in the checkpoint and {wanted} in the model"
            for name, found, wanted in self.misshapen
        ] + [f"{name} is missing in the checkpoint" for name in self.missing]

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


def _read_variant(file: str) -> dict[str, Any]:
    try:
        variant = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_VariantLoader)
        if not isinstance(variant["net_kwargs"], dict):
            raise TypeError("its net_kwargs are not a mapping")
    except (yaml.YAMLError, UnicodeError, KeyError, TypeError) as error:
        reason = getattr(error, "problem", None) or repr(error)  # YAML's message has several lines
        raise ValueError(f"{file!r} is not a variant.yml of Segmenter: {reason}") from None
    return variant


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An optional section of ``variant.yml``."""
    section = settings.get(name, {})
    if not isinstance(section, Mapping):
        raise ValueError(f"variant.yml: {name} must be a mapping, got {section!r}")
    return section


def _whole(settings: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer of ``variant.yml``."""
    value = settings.get(name, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"variant.yml: {name} must be a positive whole number, got {value!r}")
    return value


def _share(settings: Mapping[str, Any], name: str, default: float) -> float:
    """A probability of ``variant.yml``."""
    value = settings.get(name, default)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError(f"variant.yml: {name} must be a number in [0, 1), got {value!r}")
    return float(value)


def _side(net: Mapping[str, Any]) -> int:
    """The side of the model's square images."""
    value = net["image_size"]
    sides = value if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or sides[0] != sides[1] or type(sides[0]) is not int or sides[0] < 1:
        raise ValueError(f"variant.yml: image_size must be a square, in pixels, got {value!r}")
    return sides[0]


def config_of(variant: Mapping[str, Any], weights: str = "") -> CfgNode:
    """Config keys from a ``variant.yml``.

    Args:
        variant: its content; ``net_kwargs``, and optionally ``dataset_kwargs`` and
            ``inference_kwargs``.
        weights: path of the converted weights.

    Raises:
        ValueError: for missing, invalid or unsupported settings.
    """
    net = variant["net_kwargs"]
    needed = ("backbone", "decoder", "image_size", "patch_size", "n_cls", "normalization")
    absent = [key for key in needed if key not in net]
    if absent:
        raise ValueError(f"variant.yml: net_kwargs lacks {', '.join(absent)}")
    if not isinstance(net["backbone"], str):
        raise ValueError(f"variant.yml: backbone must be a model of timm, got {net['backbone']!r}")
    side = _side(net)
    settings = net["decoder"] if isinstance(net["decoder"], Mapping) else {}
    decoder = settings.get("name")
    if decoder not in list(DECODERS):
        raise ValueError(
            f"variant.yml: the decoder's name must be {' or '.join(DECODERS)}, got {decoder!r}"
        )
    if net["normalization"] not in list(_PIXELS):
        raise ValueError(
            f"variant.yml: normalization must be one of {sorted(_PIXELS)}, got "
            f"{net['normalization']!r}"
        )
    mean, std = _PIXELS[net["normalization"]]
    inference = _section(variant, "inference_kwargs")
    shortest = _whole(inference, "im_size", side)
    data_set = str(_section(variant, "dataset_kwargs").get("dataset"))
    segmenter = {
        "DECODER": decoder,
        "NORM_EPS": 1e-5,
        "WINDOW_SIZE": _whole(inference, "window_size", side),
        "WINDOW_STRIDE": _whole(inference, "window_stride", side),
    }
    if decoder == "mask_transformer":
        segmenter["DECODER_LAYERS"] = _whole(settings, "n_layers", 2)
        segmenter["DECODER_DROPOUT"] = _share(settings, "dropout", 0.1)
    return CfgNode(
        {
            "MODEL": {
                "META_ARCHITECTURE": "Segmenter",
                "WEIGHTS": weights,
                "PIXEL_MEAN": mean,
                "PIXEL_STD": std,
                "TIMM": {
                    "NAME": _BACKBONES.get(net["backbone"], net["backbone"]),
                    "DROP_PATH_RATE": _share(net, "drop_path_rate", 0.0),
                    "KWARGS": {"img_size": side, "patch_size": _whole(net, "patch_size")},
                },
                "SEGMENTER": segmenter,
                "SEM_SEG_HEAD": {"NUM_CLASSES": _whole(net, "n_cls")},
            },
            "INPUT": {
                "FORMAT": "RGB",
                "MIN_SIZE_TEST": shortest,
                "MAX_SIZE_TEST": shortest * _ASPECTS.get(data_set, max(_ASPECTS.values())),
            },
            "DATASETS": {"TEST": [_TEST_SETS[data_set]] if data_set in _TEST_SETS else []},
            "VERSION": 2,
        }
    )


def _build_on_meta(config: CfgNode, net: Mapping[str, Any]) -> nn.Module:
    """The model of a config without weights; checks the number of heads, which no shape shows."""
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
        source: the official ``checkpoint.pth`` or its URL, with ``variant.yml`` beside it.
        target: file to write; the config is written beside it, with the suffix ``.yaml``.

    Returns:
        A report on every weight; none is missing or misshapen.

    Raises:
        OSError: if one of the two official files does not exist; or from `check_new_file`, for the
            files to write.
        ValueError: if they are not official files, or the weights do not fit or are not finite.
    """
    source, target = os.fspath(source), Path(target)
    config_file = target.with_suffix(".yaml")
    if target == config_file:
        raise ValueError(f"{str(target)!r} must not end in .yaml, the suffix of the config")
    for path in (target, config_file):
        check_new_file(path, "target")
    beside = os.path.join(os.path.dirname(source), "variant.yml")  # of a URL, too
    variant = _read_variant(fetch(beside, "the settings that official runs have"))
    config = config_of(variant, str(target.resolve()))
    model = _build_on_meta(config, variant["net_kwargs"])
    weights = read_weights(source, "the checkpoint")
    report = match_weights(weights, model)
    wrong = report.wrong + [
        f"{n} is not in the model" for n in surplus_layers(model, report.unknown)
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"the weights do not fit the model of variant.yml: {wrong[0]}{more}")
    mapped = {name: weights[name] for name in report.mapped}
    check_finite(mapped, f"the checkpoint {source!r}")
    torch.save({"model": mapped}, target)
    config_file.write_text(config.dump())
    return report
