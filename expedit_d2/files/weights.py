"""Reading files of weights as data: nothing in them is executed.

PyTorch's own files are read with ``weights_only``; the pickles of Detectron2's model zoo by an
unpickler that knows numpy's arrays and plain containers, and no other name.
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

#: Names in pickled arrays and scalars of numpy; the second is the place in numpy 2.
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
    """A name that a pickle asks for and must not have."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _ArrayUnpickler(pickle.Unpickler):
    """Arrays, containers, strings and numbers; all other names are refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NUMPY_NAMES | _PLAIN_NAMES:
            raise _Refused(f"{module}.{name}")
        return super().find_class(module, name)


def _safe_globals() -> AbstractContextManager:
    """What PyTorch may create besides tensors.

    Checkpoints of training have scalars of numpy (metrics, learning rates) and the command line.
    """
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        return nullcontext()  # PyTorch before 2.6 takes no names, and makes none of these
    made = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]
    return torch.serialization.safe_globals(
        [
            np.ndarray,
            np.dtype,
            argparse.Namespace,
            *{type(np.dtype(kind)) for kind in np.typecodes["All"]},
            # numpy 1 and 2 call the modules of these two by different names.
            *(
                (f, f"numpy.{core}.multiarray.{f.__name__}")
                for core in ("core", "_core")
                for f in made
            ),
        ]
    )


def suffix_of(file: str) -> str:
    """``.pkl``, also of a downloaded file whose name ends in the URL's query."""
    return Path(file.partition("?")[0]).suffix


def _check_sums(file: str) -> None:
    """Raise if an archive fails its checksums, which PyTorch does not verify.

    Entries without a checksum (0) are skipped: PyTorch can be configured to write none.
    """
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.CRC:
                with archive.open(entry) as content:  # raises BadZipFile at the end
                    while content.read(1 << 20):
                        pass


def _unpickle(file: IO[bytes]) -> Any:
    # Files of Python 2 have bytes for strings.
    make = pickle.Unpickler if runs_code() else _ArrayUnpickler
    return make(file, encoding="latin1").load()


def _read(file: str) -> Any:
    """The content of a file in any of the formats; raises whatever the libraries do."""
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
    """The name that was refused, if that is what an error is about."""
    if isinstance(error, _Refused):
        return error.name
    if "TorchScript" in str(error):
        return "a TorchScript program"
    found = isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL (\S+)", str(error))
    return found.group(1) if found else None


def read_checkpoint(path: str, key: str) -> dict[str, Any]:
    """What a file of weights holds; nothing in it is executed.

    Args:
        path: see `fetch`; PyTorch's format, safetensors, or a pickle of arrays (``.pkl``).
        key: the config key or argument that gave the path, for messages.

    Raises:
        OSError: if there is no such file, or it cannot be downloaded.
        ValueError: if it is not such a file, is damaged, or holds what could run code. A download
            is removed from the cache then.
    """
    local = fetch(path, key)
    what = f"{key} {path!r}"
    try:
        content = _read(local)
    except Exception as error:  # the libraries raise several, by the kind of damage
        if (name := _refused(error)) is not None:
            raise ValueError(
                f"{what} holds {name} beside tensors, and reading that can run any code; {REMEDY}"
            ) from None
        again = "; it is removed from the cache, try again" if drop_download(path, local) else ""
        raise ValueError(
            f"{what} is no file of weights, or is damaged ({_reason(error, local)}){again}"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{what} must hold weights by name, got a {type(content).__name__}")
    return content


def _reason(error: Exception, file: str) -> str:
    if os.path.isfile(file) and os.path.getsize(file) == 0:
        return "it has 0 bytes"
    if isinstance(error, pickle.UnpicklingError):  # of several lines, about versions of PyTorch
        return "it cannot be unpickled"
    line = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def check_tensors(weights: Mapping[str, Any], what: str) -> None:
    """Raise a ValueError unless there are tensors or arrays by name, and nothing else.

    Args:
        weights: to look at.
        what: their name in the message.
    """
    other = [
        name
        for name, value in weights.items()
        if not isinstance(name, str) or not isinstance(value, (Tensor, np.ndarray))
    ]
    if other or not weights:
        found = f"{other[0]!r} is a {type(weights[other[0]]).__name__}" if other else "it is empty"
        raise ValueError(
            f"{what} must hold tensors by name, or an entry 'model' that does, but {found}"
        )


def read_weights(path: str, key: str, below: Sequence[str] = ("model",)) -> dict[str, Tensor]:
    """The tensors of a file by their names.

    Args:
        path, key: see `read_checkpoint`.
        below: where they may lie in it, one below the other too; else they are all that is in it.

    Raises:
        OSError, ValueError: as `read_checkpoint`, and if there is something else among the tensors.
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
    """Raise a ValueError that names the first tensor with an infinity or a NaN.

    Args:
        weights: tensors by name.
        what: the file that they are of, for the message.
    """
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{what}: {name} is not finite, it has an infinity or a NaN")
