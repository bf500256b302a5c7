"""Models as `torch.export` programs and as ONNX files, for images of any height and width.

Needs torch >= 2.7; ONNX also needs the extra "onnx" (onnx, onnxruntime, onnxscript).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import detectron2_vit
from .api import is_expedited
from .compat import tree_flatten
from .methods import METHOD_REGISTRY
from .tracing import shape_of

__all__ = ["ImageModel", "check_onnx", "export_onnx", "export_program", "onnx_session"]


class ImageModel(nn.Module):
    """Tensor in, tensor out: what a Detectron2 model does to a whole image, without its lists.

    The model's own resizing, sliding windows and resizing of the output stay outside.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: Segmenter or DPT, or any other with ``predict``, normalised images (B, 3, H, W)
                to a tensor, and ``pixel_mean`` and ``pixel_std``.

        Raises:
            ValueError: for a model without these.
        """
        super().__init__()
        for name in ("predict", "pixel_mean", "pixel_std"):
            if not hasattr(model, name):
                raise ValueError(
                    f"a whole {type(model).__name__} cannot be exported: it has no {name!r}; "
                    "export its backbone"
                )
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) of 0 to 255, channels as the model has them, to scores or depth."""
        return self.model.predict((images - self.model.pixel_mean) / self.model.pixel_std)


def export_program(
    model: nn.Module, example: Tensor, dynamic: bool = True
) -> torch.export.ExportedProgram:
    """Trace a model, plain or expedited, with `torch.export`.

    Args:
        model: a module that takes one tensor of images (B, 3, H, W) and gives tensors, in
            evaluation mode.
        example: such a tensor; the program takes as many images at a time.
        dynamic: images may have any height and width that the model takes; False fixes the
            example's, which traces faster.

    Raises:
        ValueError: for an example of another shape, a model in training mode, or a torch that is
            too old; or if only one size can be exported of this model, and it must be dynamic.
    """
    if example.dim() != 4:
        raise ValueError(f"example must be images (B, 3, H, W), got {shape_of(example)}")
    if model.training:
        raise ValueError("a model in training mode cannot be exported; call eval() before")
    if not hasattr(torch.compiler, "is_exporting"):
        raise ValueError(f"export needs torch >= 2.7, got {torch.__version__}")
    shapes = None
    if dynamic:
        _check_free_size(model, onnx=False)
        size = torch.export.Dim.DYNAMIC  # not AUTO, which may fix it without a word
        shapes = ({2: size, 3: size},)
    # With gradients torch chooses attention kernels that leave other strides than the
    # ones it uses for ONNX. Not strict: the hook keeps its state in Python.
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)


def _check_free_size(model: nn.Module, onnx: bool) -> None:
    """Whether a model can be traced for any height and width, before that is tried for minutes.

    Raises:
        ValueError: if not; docs/export.md says why.
    """
    remedy = "export one file for each size: --fixed, or dynamic=False in Python"
    reduced = is_expedited(model)
    for name, method in METHOD_REGISTRY.items():
        if method.unstructured and any(type(module) is method for module in model.modules()):
            raise ValueError(
                f"METHOD {name} leaves no grid, so the number of tokens in each block follows from "
                f"the size of the image, and it cannot be exported for any size; {remedy}"
            )
    for vit in filter(detectron2_vit.matches, model.modules()):
        if (onnx or reduced) and any(getattr(m, "use_rel_pos", False) for m in vit.modules()):
            raise ValueError(
                "ViTDet's relative positions cannot be exported for images of any size; " + remedy
            )


def export_onnx(
    model: nn.Module, example: Tensor, path: str | os.PathLike, dynamic: bool = True
) -> torch.export.ExportedProgram:
    """Write a model, plain or expedited, as an ONNX file.

    Args:
        model, example, dynamic: see `export_program`.
        path: of the file. Weights are in it, or next to it where they exceed 2 GB.

    Returns:
        The program that was written.

    Raises:
        ValueError: as `export_program`.
        ModuleNotFoundError: without onnx or onnxscript.
    """
    _need("onnx", "onnxscript")
    if dynamic:
        _check_free_size(model, onnx=True)
    program = export_program(model, example, dynamic)
    with torch.no_grad():
        onnx = torch.onnx.export(
            program, dynamo=True, custom_translation_table=_translations(), verbose=False
        )
    onnx.save(path)
    return program


def _translations() -> dict[Callable, Callable]:
    """What torch's exporter has no rule for: rounding a size (RATIO), stable sorts (merge)."""
    from onnxscript import INT64
    from onnxscript import opset18 as op

    def to_nearest(x: Any, digits: None = None) -> Any:
        return op.Cast(op.Round(x), to=INT64.dtype)  # halves to even, as in Python

    def sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        # Of equal values TopK puts the one with the lower index first.
        count = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)

    return {round: to_nearest, torch.ops.aten.sort.stable: sort}


def onnx_session(path: str | os.PathLike, threads: int | None = None) -> Callable[[Tensor], tuple]:
    """A function that runs an ONNX file with ONNX Runtime on the CPU.

    Args:
        path: of a file by `export_onnx`.
        threads: of one operator; None: as many as torch has.

    Returns:
        images to a tuple of outputs, all on the CPU.

    Raises:
        ModuleNotFoundError: without onnxruntime.
    """
    _need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )
    (images,) = (x.name for x in session.get_inputs())

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(None, {images: x.cpu().numpy()})))

    return run


def check_onnx(model: nn.Module, path: str | os.PathLike, images: Tensor) -> float:
    """The largest absolute difference between what PyTorch and ONNX Runtime make of images."""
    with torch.no_grad():
        expected, _ = tree_flatten(model(images))
    found = onnx_session(path)(images)
    return max(
        float((ours.cpu() - theirs).abs().max())
        for ours, theirs in zip(expected, found, strict=True)
    )


def _need(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} missing; install with: python tools/install.py --extras onnx"
        )
