"""Read checkpoints as data, without running code in them.

PyTorch's files are read with ``weights_only``; the pickles of Detectron2's model zoo by an
unpickler that allows only NumPy arrays and plain containers.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from .download import drop_download, fetch
from .trust import REMEDY, runs_code

__all__ = ["check_finite", "check_tensors", "read_checkpoint", "read_weights", "suffix_of"]

#: Names in pickled NumPy arrays and scalars, in NumPy 1 (core) and NumPy 2 (_core).
_NUMPY_NAMES = {
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
_PLAIN_NAMES = {("collections", "OrderedDict"), ("_codecs", "encode")}


class _Refused(pickle.UnpicklingError):
    """A pickle refers to a name that is not allowed."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays, containers, strings and numbers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NUMPY_NAMES | _PLAIN_NAMES:
            raise _Refused(f"{module}.{name}")
        return super().find_class(module, name)


def _safe_globals() -> AbstractContextManager:
    """Allow PyTorch to create more than tensors.

    Training checkpoints have NumPy scalars (metrics, learning rates) and command line arguments.
    """
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        return nullcontext()  # PyTorch before 2.6 does not support these
    made = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]
    return torch.serialization.safe_globals(
        [
            np.ndarray,
            np.dtype,
            argparse.Namespace,
            *{type(np.dtype(kind)) for kind in np.typecodes["All"]},
            # The modules of these two differ between NumPy 1 and 2.
            *(
                (f, f"numpy.{core}.multiarray.{f.__name__}")
                for core in ("core", "_core")
                for f in made
            ),
        ]
    )


def suffix_of(file: str) -> str:
    """Suffix such as ``.pkl``, without the query of a URL."""
    return Path(file.partition("?")[0]).suffix


def _check_sums(file: str) -> None:
    """Verify the checksums of an archive, which PyTorch does not.

    Entries without a checksum (0) are skipped, as PyTorch can be configured not to write them.
    """
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.CRC:
                with archive.open(entry) as content:  # raises BadZipFile at the end
                    while content.read(1 << 20):
                        pass


def _unpickle(file: IO[bytes]) -> Any:
    # Strings of Python 2 are bytes.
    make = pickle.Unpickler if runs_code() else _ArrayUnpickler
    return make(file, encoding="latin1").load()


def _read(file: str) -> Any:
    """The content of a file in any of the formats; errors of libraries are passed on."""
    if suffix_of(file) == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    archive = zipfile.is_zipfile(file)
    if suffix_of(file) == ".pkl" and not archive:
        with open(file, "rb") as opened:
            return _unpickle(opened)
    if archive:
        _check_sums(file)
    with _safe_globals():
        return torch.load(file, map_location="cpu", weights_only=not runs_code())


def _refused(error: Exception) -> str | None:
    """The name that was refused, if that is the cause of an error."""
    if isinstance(error, _Refused):
        return error.name
    if "TorchScript" in str(error):
        return "a TorchScript program"
    match = isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL (\S+)", str(error))
    return match.group(1) if match else None


def read_checkpoint(path: str, key: str) -> dict[str, Any]:
    """Read a checkpoint without running code in it.

    Args:
        path: see `fetch`; PyTorch's format, safetensors, or a pickle of arrays (``.pkl``).
        key: config key or argument of the path, for error messages.

    Raises:
        OSError: if the file does not exist or cannot be downloaded.
        ValueError: if it is not a checkpoint, is damaged, or could run code. A damaged download is
            removed from the cache.
    """
    local = fetch(path, key)
    what = f"{key} {path!r}"
    try:
        content = _read(local)
    except Exception as error:  # libraries raise many kinds
        if (name := _refused(error)) is not None:
            raise ValueError(
                f"{what} contains {name}, and loading that can run any code; {REMEDY}"
            ) from None
        again = "; removed from the cache, try again" if drop_download(path, local) else ""
        raise ValueError(
            f"{what} is not a checkpoint, or is damaged ({_reason(error, local)}){again}"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{what} must contain weights by name, got a {type(content).__name__}")
    return content


def _reason(error: Exception, file: str) -> str:
    if os.path.isfile(file) and os.path.getsize(file) == 0:
        return "it has 0 bytes"
    if isinstance(error, pickle.UnpicklingError):  # its long message is about versions of PyTorch
        return "it cannot be unpickled"
    line = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def check_tensors(weights: Mapping[str, Any], what: str) -> None:
    """Raise a ValueError unless all values are tensors or arrays by name.

    Args:
        weights: the values to check.
        what: their description in the error message.
    """
    other = [
        name
        for name, value in weights.items()
        if not isinstance(name, str) or not isinstance(value, (Tensor, np.ndarray))
    ]
    if other or not weights:
        reason = f"{other[0]!r} is a {type(weights[other[0]]).__name__}" if other else "it is empty"
        raise ValueError(
            f"{what} must contain tensors by name, or an entry 'model' with them, but {reason}"
        )


def read_weights(path: str, key: str, below: Sequence[str] = ("model",)) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name.

    Args:
        path, key: see `read_checkpoint`.
        below: entries that may contain them, possibly nested; without these, the whole file does.

    Raises:
        OSError, ValueError: from `read_checkpoint`, or if a value is not a tensor.
    """
    content: Mapping[str, Any] = read_checkpoint(path, key)
    while inner := [content[n] for n in below if isinstance(content.get(n), Mapping)]:
        content = inner[0]
    check_tensors(content, f"{key} {path!r}")
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in content.items()
    }


def check_finite(weights: Mapping[str, Tensor], what: str) -> None:
    """Raise a ValueError that names the first tensor with an infinity or NaN.

    Args:
        weights: tensors by name.
        what: their file, for the error message.
    """
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{what}: {name} is not finite, it has an infinity or NaN")
