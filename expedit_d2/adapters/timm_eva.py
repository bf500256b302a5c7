"""timm's ``Eva``: like its ``VisionTransformer``, but with rotary positions in every block.

Covers DINOv3, EVA-02, Perception Encoder and RoPE-ViT. The rotation of a token is sin and cos of
angles that are linear in its row and column. So a cluster is rotated by the angles of its own mean
position, from the model's own frequencies; no table is interpolated. What timm does to coordinates
in training alone (shift, jitter, rescale) is not done to clusters.

Shorthand: N clusters, D channels of a head, D / 2 angles; nH heads with angles of their own, or 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..operators import grid_positions, on_device
from ..tokens import Tokens
from .spec import TransformerSpec, is_class
from .timm_vit import PrefixLayout, spec_of

FAMILY = "timm's Eva (DINOv3, EVA-02)"


def matches(module: nn.Module) -> bool:
    return is_class(module, "Eva", "timm.models.eva")


def adapt(eva: nn.Module) -> TransformerSpec:
    kind = type(eva.rope).__name__
    if eva.rope is not None and kind not in _ANGLES:
        raise ValueError(f"rotary positions must be one of {sorted(_ANGLES)}, got {kind}")

    def layout(**kwargs: Any) -> _Layout:
        return _Layout(rope=eva.rope, blocks=tuple(eva.blocks), **kwargs)

    return spec_of(eva, layout)


@dataclass(frozen=True)
class _Context:
    """What every later block needs to know about reduced tokens.

    Attributes:
        mask: of cluster sizes; see `PrefixLayout.prepare`.
        positions: (B or 1, N, 2).
        rotation: sin and cos of these, where all blocks share them.
    """

    mask: Tensor | None
    positions: Tensor | None
    rotation: Tensor | None


@dataclass(frozen=True)
class _Layout(PrefixLayout):
    """Attributes: ``rope``, the model's module of rotary positions, or None; ``blocks``."""

    rope: nn.Module | None = None
    blocks: tuple[nn.Module, ...] = ()

    @property
    def reads_positions(self) -> bool:
        return self.rope is not None

    def prepare(self, x: Tensor, tokens: Tokens) -> _Context:
        positions = rotation = None
        if self.rope is not None:
            positions = positions_of(tokens).flatten(1, -2)
        if self.rope is not None and type(self.rope).__name__ not in _BY_BLOCK:
            rotation = self._rotation(self.blocks[0], positions, tokens.size)
        return _Context(super().prepare(x, tokens), positions, rotation)

    def run(self, block: nn.Module, x: Tensor, tokens: Tokens, **kwargs: Any) -> Tensor:
        if self.rope is not None:
            rotation = tokens.context.rotation
            if rotation is None:
                rotation = self._rotation(block, tokens.context.positions, tokens.size)
            kwargs["rope"] = rotation.to(kwargs["rope"].dtype)
        return super().run(block, x, replace(tokens, context=tokens.context.mask), **kwargs)

    def _rotation(self, block: nn.Module, positions: Tensor, size: tuple[int, int]) -> Tensor:
        """What the attention of a block takes for tokens there: sin and cos (B, nH, N, 2 D)."""
        index = next(i for i, other in enumerate(self.blocks) if other is block)
        angles = _ANGLES[type(self.rope).__name__](self.rope, positions, size, index)
        sin_cos = torch.stack([angles.sin(), angles.cos()], dim=-2)
        # Each angle turns two channels: D / 2 apart, or next to each other.
        if getattr(block.attn, "rotate_half", False):
            return torch.cat([sin_cos, sin_cos], dim=-1).flatten(-2)
        return sin_cos.repeat_interleave(2, dim=-1).flatten(-2)


def positions_of(tokens: Tokens) -> Tensor:
    """Row and column of each token in the original map, (B or 1, *shape, 2)."""
    if tokens.positions is not None:
        return tokens.positions
    grid = tokens.shape
    centres = grid_positions(*grid, tokens.features.device) + 0.5
    pitch = tuple(span / cells for span, cells in zip(tokens.span, grid, strict=True))
    return centres * on_device(pitch, centres) - 0.5


# Angles (B, nH, N, D / 2) of tokens at positions (B, N, 2) in a map of ``size``, one function for
# each kind that timm has. They take timm's definition of coordinates to any place.
_Angles = Callable[[nn.Module, Tensor, tuple[int, int], int], Tensor]


def _axial(rope: nn.Module, coordinates: Tensor, frequencies: Tensor) -> Tensor:
    """Half of the angles from each axis; coordinates (B, N, 2), frequencies (D / 4)."""
    if rope.grid_indexing == "xy":
        coordinates = coordinates.flip(-1)
    return (coordinates[..., None] * frequencies).flatten(-2)[:, None]


def _index_angles(rope: nn.Module, positions: Tensor, size: tuple[int, int], index: int) -> Tensor:
    """EVA-02: coordinates in tokens, of a reference size if there is one."""
    coordinates = positions + rope.grid_offset
    if rope.ref_feat_shape is not None:
        reference = positions.new_tensor(rope.ref_feat_shape)
        coordinates = coordinates / positions.new_tensor(size) * reference
    count = rope.dim // 4
    exponents = torch.arange(count, device=positions.device) / count
    return _axial(rope, coordinates, rope.temperature**-exponents)


def _centred_angles(
    rope: nn.Module, positions: Tensor, size: tuple[int, int], index: int
) -> Tensor:
    """DINOv3: coordinates from -1 to 1 over the map, periods in these."""
    extent = {"separate": size, "min": (min(size),) * 2, "max": (max(size),) * 2}
    extent = positions.new_tensor(extent[rope.normalize_coords])
    coordinates = 2 * (positions + 0.5 + rope.grid_offset) / extent - 1
    return _axial(rope, coordinates, 2 * math.pi / rope.periods.float())


def _mixed_angles(rope: nn.Module, positions: Tensor, size: tuple[int, int], index: int) -> Tensor:
    """RoPE-ViT: each block and head has learned frequencies of both axes."""
    if rope.grid_indexing == "xy":
        positions = positions.flip(-1)
    first, second = positions[:, None, :, :, None].unbind(-2)  # (B, 1, N, 1) each
    frequencies = rope.freqs[:, index, :, None].float()  # (2, nH, 1, D / 2)
    return first * frequencies[0] + second * frequencies[1]


def _multimodal_angles(
    rope: nn.Module, positions: Tensor, size: tuple[int, int], index: int
) -> Tensor:
    """As Qwen2-VL: each angle belongs to an axis: 0 (time: always 0), 1 or 2."""
    coordinates = torch.cat([torch.zeros_like(positions[..., :1]), positions], dim=-1)
    return (coordinates.index_select(-1, rope.axis) * rope.inv_freq.float())[:, None]


_ANGLES: dict[str, _Angles] = {
    "RotaryEmbeddingCat": _index_angles,
    "RotaryEmbeddingDinoV3": _centred_angles,
    "RotaryEmbeddingMixed": _mixed_angles,
    "RotaryEmbeddingMRope": _multimodal_angles,
}

#: Kinds whose angles differ from block to block.
_BY_BLOCK = frozenset({"RotaryEmbeddingMixed"})
