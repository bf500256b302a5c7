"""FLOPs by fvcore, with handles for operators that it lacks, by part of an expedited model.

One FLOP is one fused multiply-add. As in fvcore, element-wise operators (softmax, GELU, additions,
masks, sorting) are not counted; products, convolutions, norms and interpolation are. "Flop" is not
a well-defined concept: compare only numbers of the same tool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

import torch
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn.jit_handles import elementwise_flop_counter, get_shape
from torch import nn

from ..adapters import find_transformer
from ..hook import ExpeditedBlocks
from ..modes import eval_mode

__all__ = ["Flops", "count_flops"]

Handle = Callable[[list[Any], list[Any]], float]


def _attention(inputs: list[Any], outputs: list[Any]) -> float:
    """The products with k and v; leading axes are batch and heads."""
    query, value, out = get_shape(inputs[0]), get_shape(inputs[2]), get_shape(outputs[0])
    queries, keys = prod(query[:-1]), value[-2]
    return queries * keys * (query[-1] + out[-1])


def _native_attention(inputs: list[Any], outputs: list[Any]) -> float:
    """Fused ``nn.MultiheadAttention``: projections and attention."""
    batch, tokens, channels = get_shape(outputs[0])
    return batch * tokens * channels * (4 * channels + 2 * tokens)


def _einsum(inputs: list[Any], outputs: list[Any]) -> float:
    """Product of two tensors: one multiply-add per combination of indices."""
    equation = inputs[0].toIValue()
    shapes = [get_shape(v) for v in inputs[1].node().inputs()]
    sides = equation.replace(" ", "").split("->")[0].split(",")
    if len(sides) != 2 or "." in equation:
        raise ValueError(f"no FLOP count for einsum {equation!r}")
    extents = {
        axis: n
        for side, shape in zip(sides, shapes, strict=True)
        for axis, n in zip(side, shape, strict=True)
    }
    return prod(extents.values())


def _embedding_bag(inputs: list[Any], outputs: list[Any]) -> float:
    """Weighted sum of rows: one multiply-add per index and channel."""
    return prod(get_shape(inputs[1])) * get_shape(outputs[0])[-1]


def _index_add(inputs: list[Any], outputs: list[Any]) -> float:
    """One addition per element of the source."""
    return prod(get_shape(inputs[3]))


def _scatter_add(inputs: list[Any], outputs: list[Any]) -> float:
    """One addition per index."""
    return prod(get_shape(inputs[2]))


def _baddbmm(inputs: list[Any], outputs: list[Any]) -> float:
    """Batched product; the addition is part of the multiply-adds."""
    batch, rows, inner = get_shape(inputs[1])
    return batch * rows * inner * get_shape(inputs[2])[-1]


def _cdist(inputs: list[Any], outputs: list[Any]) -> float:
    """Distances of all pairs: one multiply-add per pair and channel."""
    return prod(get_shape(outputs[0])) * get_shape(inputs[0])[-1]


#: Operators that fvcore does not count.
HANDLES: dict[str, Handle] = {
    "aten::scaled_dot_product_attention": _attention,
    "aten::_native_multi_head_attention": _native_attention,
    "aten::einsum": _einsum,
    "aten::embedding_bag": _embedding_bag,
    "aten::index_add": _index_add,
    "aten::scatter_add": _scatter_add,
    "aten::baddbmm": _baddbmm,
    "aten::cdist": _cdist,
    "aten::index_add_": _index_add,
    "aten::lerp": elementwise_flop_counter(0, 1),
    "aten::square": elementwise_flop_counter(0, 1),
    "aten::linalg_vector_norm": elementwise_flop_counter(1, 0),
    "aten::_adaptive_avg_pool2d": elementwise_flop_counter(1, 0),
    "aten::upsample_bicubic2d": elementwise_flop_counter(0, 16),
    # For upsampling; downsampling reads more entries, so this is a lower bound.
    "aten::_upsample_bicubic2d_aa": elementwise_flop_counter(0, 16),
    "aten::avg_pool2d": elementwise_flop_counter(1, 0),
    # One bilinear sample per bin; the number depends on the box, so this is a lower bound.
    "torchvision::roi_align": elementwise_flop_counter(0, 4),
}

_RESIZING = ("upsample_bicubic2d", "_upsample_bicubic2d_aa", "upsample_bilinear2d")

# Element-wise operators, comparisons and copies: not counted, as in fvcore. An operator in neither
# table is reported as uncounted.
_FREE = frozenset(
    "abs add add_ addcdiv all alias amax any arange argmax argsort bitwise_and bitwise_or cat ceil "
    "broadcast_to clamp clamp_max clamp_min clone constant_pad_nd cumsum detach div div_ eq exp "
    "empty_like expand_as fill_ floor gather gelu ge glu gt index index_put index_select "
    "index_copy isfinite le leaky_relu lift_fresh log log2 logical_and logical_not logical_or "
    "logsumexp lt "
    "masked_fill masked_fill_ max max_pool2d maximum mean meshgrid min minimum mul mul_ ne neg "
    "new_ones new_tensor numpy_T ones_like pad pow prod reciprocal relu relu_ repeat "
    "repeat_interleave resolve_conj rsub rsqrt scalar_tensor scatter sigmoid sigmoid_ silu sin "
    "cos softmax sort sqrt stack sub sub_ sum tanh tile topk unflatten unfold unsafe_split "
    "upsample_nearest2d where zeros_like __or__ view_as numel scatter_ bitwise_not full linspace "
    "nonzero nonzero_numpy _unique2 roll flip amax reshape_as".split()
)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass, in parts that add up to ``total``.

    Attributes:
        embed: patch embedding, positions and the rest of the transformer outside its blocks.
        before: blocks before alpha; all blocks if no tokens are reduced.
        clustering: reduction of the tokens.
        after: blocks on the reduced tokens.
        reconstruction: reconstruction of the full map.
        head: everything outside the transformer.
        uncounted: number of calls of each operator that has no handle.
    """

    embed: float
    before: float
    clustering: float
    after: float
    reconstruction: float
    head: float
    uncounted: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def transformer(self) -> float:
        """All but the head."""
        return self.total - self.head

    @property
    def blocks(self) -> float:
        """The transformer's blocks, including reduction and reconstruction."""
        return self.transformer - self.embed

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "uncounted")


