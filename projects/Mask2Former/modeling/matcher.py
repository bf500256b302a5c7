"""Hungarian matching of queries to segments.

Shorthand: Q queries, G segments of an image, P points, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .points import sample_at

__all__ = ["HungarianMatcher", "pairwise_bce", "pairwise_dice"]

# Query and segment indices of the pairs in one image.
Pairs = tuple[Tensor, Tensor]


def pairwise_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, mean over points: (Q, P) logits and (G, P) targets to (Q, G)."""
    # BCE of a logit x and a target t is softplus(x) - x * t.
    return (F.softplus(logits).sum(1)[:, None] - logits @ targets.T) / logits.shape[1]


def pairwise_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice loss, smoothed by one: (Q, P) logits and (G, P) targets to (Q, G)."""
    masks = logits.sigmoid()
    total = masks.sum(1)[:, None] + targets.sum(1)[None]
    return 1 - (2 * masks @ targets.T + 1) / (total + 1)


class HungarianMatcher:
    """Assigns queries to segments by class, mask and dice costs, with scipy."""

    def __init__(
        self, cost_class: float, cost_mask: float, cost_dice: float, num_points: int
    ) -> None:
        """
        Args:
            cost_class, cost_mask, cost_dice: weights of the costs.
            num_points: P, the random points at which masks are compared.
        """
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.num_points = num_points

    def costs(self, logits: Tensor, masks: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Cost of every pair in one image, (Q, G).

        Args:
            logits: (Q, K + 1) class logits.
            masks: (Q, H', W') mask logits.
            target: ``labels`` (G,) and ``masks`` (G, H, W).
        """
        points = torch.rand(self.num_points, 2, device=masks.device)
        predicted = sample_at(masks.float(), points)
        wanted = sample_at(target["masks"].float(), points)
        return (
            self.cost_mask * pairwise_bce(predicted, wanted)
            - self.cost_class * logits.float().softmax(-1)[:, target["labels"]]
            + self.cost_dice * pairwise_dice(predicted, wanted)
        )

    @torch.no_grad()
    def __call__(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> list[Pairs]:
        """
        Args:
            outputs: ``pred_logits`` (B, Q, K + 1) and ``pred_masks`` (B, Q, H', W').
            targets: for each image ``labels`` (G,) and ``masks`` (G, H, W).

        Returns:
            For each image the indices of queries and of their segments, min(Q, G) each.
        """
        # Only training needs scipy.
        from scipy.optimize import linear_sum_assignment

        pairs = []
        for logits, masks, target in zip(
            outputs["pred_logits"], outputs["pred_masks"], targets, strict=True
        ):
            costs = self.costs(logits, masks, target)
            rows, columns = linear_sum_assignment(costs.cpu().numpy())
            pairs.append(tuple(torch.as_tensor(i, device=masks.device) for i in (rows, columns)))
        return pairs
