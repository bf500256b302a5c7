"""Every name of another package that is used here and is not public.

A public way is taken where there is one. Checked with torch 2.14.1, timm 1.0.31, Detectron2 0.7.2,
fvcore 0.1.5 and transformers 5.24.0; the tests say which name has moved in another version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = [
    "OVERRIDDEN",
    "POSITIONED",
    "StorageWeakRef",
    "TorchDispatchMode",
    "TreeSpec",
    "allocations",
    "attention_of",
    "checkpointing_of",
    "coco_ground_truth",
    "cpu_attention",
    "positioned",
    "recorded_outputs",
    "schema_of",
    "tree_flatten",
    "tree_unflatten",
    "version_of",
]

#: Methods that subclasses here override: class by its full name -> name of the method.
OVERRIDDEN = {
    "fvcore.common.checkpoint.Checkpointer": "_load_model",
    "torch.nn.Module": "_load_from_state_dict",
}

#: The method of timm's transformers that adds positions and class tokens.
POSITIONED = "_pos_embed"


def positioned(vit: nn.Module, x: Tensor) -> Tensor:
    """Embedded patches of a timm transformer, with positions and class tokens."""
    return getattr(vit, POSITIONED)(x)


def version_of(x: Tensor) -> int:
    """How often a tensor was changed in place; not for tensors of `torch.inference_mode`."""
    return x._version


def schema_of(operator: Any) -> Any:
    """The schema of an operator that a `TorchDispatchMode` is given."""
    return operator._schema


def allocations(profile: torch.profiler.profile) -> list[int]:
    """Bytes of each allocation in a profile, in order; releases are negative. ``profile.events()``
    has them too, after a second or more for the tree of all operators."""
    events = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    unit = "start_ns" if hasattr(torch.autograd._KinetoEvent, "start_ns") else "start_us"
    return [event.nbytes() for event in sorted(changes, key=lambda event: getattr(event, unit)())]


def cpu_attention() -> Any:
    """The CPU's kernel of scaled dot-product attention."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attention_of(config: Any) -> str:
    """Which implementation of attention a transformers config has chosen."""
    return config._attn_implementation


def recorded_outputs() -> Mapping[str, Any]:
    """What the transformers model that runs now records by hooks on its layers, by name."""
    from transformers.utils.output_capturing import _active_collector

    return _active_collector.get() or {}


def checkpointing_of(layer: nn.Module) -> Callable[..., Any]:
    """The function by which a transformers layer checkpoints its forward."""
    return layer._gradient_checkpointing_func


def coco_ground_truth(evaluator: Any) -> tuple[Any, Sequence[str] | None, bool]:
    """The annotations of Detectron2's `COCOEvaluator`, as pycocotools' ``COCO``; its tasks, if they
    were given; whether there is anything to evaluate."""
    return evaluator._coco_api, evaluator._tasks, evaluator._do_evaluation
