"""Depth metrics, computed per image and averaged (Eigen et al., arXiv 1406.2283)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from .data.datasets import depth_scale_of, read_depth

__all__ = ["ALIGNMENTS", "CROPS", "DepthEvaluator", "align", "depth_metrics"]

ALIGNMENTS = ("none", "median", "scale", "scale_shift")
#: Top, bottom, left and right of the evaluated region: shares of the image, or pixels (NYU).
CROPS: dict[str, tuple[float, float, float, float]] = {
    "none": (0.0, 1.0, 0.0, 1.0),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "nyu": (45, 471, 41, 601),
}


def align(prediction: np.ndarray, target: np.ndarray, how: str) -> tuple[float, float]:
    """Scale and shift that align a prediction with its target.

    Args:
        prediction, target: (N,).
        how: "median", the ratio of the medians; "scale" or "scale_shift", least squares; "none".

    Returns:
        (scale, shift), so that scale * prediction + shift is near the target.
    """
    p, t = prediction.astype(np.float64), target.astype(np.float64)
    if how == "median":
        return float(np.median(t) / max(np.median(p), 1e-12)), 0.0
    if how == "scale":
        return float((p @ t) / max(p @ p, 1e-12)), 0.0
    if how == "scale_shift":
        scale, shift = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), t, rcond=None)[0]
        return float(scale), float(shift)
    return 1.0, 0.0


def depth_metrics(prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Metrics of one image.

    Args:
        prediction, target: (N,) depth in metres, positive.

    Returns:
        RMSE (m), RMSE_log, AbsRel, SqRel (m), log10, SILog (times 100), and d1, d2, d3: percent of
        the pixels whose ratio to the target, or its inverse, is below 1.25, 1.25^2, 1.25^3.
    """
    p, t = prediction.astype(np.float64), target.astype(np.float64)
    error, log_error = p - t, np.log(p) - np.log(t)
    ratio = np.exp(np.abs(log_error))
    metrics = {
        "RMSE": np.sqrt(np.mean(error**2)),
        "RMSE_log": np.sqrt(np.mean(log_error**2)),
        "AbsRel": np.mean(np.abs(error) / t),
        "SqRel": np.mean(error**2 / t),
        "log10": np.mean(np.abs(log_error)) / np.log(10),
        "SILog": 100 * np.sqrt(np.var(log_error)),
        **{f"d{k}": 100 * np.mean(ratio < 1.25**k) for k in (1, 2, 3)},
    }
    return {name: float(value) for name, value in metrics.items()}


class DepthEvaluator(DatasetEvaluator):
    """Compares ``depth`` of the outputs with the depth PNGs of a data set."""

    def __init__(
        self,
        dataset_name: str,
        output: str = "metric",
        min_depth: float = 1e-3,
        max_depth: float = 80.0,
        crop: str = "none",
        alignment: str = "none",
    ) -> None:
        """
        Args:
            dataset_name: a registered data set with ``depth_scale`` in its metadata.
            output: what the model predicts, "metric" or "inverse"; see `modeling.DPT`.
            min_depth, max_depth: metres; depths outside are ignored, predictions are clipped.
            crop: a name in `CROPS`.
            alignment: a name in `ALIGNMENTS`; in inverse depth if that is the output.

        Raises:
            ValueError: for an unknown name, or inverse depth without an alignment.
        """
        for key, value, known in (("CROP", crop, tuple(CROPS)), ("ALIGN", alignment, ALIGNMENTS)):
            if value not in known:
                raise ValueError(f"TEST.DEPTH.{key} must be one of {known}, got {value!r}")
        if output == "inverse" and alignment == "none":
            raise ValueError(
                'TEST.DEPTH.ALIGN must not be "none" with MODEL.DPT.OUTPUT "inverse", which is '
                "known up to a scale and a shift only"
            )
        if not 0 < min_depth < max_depth:
            raise ValueError(
                f"TEST.DEPTH.MIN must be above 0 and below MAX, got {min_depth} and {max_depth}"
            )
        self.scale = depth_scale_of([dataset_name])
        self.dataset_name = dataset_name
        self.inverse = output == "inverse"
        self.limits = (min_depth, max_depth)
        self.crop = crop
        self.alignment = alignment
        self.reset()

    def reset(self) -> None:
        self.rows: list[dict[str, float]] = []

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Compare the predictions (height, width) of a batch; see `DepthMapper` for the inputs."""
        for item, output in zip(inputs, outputs, strict=True):
            target = read_depth(item["depth_file_name"], self.scale)
            depth = output["depth"].float().cpu().numpy()
            # An image may have been cropped; only the crop is evaluated.
            prediction = np.full(target.shape, np.nan, np.float32)
            top, left = item.get("crop", (0, 0))
            window = prediction[top : top + depth.shape[0], left : left + depth.shape[1]]
            if window.shape != depth.shape:
                raise ValueError(
                    f"the prediction of {item.get('file_name')} has {depth.shape} pixels, its "
                    f"depth {target.shape}"
                )
            window[:] = depth
            valid = (target > self.limits[0]) & (target < self.limits[1])
            valid &= self._mask(target.shape) & ~np.isnan(prediction)
            if valid.any():
                prediction = self._to_metres(prediction[valid], target[valid])
                self.rows.append(depth_metrics(prediction, target[valid]))

    def _mask(self, size: tuple[int, int]) -> np.ndarray:
        """(H, W) bool, the pixels inside the crop."""
        sides = np.array(CROPS[self.crop])
        if self.crop != "nyu":
            sides = (sides * np.repeat(size, 2)).astype(int)
        top, bottom, left, right = (int(side) for side in sides)
        mask = np.zeros(size, dtype=bool)
        mask[top:bottom, left:right] = True
        return mask

    def _to_metres(self, prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Aligned and clipped depth, (N,) to (N,)."""
        if self.inverse:
            scale, shift = align(prediction, 1 / target, self.alignment)
            # Inverse depths below zero become the maximum depth.
            depth = 1 / np.maximum(scale * prediction + shift, 1 / self.limits[1])
        else:
            scale, shift = align(prediction, target, self.alignment)
            depth = scale * prediction + shift
        return np.clip(depth, *self.limits)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Means over the images of all processes, on the main process; {} on the others.

        Raises:
            ValueError: if no pixel of the data set was evaluated.
        """
        rows = [row for part in comm.gather(self.rows) for row in part]
        if not comm.is_main_process():
            return {}
        if not rows:
            raise ValueError(
                f"nothing to evaluate on {self.dataset_name!r}: no depth is between TEST.DEPTH.MIN "
                f"and MAX, {self.limits}, inside TEST.DEPTH.CROP {self.crop!r}"
            )
        return {"depth": {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}}
