"""Attention windows: a map cut into rectangles, padded at the bottom and right where needed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import key_bias
from .tracing import cached, shape_of

#: Added to the logits of slots without a token; finite, so that rows without any token stay finite.
_EMPTY = -1e4

__all__ = ["from_slots", "partition", "shifted_mask", "slot_rows", "to_slots", "unpartition"]


def partition(x: Tensor, window: tuple[int, int], value: float = 0.0) -> Tensor:
    """(B, H, W, C) to (B * windows, wh, ww, C), windows row by row; padding is ``value``."""
    (wh, ww), (batch, height, width, channels) = window, shape_of(x)
    x = F.pad(x, (0, 0, 0, -width % ww, 0, -height % wh), value=value)
    rows, cols = -(-height // wh), -(-width // ww)
    x = x.view(batch, rows, wh, cols, ww, channels).transpose(2, 3)
    return x.reshape(batch * rows * cols, wh, ww, channels)


def unpartition(windows: Tensor, size: tuple[int, int]) -> Tensor:
    """The opposite: (B * windows, wh, ww, C) to (B, H, W, C), padding cut off."""
    _, wh, ww, channels = shape_of(windows)
    rows, cols = -(-size[0] // wh), -(-size[1] // ww)
    x = windows.view(-1, rows, cols, wh, ww, channels).transpose(2, 3)
    return x.reshape(-1, rows * wh, cols * ww, channels)[:, : size[0], : size[1]]


def shifted_mask(
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device | None = None,
) -> Tensor:
    """Attention mask for windows of a map rolled by ``-shift``, as in Swin.

    The last windows hold tokens that were rolled around: those on both sides of the seam do not
    attend to each other.

    Args:
        size: of the map, a multiple of ``window``.

    Returns:
        (windows, wh * ww, wh * ww), 0 or -100, to be added to attention logits.
    """
    seam = [torch.arange(n, device=device) >= n - s for n, s in zip(size, shift, strict=True)]
    side = 2 * seam[0][:, None] + seam[1].long()
    side = partition(side[None, ..., None], window).flatten(1)
    return (side[:, :, None] != side[:, None]) * -100.0


@cached
def _slots(
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Where the places of a map are in its windows, which are padded and cut as by `partition`.

    Args:
        size: (H, W) of the map.
        window: its height and width.
        shift: the map is rolled by ``-shift`` before it is cut, as in Swin.

    Returns:
        For each place of the map, row by row, its row (H * W,) in the windows laid flat,
        (windows * wh * ww); and for each of these whether it is padding (windows * wh * ww,).
    """
    (height, width), (wh, ww) = size, window
    number = torch.arange(height * width, device=device).view(1, height, width, 1)
    number = F.pad(number, (0, 0, 0, -width % ww, 0, -height % wh), value=-1)
    cells = partition(number.roll((-shift[0], -shift[1]), dims=(1, 2)), window).flatten()
    padding = cells < 0
    # Stable: the rows of padding come first, those of the map in its order after them.
    return cells.argsort(stable=True)[-height * width :], padding


def slot_rows(
    places: Tensor,
    sizes: Tensor | None,
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """Where tokens are in the windows of a map that keeps all its places, and which places count.

    A token keeps the place of one of those it stands for; the others' places are empty. So windows
    are those of the model, its padding included, whatever was merged.

    Args:
        places: (B, M) of the tokens, row by row numbers of the map.
        sizes: (B, M) how many tokens each one stands for; None: one each in attention.
        size: (H, W) of the map.
        window, shift: of the windows, see `_slots`.

    Returns:
        rows (B * M,) in the windows of all images laid flat; and the key bias
        (B * windows, wh * ww): log(size), 0 for padding, and nearly nothing for empty places.
    """
    batch = shape_of(places)[0]
    rows, padding = _slots(size, window, shift, places.device)
    cells = shape_of(padding)[0]
    rows = rows[places]
    if batch > 1:
        rows = rows + torch.arange(batch, device=places.device)[:, None] * cells
    rows = rows.flatten()
    empty = torch.where(padding, 0.0, _EMPTY).repeat(batch)
    own = empty.new_zeros(shape_of(rows)) if sizes is None else key_bias(sizes).flatten()
    return rows, empty.index_copy(0, rows, own).view(-1, window[0] * window[1])


def to_slots(x: Tensor, blank: Tensor | None, rows: Tensor, shape: tuple[int, int]) -> Tensor:
    """Tokens (B, M, D) at their rows in windows (windows, cells, D); elsewhere is ``blank`` (D,).

    The model's padding is zero before a linear layer, so it equals the layer's bias after it.
    """
    blank = x.new_zeros(()) if blank is None else blank.to(x.dtype)
    whole = blank.expand(shape[0] * shape[1], shape_of(x)[-1]).clone()
    return whole.index_copy(0, rows, x.flatten(0, 1)).unflatten(0, shape)


def from_slots(x: Tensor, rows: Tensor, batch: int) -> Tensor:
    """The opposite: (windows, cells, D) to tokens (B, M, D)."""
    return x.flatten(0, 1).index_select(0, rows).unflatten(0, (batch, -1))
