"""Converts official checkpoints of DPT and Depth Anything V2 to weights of `modeling.DPT`.

Every key is renamed by its longest known prefix, and accounted for: renamed, not used or missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expedit_d2.engine import check_new_file, surplus_layers
from expedit_d2.files import check_finite, read_weights

__all__ = ["Conversion", "convert_checkpoint", "convert_state"]

UNKNOWN = "not known here"
_CLASSIFIER = "the classifier that the encoder was pretrained with"
_SEGMENTATION = "auxiliary head of the segmentation model"


@dataclass(frozen=True)
class Conversion:
    """Result of converting an official checkpoint.

    Attributes:
        weights: our keys and their tensors.
        renamed: official key to ours.
        unused: official key to the reason why it is dropped.
        missing: our keys that have no counterpart in the checkpoint.
    """

    weights: dict[str, Tensor]
    renamed: dict[str, str]
    unused: dict[str, str]
    missing: list[str]

    def summary(self) -> str:
        """Counts, and a line for each unused or missing key."""
        lines = [
            f"{len(self.renamed)} keys renamed, {len(self.unused)} not used, "
            f"{len(self.missing)} missing"
        ]
        lines += [f"  not used: {key} ({why})" for key, why in self.unused.items()]
        lines += [f"  missing: {key}" for key in self.missing]
        return "\n".join(lines)


def _scratch(prefix: str) -> Iterator[tuple[str, str]]:
    """The fusion, which is the same in both code bases."""
    for i in range(4):
        yield f"{prefix}layer{i + 1}_rn.", f"head.layers.{i}."
        yield f"{prefix}refinenet{i + 1}.out_conv.", f"head.fusions.{i}.out."
        yield f"{prefix}refinenet{i + 1}.resConfUnit1.", f"head.fusions.{i}.level."
        yield f"{prefix}refinenet{i + 1}.resConfUnit2.", f"head.fusions.{i}.refine."


def _dpt() -> Iterator[tuple[str, str]]:
    yield "pretrained.model.", "backbone.vit."
    for i in range(4):
        yield f"pretrained.act_postprocess{i + 1}.0.project.0.", f"head.reassemble.{i}.readout."
        yield f"pretrained.act_postprocess{i + 1}.3.", f"head.reassemble.{i}.project."
        yield f"pretrained.act_postprocess{i + 1}.4.", f"head.reassemble.{i}.resize."
    yield from _scratch("scratch.")
    yield "scratch.output_conv.0.", "head.reduce."
    yield "scratch.output_conv.2.", "head.predict.0."
    yield "scratch.output_conv.4.", "head.predict.2."


def _depth_anything() -> Iterator[tuple[str, str]]:
    yield "pretrained.", "backbone.vit."
    for i in range(4):
        yield f"depth_head.readout_projects.{i}.0.", f"head.reassemble.{i}.readout."
        yield f"depth_head.projects.{i}.", f"head.reassemble.{i}.project."
        yield f"depth_head.resize_layers.{i}.", f"head.reassemble.{i}.resize."
    yield from _scratch("depth_head.scratch.")
    yield "depth_head.scratch.output_conv1.", "head.reduce."
    yield "depth_head.scratch.output_conv2.", "head.predict."


#: Prefixes of official keys that the model does not need, and reasons.
_UNUSED = {
    "pretrained.model.head.": _CLASSIFIER,
    "pretrained.model.head_dist.": _CLASSIFIER,
    "pretrained.model.norm.": "the levels are read before the final norm",
    "pretrained.mask_token": "of pretraining",
    "scratch.refinenet4.resConfUnit1.": "never run: the coarsest level joins nothing",
    "depth_head.scratch.refinenet4.resConfUnit1.": "never run: the coarsest level joins nothing",
    "auxlayer.": _SEGMENTATION,
}


def convert_state(state: Mapping[str, Tensor], model: nn.Module) -> Conversion:
    """Rename the keys of an official state dict for a model.

    Args:
        state: official keys and tensors.
        model: a `modeling.DPT` of the same architecture, on any device, also "meta".

    Raises:
        ValueError: if these are not official keys, if a tensor has another shape than the model's,
            or if they have more layers than the model.
    """
    if any(key.startswith("depth_head.") for key in state):
        rules = dict(_depth_anything())
    elif any(key.startswith("scratch.") for key in state):
        rules = dict(_dpt())
    else:
        raise ValueError(
            "this is not a checkpoint of DPT or Depth Anything V2: no key begins with scratch. or "
            f"depth_head.; the first is {next(iter(state), None)!r}"
        )
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    weights: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    unused: dict[str, str] = {}
    wrong: list[str] = []
    homeless: dict[str, str] = {}
    for key, value in state.items():
        start = max((p for p in (*rules, *_UNUSED) if key.startswith(p)), key=len, default=None)
        if start is None or start in _UNUSED:
            unused[key] = UNKNOWN if start is None else _UNUSED[start]
            continue
        target = rules[start] + key.removeprefix(start)
        if target not in own:
            unused[key], homeless[target] = UNKNOWN, key
        elif tuple(value.shape) != own[target]:
            wrong.append(
                f"{key} is {tuple(value.shape)} in the file and {own[target]} in the model"
            )
        else:
            renamed[key], weights[target] = target, value
    wrong += [f"{homeless[k]} is not in the model" for k in surplus_layers(model, homeless)]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more}; is this the right config?")
    return Conversion(weights, renamed, unused, [key for key in own if key not in weights])


def convert_checkpoint(source: str, target: str, model: nn.Module) -> Conversion:
    """Read an official file and write one for ``MODEL.WEIGHTS``.

    Args:
        source: the official file.
        target: the file to write.
        model: see `convert_state`.

    Raises:
        OSError: if there is no such file; or from `check_new_file`, for the target.
        ValueError: if it is not a file of weights; from `convert_state`; or if weights are missing
            or not finite. Nothing is written then.
    """
    check_new_file(target, "target")
    conversion = convert_state(read_weights(source, "the checkpoint"), model)
    if missing := conversion.missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{source!r} has nothing for {missing[0]} of the model{more}; is this the right config?"
        )
    check_finite(conversion.weights, f"the checkpoint {source!r}")
    torch.save({"model": conversion.weights}, target)
    return conversion
