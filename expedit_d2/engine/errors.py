"""Error messages of the commands: one sentence and an exit status.

This package raises errors that a user can fix with a sentence, as ValueError, OSError and so on.
Errors of libraries are turned into sentences here. All others are bugs and keep their tracebacks:
TypeError, AttributeError, KeyError, IndexError, or a ValueError without a `raise` statement.
``EXPEDIT_TRACEBACK=1`` keeps all tracebacks.
"""

from __future__ import annotations

import difflib
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import yaml
from detectron2.data import DatasetCatalog
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from omegaconf.errors import OmegaConfBaseException
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..ending import end

__all__ = ["ExplainedError", "close_to", "explain", "one_sentence", "unknown_data_set"]

#: Libraries that check user input by assertions.
_CHECKING = re.compile(r"[/\\](detectron2|fvcore|yacs|iopath|timm|pycocotools|panopticapi)[/\\]")

#: Name of a registry -> config key for its entries, and the registry.
_REGISTRIES = {
    "META_ARCH": ("MODEL.META_ARCHITECTURE", META_ARCH_REGISTRY),
    "BACKBONE": ("MODEL.BACKBONE.NAME", BACKBONE_REGISTRY),
    "PROPOSAL_GENERATOR": ("MODEL.PROPOSAL_GENERATOR.NAME", PROPOSAL_GENERATOR_REGISTRY),
    "RPN_HEAD": ("MODEL.RPN.HEAD_NAME", RPN_HEAD_REGISTRY),
    "ANCHOR_GENERATOR": ("MODEL.ANCHOR_GENERATOR.NAME", ANCHOR_GENERATOR_REGISTRY),
    "ROI_HEADS": ("MODEL.ROI_HEADS.NAME", ROI_HEADS_REGISTRY),
    "ROI_BOX_HEAD": ("MODEL.ROI_BOX_HEAD.NAME", ROI_BOX_HEAD_REGISTRY),
    "ROI_MASK_HEAD": ("MODEL.ROI_MASK_HEAD.NAME", ROI_MASK_HEAD_REGISTRY),
    "SEM_SEG_HEADS": ("MODEL.SEM_SEG_HEAD.NAME", SEM_SEG_HEADS_REGISTRY),
}

_MEMORY = (
    "out of memory on the {where}: use smaller images (INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST), "
    "smaller batches (--batch, SOLVER.IMS_PER_BATCH), a smaller --dtype or another MODEL.DEVICE"
)


_NO_GPU = re.compile(
    "NVIDIA driver|No CUDA GPUs|invalid device ordinal|no kernel image|not compiled with CUDA"
)


class ExplainedError(Exception):
    """Carries an error message from one process to another."""


