"""Load checkpoints for evaluation, training or resuming, and refuse damaged or incomplete ones."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from ..files import check_finite, halved, read_checkpoint, read_weights
from ..files.weights import check_tensors, suffix_of
from .outputs import check_new_file

__all__ = [
    "Checkpointer",
    "Slimmed",
    "frozen_weights",
    "load_weights",
    "slim_checkpoint",
    "surplus_layers",
]

# State that other code bases store in their blocks and that settings determine.
_NOT_WEIGHTS = {
    "attn_mask",
    "num_batches_tracked",
    "relative_coords_table",
    "relative_position_index",
}


class Checkpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that runs no code in files and refuses damaged weights.

    It reads the same formats, with `expedit_d2.files`.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, key: str = "MODEL.WEIGHTS", **others: Any
    ) -> None:
        """
        Args:
            model, save_dir: as in Detectron2.
            key: config key of the path, for error messages.
            **others: ``save_to_disk``, and other checkpointables.
        """
        super().__init__(model, save_dir, **others)
        self.key = key

    def load(self, path: str, checkpointables: Sequence[str] | None = None) -> dict[str, Any]:
        """Load the model and other checkpointables.

        Args:
            path: a file or anything iopath opens; empty loads nothing.
            checkpointables: names of checkpointables to load besides the model; None: all.

        Returns:
            The other entries of the file.

        Raises:
            OSError: if the file does not exist or cannot be downloaded.
            ValueError: if it is not a checkpoint, or is damaged.
        """
        return self._load(path, checkpointables, self.key)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the last checkpoint in ``save_dir`` if requested and possible, else load.

        Raises:
            OSError, ValueError: from `load`.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        try:
            return self._load(self.get_checkpoint_file(), None, "--resume")
        except (OSError, ValueError) as error:
            tag = os.path.join(self.save_dir, "last_checkpoint")
            raise ValueError(
                f"{error}; to resume from an older checkpoint, write its name to {tag!r}"
            ) from None

    def _load(self, path: str, checkpointables: Sequence[str] | None, key: str) -> dict[str, Any]:
        if not path:
            return super().load(path)  # logs that there is nothing to load
        self.logger.info(f"Loading from {path} ...")
        content = self._read(path, key)
        try:
            incompatible = self._load_model(content)
            for name in self.checkpointables if checkpointables is None else checkpointables:
                if name in content:
                    self.checkpointables[name].load_state_dict(content.pop(name))
        except ValueError as error:
            raise ValueError(f"{key} {path!r}: {error}") from None
        self._log_incompatible_keys(incompatible)
        rest = {*incompatible.missing_keys, *(name for name, *_ in incompatible.incorrect_shapes)}
        loaded = {name: w for name, w in self.model.state_dict().items() if name not in rest}
        check_finite(loaded, f"{key} {path!r}")
        return content

    def _read(self, path: str, key: str) -> dict[str, Any]:
        """The file in Detectron2's format, with its flag for matching names heuristically."""
        location, _, query = path.partition("?")
        matching = parse_qs(query) == {"matching_heuristics": ["True"]}
        if matching:
            path = location
        content = read_checkpoint(path, key)
        checkpoint: dict[str, Any] = {"matching_heuristics": True} if matching else {}
        if isinstance(content.get("model"), Mapping):
            checkpoint = content | checkpoint
        elif suffix_of(path) == ".pkl":
            # Caffe2: detection models have "blobs", ImageNet models do not.
            model = _without(content.get("blobs", content), "_momentum")
            checkpoint = {"model": model, "matching_heuristics": True, "__author__": "Caffe2"}
        elif suffix_of(path) == ".pyth":
            model = _without(content.get("model_state", content), "num_batches_tracked")
            checkpoint = {"model": model, "matching_heuristics": True, "__author__": "pycls"}
        else:
            checkpoint["model"] = content
        check_tensors(checkpoint["model"], f"{key} {path!r}")
        return checkpoint


def _without(weights: Any, ending: str) -> dict[str, Any]:
    return {name: w for name, w in dict(weights).items() if not str(name).endswith(ending)}


