"""Loading weights to evaluate, to start from or to resume: complete and intact, or an error."""

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

# State that other code bases write into their blocks, and that follows from the settings.
_NOT_WEIGHTS = {
    "attn_mask",
    "num_batches_tracked",
    "relative_coords_table",
    "relative_position_index",
}


class Checkpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that runs no code from files and takes no damaged weights.

    It reads the formats of the original, by `expedit_d2.files`.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, key: str = "MODEL.WEIGHTS", **others: Any
    ) -> None:
        """
        Args:
            model, save_dir: see Detectron2's.
            key: the config key that gives the path, for messages.
            **others: ``save_to_disk``, and what is saved besides the model.
        """
        super().__init__(model, save_dir, **others)
        self.key = key

    def load(self, path: str, checkpointables: Sequence[str] | None = None) -> dict[str, Any]:
        """Load the model, and what was saved besides it.

        Args:
            path: a file or anything iopath opens; empty loads nothing.
            checkpointables: names of what is loaded besides the model; None: all.

        Returns:
            What else the file holds.

        Raises:
            OSError: if there is no such file, or it cannot be downloaded.
            ValueError: if it is not a file of weights, or they are damaged.
        """
        return self._load(path, checkpointables, self.key)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the last checkpoint in ``save_dir``, if wanted and there; else start afresh.

        Raises:
            OSError, ValueError: as `load`.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        try:
            return self._load(self.get_checkpoint_file(), None, "--resume")
        except (OSError, ValueError) as error:
            tag = os.path.join(self.save_dir, "last_checkpoint")
            raise ValueError(
                f"{error}; to go on from an older checkpoint, write its name into {tag!r}"
            ) from None

    def _load(self, path: str, checkpointables: Sequence[str] | None, key: str) -> dict[str, Any]:
        if not path:
            return super().load(path)  # says that there is nothing to load
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
        left = {*incompatible.missing_keys, *(name for name, *_ in incompatible.incorrect_shapes)}
        loaded = {name: w for name, w in self.model.state_dict().items() if name not in left}
        check_finite(loaded, f"{key} {path!r}")
        return content

    def _read(self, path: str, key: str) -> dict[str, Any]:
        """The file in the form that Detectron2 loads, which tells where names must be matched."""
        location, _, query = path.partition("?")
        matching = parse_qs(query) == {"matching_heuristics": ["True"]}
        if matching:
            path = location
        content = read_checkpoint(path, key)
        found: dict[str, Any] = {"matching_heuristics": True} if matching else {}
        if isinstance(content.get("model"), Mapping):
            found = content | found
        elif suffix_of(path) == ".pkl":
            # Caffe2's; models for detection have blobs, those of ImageNet do not.
            model = _without(content.get("blobs", content), "_momentum")
            found = {"model": model, "matching_heuristics": True, "__author__": "Caffe2"}
        elif suffix_of(path) == ".pyth":
            model = _without(content.get("model_state", content), "num_batches_tracked")
            found = {"model": model, "matching_heuristics": True, "__author__": "pycls"}
        else:
            found["model"] = content
        check_tensors(found["model"], f"{key} {path!r}")
        return found


def _without(weights: Any, ending: str) -> dict[str, Any]:
    return {name: w for name, w in dict(weights).items() if not str(name).endswith(ending)}


class _StrictCheckpointer(Checkpointer):
    """Raises where the weights and the model do not fit, instead of logging it.

    ``elsewhere`` names weights that the model already has: a file without any of them is that of a
    head alone, and then nothing else may be missing or left over.
    """

    elsewhere: frozenset[str] = frozenset()

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        wrong = [
            f"{key} is {tuple(found)} in the file and {tuple(wanted)} in the model"
            for key, found, wanted in incompatible.incorrect_shapes
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
    """Weights that belong to a stack of layers of the model, which would be another model without.

    These are further blocks, or further layers in a block. A head that the model lacks altogether,
    a classifier, or a pixel mean does not change what it computes.

    Args:
        model: on any device, "meta" too.
        keys: of a file, that the model does not have.
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
    """The weights that are not trained, by their names."""
    return {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}


def load_weights(
    model: nn.Module,
    path: str,
    key: str = "MODEL.WEIGHTS",
    elsewhere: Collection[str] = (),
) -> None:
    """Load every weight of a model.

    Args:
        model: the model.
        path: a file or anything iopath opens: ``detectron2://…``, ``https://…``.
        key: the config key that gave the path, for the message.
        elsewhere: names of weights that the model has from another file, and that this one may
            leave out, all of them or none.

    Raises:
        ValueError: if there is no path, or the file holds something else; if weights are missing,
            have another shape, are not finite, or are of more layers than the model has.
        OSError: if there is no such file, or it cannot be downloaded.
    """
    if not path:
        raise ValueError(f"{key} is empty; give the checkpoint to evaluate")
    checkpointer = _StrictCheckpointer(model, key=key)
    checkpointer.elsewhere = frozenset(elsewhere)
    checkpointer.load(path)


class Slimmed(NamedTuple):
    """What `slim_checkpoint` wrote.

    Attributes:
        size: of the file, in bytes.
        full_precision: names of the tensors that keep their type, as values are too large for fp16.
    """

    size: int
    full_precision: list[str]


def slim_checkpoint(
    source: str, target: str, elsewhere: Mapping[str, Tensor] | None = None
) -> Slimmed:
    """Write a checkpoint's weights alone, compressed, floating-point ones in fp16.

    Args:
        source: the checkpoint, or anything iopath opens.
        target: the file to write.
        elsewhere: weights that are left out, as they are in another file.

    Raises:
        OSError: if there is no source, or it cannot be downloaded; or as `check_new_file`.
        ValueError: if the source is not a checkpoint, has weights that are not finite, or other
            ones than ``elsewhere`` under the same names.
    """
    check_new_file(target, "target")
    # Training checkpoints hold the state of the optimizer and schedule besides the tensors.
    weights = read_weights(source, "the checkpoint")
    check_finite(weights, f"the checkpoint {source!r}")
    elsewhere = elsewhere or {}
    for key, weight in elsewhere.items():
        if key not in weights or not torch.equal(weights[key], weight.cpu()):
            raise ValueError(
                f"the checkpoint {source!r} has another {key} than the weights that it was trained "
                "from, so it cannot be left out"
            )
    halves = {key: halved(w) for key, w in weights.items() if key not in elsewhere}
    # torch.load inflates what is deflated; torch.save does not deflate.
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