@contextmanager
def one_sentence(
    tool: str, on_interrupt: str | Callable[[], str] = "nothing was written"
) -> Iterator[None]:
    """End the process with one sentence on stderr for errors that a user can fix.

    Args:
        tool: program name, the start of the sentence.
        on_interrupt: which results an interruption leaves, or a function that returns this.

    Raises:
        SystemExit: with the sentence as its text, and code 2, or 130 after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        results = on_interrupt() if callable(on_interrupt) else on_interrupt
        end(tool, f"interrupted; {results}", 130)
    except Exception as error:
        sentence = explain(error)
        if sentence is None or os.environ.get("EXPEDIT_TRACEBACK"):
            raise
        end(tool, sentence, 2)


def close_to(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`` (did you mean …?)`` with the most similar word, or an empty string."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f" (did you mean {matches[0]}?)" if matches else ""


def explain(error: BaseException) -> str | None:
    """An error as one sentence for the user; None for a bug."""
    for kinds, words in _WORDS:
        if isinstance(error, kinds):
            sentence = words(error)
            if sentence:
                return " ".join(sentence.split())
    return None


# ------------------------------------------------------------------------- where it was raised


def _origin(error: BaseException) -> tuple[str, str, str]:
    """Message, file and source line of an error, which a worker of a loader may have raised."""
    text = str(error)
    if "\nOriginal Traceback" in text:
        return _origin_in_text(text)
    frames = traceback.extract_tb(error.__traceback__)
    return (text, frames[-1].filename, frames[-1].line or "") if frames else (text, "", "")


def _origin_in_text(text: str) -> tuple[str, str, str]:
    """`_origin` for a formatted traceback."""
    *_, last = text.rpartition('  File "')
    lines = last.strip().splitlines()
    start = next((i for i, line in enumerate(lines) if i and not line.startswith(" ")), len(lines))
    message = "\n".join(lines[start:]).partition(": ")[2]
    return message, lines[0].partition('"')[0], lines[1].strip() if start > 1 else ""


# ---------------------------------------------------------------------------- kinds of errors


def _of_process(error: ProcessRaisedException) -> str | None:
    """The sentence that `launch` passes on from one of several processes."""
    name = f"{ExplainedError.__module__}.{ExplainedError.__qualname__}: "
    _, separator, sentence = str(error).rpartition(f"\n{name}")
    return sentence if separator else None


def _of_exit(error: ProcessExitedException) -> str | None:
    if error.exit_code < 0:  # by a signal
        return (
            f"a process was killed ({error}), perhaps as memory ran out; use fewer processes "
            "(--num-gpus), or smaller images or batches"
        )
    return None


def _of_memory(error: BaseException) -> str:
    return _MEMORY.format(where="GPU" if "cuda" in str(error).lower() else "CPU")


def _of_torch(error: Exception) -> str | None:
    text = str(error)
    if "out of memory" in text or "can't allocate memory" in text:
        return _of_memory(error)
    if _NO_GPU.search(text):
        return f"the GPU cannot be used ({text.splitlines()[0]}); give MODEL.DEVICE cpu"
    if "Kernel size can't be greater than actual input size" in text:
        return f"an image is too small for the model ({text.splitlines()[0]}); give larger ones"
    if "address already in use" in text or "EADDRINUSE" in text:
        return "--dist-url: the port is in use by another program; give another one, or auto"
    return None


def _of_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{mark.name}, line {mark.line + 1}: " if mark else ""
    return f"{where}invalid YAML ({getattr(error, 'problem', None) or error}); fix the file"


def _of_key(error: KeyError) -> str | None:
    text = str(error.args[0]) if error.args else ""
    match = re.match(r"No object named '(.*)' found in '(.*)' registry!", text)
    if match and match[2] in _REGISTRIES:
        key, registry = _REGISTRIES[match[2]]
        return (
            f"{key}: there is no {match[1]!r}{close_to(match[1], dict(registry))}; "
            "give a registered name, or register your own with --import MODULE"
        )
    match = re.match(r"Dataset '(.*)' is not registered!", text)
    if match:
        return unknown_data_set(match[1])
    if "input_shape[" in _origin(error)[2]:
        return (
            f"IN_FEATURES of MODEL.RPN, MODEL.ROI_HEADS or a head has {text!r}, which is not an "
            "output of the backbone; give some of its OUT_FEATURES"
        )
    return None


def unknown_data_set(name: str) -> str:
    """The error message for an unknown data set."""
    return (
        f"there is no data set {name!r}{close_to(name, DatasetCatalog.list())}; give a name that "
        "is registered with Detectron2, such as coco_2017_val or collage_val, the path of a COCO-"
        "format .json file, or register your own with --import MODULE"
    )


def _of_system(error: OSError) -> str:
    if error.errno is None or error.strerror is None or error.filename is None:
        return _origin(error)[0] or type(error).__name__
    path = error.filename if error.filename2 is None else error.filename2  # target of a rename
    remedy = {
        FileNotFoundError: "give an existing path",
        PermissionError: "change its permissions or give another path",
        IsADirectoryError: "give a file",
        NotADirectoryError: "give a folder",
        FileExistsError: "remove it or give another path",
    }.get(type(error), "fix that or give another path")
    return f"{str(path)!r}: {error.strerror.lower()}; {remedy}"


def _of_import(error: ImportError) -> str | None:
    message, _, line = _origin(error)
    if line.startswith("raise "):
        return message
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package in ("", "expedit_d2"):
        return None
    return f"the package {package!r} is not installed; install it with pip"


def _of_value(error: ValueError) -> str | None:
    message, file, line = _origin(error)
    if not line.startswith("raise "):
        return None
    ours = type(error).__module__.startswith("expedit_d2.")
    return message if ours else message + _hint(file)


def _hint(file: str) -> str:
    """Which library a message comes from, if any."""
    _, installed, path = file.rpartition(f"site-packages{os.sep}")
    if not installed:
        return ""
    return f" (from {path.partition(os.sep)[0]}; EXPEDIT_TRACEBACK=1 shows where)"


def _of_assertion(error: AssertionError) -> str | None:
    message, file, line = _origin(error)
    if _NO_GPU.search(message):
        return _of_torch(error)
    if not message or not line.startswith("assert ") or not _CHECKING.search(file):
        return None
    if len(message.split()) < 3:  # only a value
        condition = line.removeprefix("assert ").rpartition(",")[0]
        message = f"{message!r} is invalid: {condition or 'something else'} is required"
    return message + _hint(file)


def _of_lazy_config(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    text = str(error.msg or error).splitlines()[0]
    return f"{key or 'an override'} of the LazyConfig: {text}; fix the config or the override"


def _of_arguments(error: TypeError) -> str | None:
    """A `_target_` of a LazyConfig that is called with wrong arguments."""
    frames = traceback.extract_tb(error.__traceback__)
    if frames and frames[-1].filename.endswith(os.path.join("config", "instantiate.py")):
        return f"the LazyConfig calls something with wrong arguments: {error}"
    return None


#: Types of errors and functions that explain them, in order; None means a bug.
_WORDS: list[tuple[type | tuple[type, ...], Callable[..., str | None]]] = [
    (ExplainedError, str),
    (ProcessRaisedException, _of_process),
    (ProcessExitedException, _of_exit),
    ((torch.cuda.OutOfMemoryError, MemoryError), _of_memory),
    (yaml.YAMLError, _of_yaml),
    (OmegaConfBaseException, _of_lazy_config),
    (KeyError, _of_key),
    (OSError, _of_system),
    (ImportError, _of_import),
    (ValueError, _of_value),
    (AssertionError, _of_assertion),
    (RuntimeError, _of_torch),
    (TypeError, _of_arguments),
]