def count_flops(model: nn.Module, inputs: Any) -> Flops:
    """Count the FLOPs of one forward pass in evaluation mode.

    Args:
        model: a Detectron2 model or backbone, or any module, with one supported transformer. If
            that has stages, ``after`` includes the stages after the reduced one.
        inputs: input of the model: a tensor, or Detectron2's list of dicts.

    Raises:
        ValueError: if the model has no supported transformer.
    """
    spec = find_transformer(model)
    owner, stages = spec.owner, spec.stages or (spec,)
    with eval_mode(model), torch.no_grad():
        analysis = FlopCountAnalysis(model, (inputs,) if torch.is_tensor(inputs) else inputs)
        analysis.set_op_handle(**HANDLES)
        analysis.set_op_handle(**{f"aten::{name}": None for name in _FREE})
        # Scripted helpers of Detectron2: box formats and indices.
        analysis.set_op_handle("prim::CallFunction", None)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        totals = analysis.by_module()
        operators = analysis.by_module_and_operator()
        uncounted = dict(analysis.unsupported_ops())
    # Detectron2's analysis wraps the model as ``model``.
    names = {id(m): f"model.{name}".removesuffix(".") for name, m in model.named_modules()}

    def total(module: nn.Module) -> float:
        return float(totals[names[id(module)]])

    def own_operators(module: nn.Module) -> Counter[str]:
        """FLOPs by operator of a module without its children."""
        own = Counter(operators[names[id(module)]])
        for child in module.children():
            own.subtract(operators[names[id(child)]])
        return own

    before, methods = 0.0, ()
    for container in (stage.blocks for stage in stages):
        reduced = isinstance(container, ExpeditedBlocks)
        alpha = container.first_alpha if reduced else len(container)
        before += sum(total(container[index]) for index in range(alpha))
        if reduced:
            methods = container.methods.values()
            break
    clustering = sum(total(method.reduce) for method in methods)
    reconstruction = sum(total(method.rebuild) for method in methods)
    others = [
        child
        for part in {id(part.owner): part for part in (spec, *stages)}.values()
        for child in part.owner.children()
        if child is not part.blocks
    ]
    # Outside its children, the transformer resizes positions, and the hook computes the attention
    # of blocks on reduced tokens.
    resizing = sum(own_operators(owner)[name] for name in _RESIZING)
    inside = sum(total(child) for child in others) + resizing
    around = total(spec.whole) - total(owner)
    return Flops(
        embed=inside + around,
        before=before,
        clustering=clustering,
        after=total(owner) - inside - before - clustering - reconstruction,
        reconstruction=reconstruction,
        head=float(totals[""]) - total(spec.whole),
        uncounted=uncounted,
    )
