"""Outputs of a frozen backbone on disk, so that heads train without running it again.

There is one file per image, named by a hash of the image, in a folder named by a hash of the
backbone's weights and settings. So a cache can be shared by any number of models and data sets,
filled while training, and resumed after an interruption.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..api import is_expedited
from ..compat import TreeSpec, tree_flatten, tree_unflatten, version_of
from ..files import bytes_of, digest_tensors, halved
from ..modes import eval_mode

__all__ = ["FEATURE_CACHE", "cache_features"]

#: Key of ``MODEL.BACKBONE``, for every backbone that can be frozen.
FEATURE_CACHE: dict[str, Any] = {
    # Folder to cache the outputs of a frozen backbone in while heads train; "" disables the cache.
    "FEATURE_CACHE": "",
}


def cache_features(folder: str | os.PathLike, module: nn.Module, method: str = "forward") -> None:
    """Cache the outputs of a frozen module on disk.

    Features are stored in fp16 and returned in the dtype of the images, also when they were just
    computed, so that training does not depend on what is cached. An augmented image is a different
    image. While the module is expedited, the cache is bypassed.

    Args:
        folder: of the cache, created when first needed; empty disables the cache.
        module: maps images (B, 3, H, W) to tensors (B, ...), in lists, dicts and named tuples.
        method: name of the method to cache.

    Raises:
        ValueError: if a parameter of the module is trained.
    """
    if not str(folder):
        return
    trained = [name for name, weight in module.named_parameters() if weight.requires_grad]
    if trained:
        raise ValueError(
            "MODEL.BACKBONE.FEATURE_CACHE needs a frozen backbone, and this one is trained: set "
            "MODEL.TIMM.FREEZE or MODEL.VIT.FREEZE, or leave the cache empty"
        )
    setattr(module, method, _Cached(Path(folder).expanduser(), module, getattr(module, method)))


class _Cached:
    """A method of a module, cached on disk image by image."""

    def __init__(self, root: Path, module: nn.Module, run: Callable[[Tensor], Any]) -> None:
        self.root, self.module, self.run = root, module, run
        self.structure: TreeSpec | None = None
        self._known: tuple[list[tuple[int, int]], Path] | None = None

    def __call__(self, images: Tensor) -> Any:
        if is_expedited(self.module):
            return self.run(images)
        files = [self.folder() / f"{_digest(image)}.pth" for image in images]
        missing = [i for i, file in enumerate(files) if not file.is_file()]
        if self.structure is None and not missing:
            missing = [0]  # only a forward pass gives the structure of the outputs
        if missing:
            for i, features in zip(missing, self._compute(images[missing]), strict=True):
                _write(features, files[i])
        cached = [torch.load(file, map_location=images.device) for file in files]
        stacked = [
            torch.stack([part.to(images.dtype) for part in parts])
            for parts in zip(*cached, strict=True)
        ]
        return tree_unflatten(stacked, self.structure)

    @torch.no_grad()
    def _compute(self, images: Tensor) -> list[list[Tensor]]:
        """The outputs for each image, in fp16 unless they overflow."""
        with eval_mode(self.module):
            outputs, self.structure = tree_flatten(self.run(images))
        return [[halved(x).clone() for x in parts] for parts in zip(*outputs, strict=True)]

    def folder(self) -> Path:
        """Folder for the current weights, which are hashed again only after they have changed."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        versions = [(tensor.data_ptr(), version_of(tensor)) for tensor in tensors]
        if self._known is None or self._known[0] != versions:
            self._known = versions, self.root / _fingerprint(self.module)
        return self._known[1]


def _digest(image: Tensor) -> str:
    """Hash of an image (3, H, W) and of the precision it is processed in."""
    kind = image.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else image.dtype
    digest = hashlib.sha256(f"{image.dtype} {precision} {tuple(image.shape)}".encode())
    digest.update(bytes_of(image))
    return digest.hexdigest()


def _fingerprint(module: nn.Module) -> str:
    """Hash of a module's weights, layer types and settings."""
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        settings = {
            key: value
            for key, value in vars(part).items()
            if key != "training" and isinstance(value, (bool, int, float, str, tuple, list))
        }
        digest.update(f"{name} {type(part).__qualname__} {sorted(settings.items())}".encode())
    digest_tensors(digest, module.state_dict())
    return digest.hexdigest()[:16]


def _write(features: list[Tensor], file: Path) -> None:
    """Write atomically, as other processes may read at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(handle, "wb") as opened:
        torch.save(features, opened)
    os.replace(unfinished, file)
