"""The decoder of DPT: tokens to maps, fused from coarse to fine (Ranftl et al., section 3.1).

Shorthand: B images, h x w tokens of C channels, D channels of the fused maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expedit_d2.tracing import shape_of

from .encoder import Level

__all__ = ["ACTIVATIONS", "READOUTS", "DPTHead", "Fusion", "Reassemble", "ResidualUnit"]

READOUTS = ("project", "add", "ignore")
ACTIVATIONS = {"relu": F.relu, "sigmoid": torch.sigmoid}

_HIDDEN = 32  # channels of the last 3 x 3 convolution


class Reassemble(nn.Module):
    """Tokens of one level to a map at 4, 2, 1 or 1/2 times their resolution (equations 1 to 6)."""

    def __init__(self, dim: int, channels: int, scale: float, readout: str) -> None:
        """
        Args:
            dim: C, of the tokens.
            channels: of the map.
            scale: size of the map relative to the tokens.
            readout: use of the class token: "project" concatenates it to every token, "add" adds
                it, "ignore" drops it.
        """
        super().__init__()
        self.add = readout == "add"
        self.readout = nn.Linear(2 * dim, dim) if readout == "project" else None
        self.project = nn.Conv2d(dim, channels, 1)
        if scale > 1:
            self.resize = nn.ConvTranspose2d(channels, channels, int(scale), stride=int(scale))
        elif scale < 1:
            self.resize = nn.Conv2d(channels, channels, 3, stride=round(1 / scale), padding=1)
        else:
            self.resize = nn.Identity()

    def forward(self, level: Level) -> Tensor:
        """(B, C, h, w) and (B, C) to (B, channels, scale * h, scale * w)."""
        x, token = level
        if self.add:
            x = x + token[:, :, None, None]
        elif self.readout is not None:
            x = torch.cat([x, token[:, :, None, None].expand_as(x)], dim=1)
            x = F.gelu(self.readout(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.resize(self.project(x))


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))), both convolutions 3 x 3."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a level to the fused coarser ones, then refines and enlarges the sum (figure 1)."""

    def __init__(self, features: int, joins: bool) -> None:
        """
        Args:
            features: D.
            joins: False for the coarsest level.
        """
        super().__init__()
        self.level = ResidualUnit(features) if joins else None
        self.refine = ResidualUnit(features)
        self.out = nn.Conv2d(features, features, 1)

    def forward(self, level: Tensor, coarser: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Two maps of the same size, (B, D, h, w), to one (B, D, *size)."""
        if coarser is not None:
            level = coarser + self.level(level)
        x = F.interpolate(self.refine(level), size, mode="bilinear", align_corners=True)
        return self.out(x)


class DPTHead(nn.Module):
    """Four levels to one nonnegative number per pixel."""

    def __init__(
        self,
        dim: int,
        channels: Sequence[int],
        features: int = 256,
        readout: str = "project",
        activation: str = "relu",
        stages: Sequence[int] = (),
    ) -> None:
        """
        Args:
            dim: C, of the ViT's tokens.
            channels: of the four reassembled maps, finest first.
            features: D.
            readout: see `Reassemble`.
            activation: of the output: "relu", or "sigmoid" for values in (0, 1).
            stages: channels of the levels that are maps of a ResNet and need no reassembling.

        Raises:
            ValueError: for an unknown name, or channels that are not the ResNet's.
        """
        super().__init__()
        for key, value, known in (
            ("READOUT", readout, READOUTS),
            ("ACTIVATION", activation, tuple(ACTIVATIONS)),
        ):
            if value not in known:
                raise ValueError(f"MODEL.DPT.{key} must be one of {known}, got {value!r}")
        if len(channels) != 4 or list(channels[: len(stages)]) != list(stages):
            first = f", the first {list(stages)}" if stages else ""
            raise ValueError(f"MODEL.DPT.CHANNELS must be 4 numbers{first}, got {list(channels)}")
        self.activation = activation
        self.reassemble = nn.ModuleList(
            nn.Identity() if index < len(stages) else Reassemble(dim, width, scale, readout)
            for index, (width, scale) in enumerate(zip(channels, (4, 2, 1, 0.5), strict=True))
        )
        self.layers = nn.ModuleList(
            nn.Conv2d(width, features, 3, padding=1, bias=False) for width in channels
        )
        self.fusions = nn.ModuleList(Fusion(features, joins=index < 3) for index in range(4))
        self.reduce = nn.Conv2d(features, features // 2, 3, padding=1)
        self.predict = nn.Sequential(
            nn.Conv2d(features // 2, _HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(_HIDDEN, 1, 1)
        )

    def forward(self, levels: Sequence[Level], size: tuple[int, int]) -> Tensor:
        """
        Args:
            levels: from the encoder, finest first.
            size: (H, W) of the images.

        Returns:
            (B, H, W).
        """
        maps = [
            layer(reassemble(level) if level.class_token is not None else level.features)
            for layer, reassemble, level in zip(self.layers, self.reassemble, levels, strict=True)
        ]
        # Each map is enlarged to the next finer one, the finest to twice its own size.
        sizes = [tuple(2 * side for side in shape_of(maps[0])[2:])]
        sizes += [shape_of(x)[2:] for x in maps[:-1]]
        x = None
        for fusion, level, larger in reversed(list(zip(self.fusions, maps, sizes, strict=True))):
            x = fusion(level, x, larger)
        x = F.interpolate(self.reduce(x), size, mode="bilinear", align_corners=True)
        return ACTIVATIONS[self.activation](self.predict(x))[:, 0]