class _StrictCheckpointer(Checkpointer):
    """Raises an error if the weights do not fit the model, instead of logging it.

    ``elsewhere`` names weights that the model already has: a file without any of them is the
    checkpoint of a head only, in which nothing else may be missing or unexpected.
    """

    elsewhere: frozenset[str] = frozenset()

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        wrong = [
            f"{key} is {tuple(actual)} in the file and {tuple(expected)} in the model"
            for key, actual, expected in incompatible.incorrect_shapes
        ]
        head_only = self.elsewhere and self.elsewhere.issubset(incompatible.missing_keys)
        if head_only:
            missing = [key for key in incompatible.missing_keys if key not in self.elsewhere]
            incompatible.missing_keys[:] = missing
            surplus = incompatible.unexpected_keys
        else:
            surplus = surplus_layers(self.model, incompatible.unexpected_keys)
        wrong += [f"{key} is not in the file" for key in incompatible.missing_keys]
        wrong += [f"{key} is not in the model" for key in surplus]
        if wrong:
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ValueError(f"the weights do not fit the model: {wrong[0]}{more}")
        return incompatible


def surplus_layers(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """Unexpected keys of a checkpoint that belong to a stack of layers of the model.

    These are further blocks, or further layers of a block, so the checkpoint is of another model.
    Other unexpected keys, such as a classifier or a pixel mean, do not affect what the model
    computes.

    Args:
        model: on any device, including "meta".
        keys: keys of the checkpoint that the model does not have.
    """
    stacks = {
        f"{name}."
        for name, module in model.named_modules()
        if (children := [child for child, _ in module.named_children()])
        and all(child.isdigit() for child in children)
    }

    def belongs(key: str) -> bool:
        parts = key.split(".")
        return parts[-1] not in _NOT_WEIGHTS and any(
            part.isdigit() and f"{'.'.join(parts[:index])}." in stacks
            for index, part in enumerate(parts)
        )

    return [key for key in keys if belongs(key)]


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are not trained, by name."""
    return {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}


def load_weights(
    model: nn.Module,
    path: str,
    key: str = "MODEL.WEIGHTS",
    elsewhere: Collection[str] = (),
) -> None:
    """Load all weights of a model.

    Args:
        model: the model.
        path: a file or anything iopath opens: ``detectron2://…``, ``https://…``.
        key: config key of the path, for error messages.
        elsewhere: names of weights that were loaded from another file; this one must have all or
            none of them.

    Raises:
        ValueError: if the path is empty or not a checkpoint; if weights are missing, have the wrong
            shape or are not finite, or if the checkpoint has more layers than the model.
        OSError: if the file does not exist or cannot be downloaded.
    """
    if not path:
        raise ValueError(f"{key} is empty; give the checkpoint to evaluate")
    checkpointer = _StrictCheckpointer(model, key=key)
    checkpointer.elsewhere = frozenset(elsewhere)
    checkpointer.load(path)


class Slimmed(NamedTuple):
    """The result of `slim_checkpoint`.

    Attributes:
        size: of the file, in bytes.
        full_precision: names of the tensors that are not in fp16, as their values would overflow.
    """

    size: int
    full_precision: list[str]


def slim_checkpoint(
    source: str, target: str, elsewhere: Mapping[str, Tensor] | None = None
) -> Slimmed:
    """Write only the weights of a checkpoint, compressed and in fp16.

    Args:
        source: the checkpoint, or anything iopath opens.
        target: the file to write.
        elsewhere: weights to omit, as they are in another file.

    Raises:
        OSError: if the source does not exist or cannot be downloaded, or from `check_new_file`.
        ValueError: if the source is not a checkpoint, has weights that are not finite, or differs
            from ``elsewhere``.
    """
    check_new_file(target, "target")
    # Training checkpoints also have the state of the optimizer and schedule.
    weights = read_weights(source, "the checkpoint")
    check_finite(weights, f"the checkpoint {source!r}")
    elsewhere = elsewhere or {}
    for key, weight in elsewhere.items():
        if key not in weights or not torch.equal(weights[key], weight.cpu()):
            raise ValueError(
                f"the checkpoint {source!r} has another {key} than the weights that it was trained "
                "from, so it cannot be omitted"
            )
    halves = {key: halved(w) for key, w in weights.items() if key not in elsewhere}
    # torch.load reads compressed archives, but torch.save does not write them.
    buffer = io.BytesIO()
    torch.save({"model": halves}, buffer)
    with (
        zipfile.ZipFile(buffer) as plain,
        zipfile.ZipFile(target, "x", zipfile.ZIP_DEFLATED, compresslevel=9) as small,
    ):
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))
    full_precision = [
        key for key, w in halves.items() if w.is_floating_point() and w.dtype != torch.float16
    ]
    return Slimmed(os.path.getsize(target), full_precision)
