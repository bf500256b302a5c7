"""Losses of matched queries: class, mask at points (cross-entropy and dice), for every layer.

Shorthand: B images, Q queries, K classes, N matched pairs of a batch, P points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor, nn

from .matcher import HungarianMatcher, Pairs
from .points import sample_at, uncertain_points

__all__ = ["SetCriterion", "bce_loss", "dice_loss"]


def bce_loss(logits: Tensor, targets: Tensor, count: float) -> Tensor:
    """Binary cross-entropy of masks (N, P), mean over points, summed and divided by ``count``."""
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return loss.mean(1).sum() / count


def dice_loss(logits: Tensor, targets: Tensor, count: float) -> Tensor:
    """Dice loss of masks (N, P), smoothed by one, summed and divided by ``count``."""
    masks = logits.sigmoid()
    overlap = 2 * (masks * targets).sum(1)
    loss = 1 - (overlap + 1) / (masks.sum(1) + targets.sum(1) + 1)
    return loss.sum() / count


class SetCriterion(nn.Module):
    """Matches queries to segments and computes their weighted losses, in fp32."""

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weights: Mapping[str, float],
        no_object_weight: float,
        num_points: int,
        oversample_ratio: float,
        importance_sample_ratio: float,
        deep_supervision: bool = True,
    ) -> None:
        """
        Args:
            num_classes: K.
            matcher: assigns queries to segments, separately for every prediction.
            weights: of ``loss_ce``, ``loss_mask`` and ``loss_dice``, by these names.
            no_object_weight: weight of "no object" among the classes.
            num_points, oversample_ratio, importance_sample_ratio: see `uncertain_points`.
            deep_supervision: also supervise ``aux_outputs``.

        Raises:
            ValueError: if a sampling ratio is out of range.
        """
        super().__init__()
        if oversample_ratio < 1 or not 0 <= importance_sample_ratio <= 1:
            raise ValueError(
                "MODEL.MASK_FORMER.OVERSAMPLE_RATIO must be at least 1 and "
                "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO in [0, 1], got "
                f"{oversample_ratio} and {importance_sample_ratio}"
            )
        self.num_classes = num_classes
        self.matcher = matcher
        self.weights = dict(weights)
        self.sampling = (num_points, oversample_ratio, importance_sample_ratio)
        self.deep_supervision = deep_supervision
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer("empty_weight", empty_weight)

    def forward(
        self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """
        Args:
            outputs: ``pred_logits`` (B, Q, K + 1), ``pred_masks`` (B, Q, H', W') and
                ``aux_outputs``, a list of the same.
            targets: for each image ``labels`` (G,) and ``masks`` (G, H, W), of one size in a batch.

        Returns:
            Weighted losses; those of ``aux_outputs[i]`` end in ``_i``.
        """
        with torch.autocast(outputs["pred_masks"].device.type, enabled=False):
            targets = [{**t, "masks": t["masks"].float()} for t in targets]
            count = self._mask_count(targets)
            losses = self._losses(outputs, targets, count)
            if self.deep_supervision:
                for index, earlier in enumerate(outputs["aux_outputs"]):
                    more = self._losses(earlier, targets, count)
                    losses.update({f"{name}_{index}": loss for name, loss in more.items()})
            return losses

    def _mask_count(self, targets: Sequence[Mapping[str, Tensor]]) -> float:
        """Mean number of segments per process, at least 1."""
        count = torch.tensor(
            float(sum(len(t["labels"]) for t in targets)), device=self.empty_weight.device
        )
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(count)
        return max(count.item() / comm.get_world_size(), 1.0)

    def _losses(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]], count: float
    ) -> dict[str, Tensor]:
        pairs = self.matcher(outputs, targets)
        bce, dice = self._mask_losses(outputs["pred_masks"], targets, pairs, count)
        losses = {
            "loss_ce": self._class_loss(outputs["pred_logits"].float(), targets, pairs),
            "loss_mask": bce,
            "loss_dice": dice,
        }
        return {name: self.weights[name] * loss for name, loss in losses.items()}

    def _class_loss(
        self, logits: Tensor, targets: Sequence[Mapping[str, Tensor]], pairs: Sequence[Pairs]
    ) -> Tensor:
        """Cross-entropy over all queries, with target "no object" for unmatched ones."""
        wanted = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        for row, target, (queries, segments) in zip(wanted, targets, pairs, strict=True):
            row[queries] = target["labels"][segments]
        return F.cross_entropy(logits.transpose(1, 2), wanted, self.empty_weight)

    def _mask_losses(
        self,
        masks: Tensor,
        targets: Sequence[Mapping[str, Tensor]],
        pairs: Sequence[Pairs],
        count: float,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and dice at points where the predicted masks are uncertain."""
        predicted = torch.cat([m[q] for m, (q, _) in zip(masks, pairs, strict=True)]).float()
        wanted = torch.cat([t["masks"][g] for t, (_, g) in zip(targets, pairs, strict=True)])
        with torch.no_grad():
            points = uncertain_points(predicted, *self.sampling)
            labels = sample_at(wanted, points)
        logits = sample_at(predicted, points)
        return bce_loss(logits, labels, count), dice_loss(logits, labels, count)
