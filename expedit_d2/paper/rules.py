"""How the published GFLOPs were counted: by hooks on layers, with a formula for the rest.

A hook sees a module's input and output, so what runs outside of modules is not counted: residual
sums, positions, interpolation, the products by which Segmenter's decoder makes masks. Attention has
a formula in the encoder alone; of the decoder's, the linear layers count. The two operators have
formulas that are not what they cost, here or there.

Segmenter's rule is that of the counter its authors published, term by term. The counters of DPT and
SWAG are not known: theirs are the simplest rules that meet all figures, DPT's with their
differences to 0.2 GFLOPs, SWAG's all of them to 0.03 %.

Shorthand: B images, N tokens, M clusters, C channels, A attention heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import find_transformer
from ..hook import ExpeditedBlocks
from ..settings import Settings

__all__ = ["RULES", "Rule", "count_published"]

#: (N, M, C, settings) to the operations of an operator.
OperatorCost = Callable[[int, int, int, Settings], float]
#: A module's positional arguments and output to its operations.
Cost = Callable[[tuple[Any, ...], Any], float]


@dataclass(frozen=True)
class Rule:
    """One way of counting.

    Every linear layer and convolution counts its multiply-adds, a convolution its bias as well;
    the encoder's attention 2 N² C (both products) and N C (scaling the queries).

    Attributes:
        operation: FLOPs of one operation; a multiply-add is one.
        element: operations for each element of a norm, of a GELU, and of the A N² logits.
        clustering, reconstruction: operations of the two operators.
        note: the rule in words.
    """

    operation: int
    element: int
    clustering: OperatorCost
    reconstruction: OperatorCost
    note: str


def _local_clustering(n: int, m: int, c: int, s: Settings) -> float:
    """Distances to the centroids of the window only, yet the means as a dense product.

    An iteration has, for each token and each centroid of its window, the distance (2 C), its
    temperature (1) and the softmax (2); for each centroid the sum over all tokens (N C) and its
    normalisation (C). Before the first one: the pooling (N C) and the window's mask, 2 (N + M).
    """
    near = s.window**2
    each = near * (2 * n * c + 3 * n) + m * n * c + m * c
    return s.iterations * each + n * c + 2 * (n + m)


def _local_reconstruction(n: int, m: int, c: int, s: Settings) -> float:
    """For each token and each of its neighbors the sum (C), the weight (2) and its division (1).

    C is that of the tokens, also where class scores are rebuilt. Distances are left out.
    """
    return s.neighbors * (n * c + 3 * n)


def _means_alone(n: int, m: int, c: int, s: Settings) -> float:
    """The product of affinities and tokens, in every iteration."""
    return s.iterations * m * n * c


def _both_products(n: int, m: int, c: int, s: Settings) -> float:
    """In every iteration the product of tokens and centroids, and that of affinities and tokens."""
    return 2 * s.iterations * m * n * c


_SWAG = Rule(
    operation=1,
    element=5,
    clustering=_both_products,
    reconstruction=lambda n, m, c, s: 0.0,
    note="one FLOP a multiply-add; 5 for each element of a norm, GELU or softmax; of the two "
    "operators only the dense products of an iteration, which are two",
)

#: `Table.model` -> its rule; a model that is not here was counted by fvcore.
RULES = {
    "Segmenter": Rule(
        operation=1,
        element=2,
        clustering=_local_clustering,
        reconstruction=_local_reconstruction,
        note="one FLOP a multiply-add; 2 for each element of a norm, GELU or softmax; without the "
        "attention products and masks of the decoder; the two operators by a local formula",
    ),
    "DPT": Rule(
        operation=2,
        element=1,
        clustering=_means_alone,
        reconstruction=lambda n, m, c, s: 0.0,
        note="two FLOPs a multiply-add, and for each element of a norm, GELU or softmax; of the "
        "two operators only the product of affinities and tokens",
    ),
    "SWAG ViT-L": _SWAG,
    "SWAG ViT-H": _SWAG,
}


def _product(layer: nn.Linear | nn.Conv2d, out: Tensor) -> float:
    """Multiply-adds of a layer with the output ``out``, and the bias of a convolution."""
    bias = isinstance(layer, nn.Conv2d) and layer.bias is not None
    return out.numel() * (layer.weight[0].numel() + bias)


def _attention(tokens: Tensor, heads: int, element: int) -> float:
    """Attention on tokens (B, N, C), without its linear layers."""
    b, n, c = tokens.shape
    return b * n * (2 * n * c + c + element * n * heads)


def _whole_attention(layer: nn.MultiheadAttention, tokens: Tensor, rule: Rule) -> float:
    """The same with its linear layers, which PyTorch does not call as modules there."""
    linear = 4 * tokens.numel() * layer.embed_dim
    return linear + _attention(tokens, layer.num_heads, rule.element)


def _costs(model: nn.Module, rule: Rule) -> Iterator[tuple[nn.Module, Cost]]:
    """The modules that count, and what a call of each one costs."""
    blocks = find_transformer(model).blocks
    encoder = {id(block.attn) for block in blocks.children() if hasattr(block, "attn")}
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            yield module, lambda args, out, layer=module: _product(layer, out)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.GELU)):
            yield module, lambda args, out: rule.element * args[0].numel()
        elif isinstance(module, nn.MultiheadAttention):
            yield module, lambda args, out, layer=module: _whole_attention(layer, args[0], rule)
        elif id(module) in encoder:
            heads = module.num_heads
            yield module, lambda args, out, h=heads: _attention(args[0], h, rule.element)

    def operator(cost: OperatorCost, record: Any, settings: Settings) -> float:
        b, *size, c = record.tokens.shape
        return b * cost(prod(size), prod(record.clusters.shape[1:3]), c, settings)

    for method in blocks.methods.values() if isinstance(blocks, ExpeditedBlocks) else ():
        s = method.reduce.settings
        # (tokens) to (fewer tokens, record); (features, record) to features
        yield method.reduce, lambda args, out, s=s: operator(rule.clustering, out[1], s)
        yield method.rebuild, lambda args, out, s=s: operator(rule.reconstruction, args[1], s)


def count_published(model: nn.Module, inputs: Any, rule: Rule) -> float:
    """FLOPs of one forward by a published rule.

    Args:
        model: with one plain ViT whose blocks have an ``attn`` or PyTorch's own, in evaluation
            mode; expedited or not, on any device.
        inputs: what ``model(inputs)`` takes.
        rule: of `RULES`.

    Raises:
        ValueError: if the model has no supported transformer.
    """
    counts: list[float] = []
    hooks = [
        module.register_forward_hook(lambda _, args, out, cost=cost: counts.append(cost(args, out)))
        for module, cost in _costs(model, rule)
    ]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return rule.operation * sum(counts)
