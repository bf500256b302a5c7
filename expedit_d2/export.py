"""Export models as `torch.export` programs and ONNX files, for images of any height and width.

Needs torch >= 2.7; ONNX also needs the extra "onnx" (onnx, onnxruntime, onnxscript).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import find_transformer
from .api import is_expedited
from .compat import tree_flatten
from .methods import METHOD_REGISTRY
from .tracing import shape_of

__all__ = ["ImageModel", "check_onnx", "export_onnx", "export_program", "onnx_session"]


class ImageModel(nn.Module):
    """A Detectron2 model as a function from a tensor to a tensor, for whole images.

    The resizing of images and outputs and sliding windows are not part of it.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: Segmenter, DPT, or any model with ``pixel_mean``, ``pixel_std`` and ``predict``,
                from normalised images (B, 3, H, W) to a tensor.

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
        """Images (B, 3, H, W) of 0 to 255, in the model's channel order, to scores or depth."""
        return self.model.predict((images - self.model.pixel_mean) / self.model.pixel_std)


def export_program(
    model: nn.Module, example: Tensor, dynamic: bool = True
) -> torch.export.ExportedProgram:
    """Trace a model, plain or expedited, with `torch.export`.

    Args:
        model: a module in evaluation mode, from a tensor of images (B, 3, H, W) to tensors.
        example: such a tensor; its batch size is fixed.
        dynamic: allow any height and width that the model allows; False fixes those of the example,
            which traces faster.

    Raises:
        ValueError: for an example of the wrong shape, a model in training mode, a torch that is too
            old, or a model that can only be exported for one size, if dynamic.
    """
    if example.dim() != 4:
        raise ValueError(f"example must be images (B, 3, H, W), got {shape_of(example)}")
    if model.training:
        raise ValueError("a model in training mode cannot be exported; call model.eval() first")
    if not hasattr(torch.compiler, "is_exporting"):
        raise ValueError(f"export needs torch >= 2.7, got {torch.__version__}")
    shapes = None
    if dynamic:
        _check_free_size(model, onnx=False)
        size = torch.export.Dim.DYNAMIC  # AUTO may silently fix it
        shapes = ({2: size, 3: size},)
    # With gradients, torch chooses attention kernels with other output strides than for ONNX. Not
    # strict, as the hook keeps its state in Python.
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)


def _check_free_size(model: nn.Module, onnx: bool) -> None:
    """Check that a model can be traced for any height and width, which takes minutes to fail.

    Raises:
        ValueError: if not; docs/export.md explains why.
    """
    remedy = "export one file for each size: --fixed, or dynamic=False in Python"
    for name, method in METHOD_REGISTRY.items():
        if method.unstructured and any(type(module) is method for module in model.modules()):
            raise ValueError(
                f"METHOD {name} is unstructured, so the number of tokens in each block depends on "
                f"the size of the image and cannot be exported for any size; {remedy}"
            )
    if (onnx or is_expedited(model)) and _has_decomposed_positions(model):
        raise ValueError(
            "decomposed relative positions, such as ViTDet's, cannot be exported for images of any "
            f"size; {remedy}"
        )


def _has_decomposed_positions(model: nn.Module) -> bool:
    try:
        spec = find_transformer(model)
    except ValueError:
        return False
    stages = spec.stages or (spec,)
    return any(
        stage.costs(stage.blocks[index]).position_heads
        for stage in stages
        for index in range(len(stage.blocks))
    )


def export_onnx(
    model: nn.Module, example: Tensor, path: str | os.PathLike, dynamic: bool = True
) -> torch.export.ExportedProgram:
    """Write a model, plain or expedited, as an ONNX file.

    Args:
        model, example, dynamic: see `export_program`.
        path: of the file, which includes the weights; above 2 GB they are next to it.

    Returns:
        The exported program.

    Raises:
        ValueError: from `export_program`.
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
    """Operators that torch's exporter lacks: rounding a size (RATIO) and stable sorts (merge)."""
    from onnxscript import INT64
    from onnxscript import opset18 as op

    def to_nearest(x: Any, digits: None = None) -> Any:
        return op.Cast(op.Round(x), to=INT64.dtype)  # halves to even, as in Python

    def sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        # Of equal values, TopK returns the lower index first.
        count = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)

    return {round: to_nearest, torch.ops.aten.sort.stable: sort}


def onnx_session(path: str | os.PathLike, threads: int | None = None) -> Callable[[Tensor], tuple]:
    """A function that runs an ONNX file with ONNX Runtime on the CPU.

    Args:
        path: of a file by `export_onnx`.
        threads: per operator; None: as many as torch uses.

    Returns:
        A function from images to a tuple of outputs, all on the CPU.

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
    """The largest absolute difference between outputs of PyTorch and ONNX Runtime."""
    with torch.no_grad():
        expected, _ = tree_flatten(model(images))
    actual = onnx_session(path)(images)
    return max(
        float((ours.cpu() - theirs).abs().max())
        for ours, theirs in zip(expected, actual, strict=True)
    )


def _need(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} missing; install with: python tools/install.py --extras onnx"
        )
