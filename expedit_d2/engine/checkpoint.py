"""Loading weights for evaluation: all of them, or a clear error."""

from __future__ import annotations

import io
import os
import zipfile
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

__all__ = ["load_weights", "slim_checkpoint"]


class _StrictCheckpointer(DetectionCheckpointer):
    """Raises where the weights and the model do not fit, instead of logging it."""

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        wrong = [
            f"{key} is {tuple(found)} in the file and {tuple(wanted)} in the model"
            for key, found, wanted in incompatible.incorrect_shapes
        ]
        wrong += [f"{key} is not in the file" for key in incompatible.missing_keys]
        if wrong:
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ValueError(f"the weights do not fit the model: {wrong[0]}{more}")
        return incompatible


def load_weights(model: nn.Module, path: str, key: str = "MODEL.WEIGHTS") -> None:
    """Load every weight of a model.

    Args:
        model: the model.
        path: a file or anything iopath opens: ``detectron2://…``, ``https://…``.
        key: the config key that gave the path, for the message.

    Raises:
        ValueError: if there is no path, or if weights are missing or have another shape.
        FileNotFoundError: if there is no such file.
    """
    if not path:
        raise ValueError(f"{key} is empty; give the checkpoint to evaluate")
    if "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"{key}: there is no file {path!r}")
    if not PathManager.isfile(path) and "://" in path:
        PathManager.get_local_path(path)  # downloads, or says why it cannot
    try:
        _StrictCheckpointer(model).load(path)
    except ValueError as error:
        raise ValueError(f"{key} {path!r}: {error}") from None


def slim_checkpoint(source: str, target: str) -> int:
    """Write a checkpoint's weights alone, compressed, floating-point ones in fp16.

    Returns:
        the size in bytes.

    Raises:
        FileNotFoundError: if there is no source.
        FileExistsError: if the target is there already.
    """
    if not os.path.isfile(source):
        raise FileNotFoundError(f"there is no checkpoint {source!r}")
    if os.path.exists(target):
        raise FileExistsError(f"{target!r} is there already; remove it or choose another name")
    # Training checkpoints hold the state of the optimizer and schedule beside the tensors.
    weights = torch.load(source, map_location="cpu", weights_only=False)["model"]
    weights = {key: w.half() if w.is_floating_point() else w for key, w in weights.items()}
    # torch.load inflates what is deflated; torch.save does not deflate.
    buffer = io.BytesIO()
    torch.save({"model": weights}, buffer)
    with (
        zipfile.ZipFile(buffer) as plain,
        zipfile.ZipFile(target, "x", zipfile.ZIP_DEFLATED, compresslevel=9) as small,
    ):
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))
    return os.path.getsize(target)
