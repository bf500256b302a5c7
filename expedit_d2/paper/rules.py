"""How the published GFLOPs were counted: by hooks on layers, with formulas for the rest.

A hook sees the input and output of a module, so operations outside of modules are not counted:
residual sums, positions, interpolation, the mask products of Segmenter's decoder. Attention has a
formula in the encoder only; in the decoder, its linear layers count. The formulas of the two
operators differ from their actual cost, here and in the published code.

Segmenter's rule follows its authors' published counter, term by term. The counters of DPT and SWAG
are unknown: their rules here are the simplest that reproduce all numbers, to 0.2 GFLOPs for DPT's
differences and to 0.03 % for SWAG.

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
    """A way of counting.

    Linear layers and convolutions count their multiply-adds, convolutions also their biases; the
    encoder's attention counts 2 N² C (both products) and N C (scaling the queries).

    Attributes:
        operation: FLOPs per operation; a multiply-add is one operation.
        element: operations per element of norms, GELU, and the A N² logits.
        clustering, reconstruction: operations of the two operators.
        note: the rule in words.
    """

    operation: int
    element: int
    clustering: OperatorCost
    reconstruction: OperatorCost
    note: str


def _local_clustering(n: int, m: int, c: int, s: Settings) -> float:
    """Distances to the centroids in the window only, but means as a dense product.

    An iteration counts, per token and centroid of its window, the distance (2 C), its temperature
    (1) and the softmax (2); per centroid, the sum over all tokens (N C) and its normalisation (C).
    Before the first one: the pooling (N C) and the mask of the window, 2 (N + M).
    """
    near = s.window**2
    each = near * (2 * n * c + 3 * n) + m * n * c + m * c
    return s.iterations * each + n * c + 2 * (n + m)


def _local_reconstruction(n: int, m: int, c: int, s: Settings) -> float:
    """Per token and neighbor the sum (C), the weight (2) and its division (1), without distances.

    C is the channels of the tokens, even if class scores are reconstructed.
    """
    return s.neighbors * (n * c + 3 * n)


def _means_only(n: int, m: int, c: int, s: Settings) -> float:
    """The product of affinities and tokens, in every iteration."""
    return s.iterations * m * n * c


def _both_products(n: int, m: int, c: int, s: Settings) -> float:
    """The products of tokens and centroids and of affinities and tokens, in every iteration."""
    return 2 * s.iterations * m * n * c


_SWAG = Rule(
    operation=1,
    element=5,
    clustering=_both_products,
    reconstruction=lambda n, m, c, s: 0.0,
    note="one FLOP per multiply-add; 5 per element of norms, GELU and softmax; of the operators "
    "only the two dense products of each iteration",
)

#: `Table.model` -> its rule; other models were counted by fvcore.
RULES = {
    "Segmenter": Rule(
        operation=1,
        element=2,
        clustering=_local_clustering,
        reconstruction=_local_reconstruction,
        note="one FLOP per multiply-add; 2 per element of norms, GELU, softmax; without attention "
        "products and masks of the decoder; the two operators by a local formula",
    ),
    "DPT": Rule(
        operation=2,
        element=1,
        clustering=_means_only,
        reconstruction=lambda n, m, c, s: 0.0,
        note="two FLOPs per multiply-add and per element of norms, GELU and softmax; of the two "
        "operators only the product of affinities and tokens",
    ),
    "SWAG ViT-L": _SWAG,
    "SWAG ViT-H": _SWAG,
}


def _product(layer: nn.Linear | nn.Conv2d, out: Tensor) -> float:
    """Multiply-adds of a layer with output ``out``, plus the bias of a convolution."""
    bias = isinstance(layer, nn.Conv2d) and layer.bias is not None
    return out.numel() * (layer.weight[0].numel() + bias)


def _attention(tokens: Tensor, heads: int, element: int) -> float:
    """Attention on tokens (B, N, C), without its linear layers."""
    b, n, c = tokens.shape
    return b * n * (2 * n * c + c + element * n * heads)


def _whole_attention(layer: nn.MultiheadAttention, tokens: Tensor, rule: Rule) -> float:
    """Attention with its linear layers, which PyTorch does not call as modules here."""
    linear = 4 * tokens.numel() * layer.embed_dim
    return linear + _attention(tokens, layer.num_heads, rule.element)


def _costs(model: nn.Module, rule: Rule) -> Iterator[tuple[nn.Module, Cost]]:
    """The modules that are counted, and the cost of a call of each."""
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
    """FLOPs of one forward pass by a published rule.

    Args:
        model: a model in evaluation mode with one plain ViT, expedited or not, on any device; its
            blocks have an ``attn`` or PyTorch's multi-head attention.
        inputs: input of the model.
        rule: one of `RULES`.

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
