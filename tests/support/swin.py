"""A tiny Swin with random weights, and a plain implementation of it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expedit_d2.backbones.swin import D2SwinTransformer

PATCH = 4
# Every token its own cluster: nothing is lost.
IDENTITY = {"scope": "window", "temperature": 1e6, "neighbors": 1}
TINY = {
    "embed_dim": 16,
    "depths": (2, 2, 4, 2),
    "num_heads": (2, 2, 4, 4),
    "window_size": 4,
    "drop_path_rate": 0.1,
}


@torch.no_grad()
def tiny(kind: type = D2SwinTransformer, positions: bool = True, **changes) -> nn.Module:
    """A random Swin; nothing in it is zero, but for the tables without ``positions``."""
    swin = kind(**(TINY | changes)).eval()
    for name, parameter in swin.named_parameters():
        if "bias_table" not in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.normal_(std=0.5 * positions)
    return swin


def one_stage(**changes) -> D2SwinTransformer:
    """A Swin of a single stage, so that what its blocks return can be told from the output."""
    settings = {"depths": (4,), "num_heads": (2,), "out_features": ("res2",)}
    return tiny(**(settings | changes))


def images(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size)


def maps(swin: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(swin(x).values())


# --- the plain model -------------------------------------------------------------------------


def explicit_attention(attn, places, at, groups, cluster_sizes) -> Tensor:
    """Attention among tokens, a query at a time.

    Args:
        places: (N, C) tokens behind the norm.
        at: N positions (row, column), in tokens.
        groups: N labels; only tokens of one label meet.
        cluster_sizes: N numbers of tokens that each key stands for.
    """
    heads, side = attn.num_heads, attn.window_size[0]
    table = attn.relative_position_bias_table.view(2 * side - 1, 2 * side - 1, heads)
    qkv = attn.qkv(places).view(len(places), 3, heads, -1)
    out = []
    for i, (row, col) in enumerate(at):
        keys = [j for j in range(len(at)) if groups[j] == groups[i]]
        logits = torch.einsum("hd,khd->kh", qkv[i, 0], qkv[keys, 1]) / math.sqrt(qkv.shape[-1])
        for n, j in enumerate(keys):
            rel = [row - at[j][0] + side - 1, col - at[j][1] + side - 1]
            rel = [min(max(r, 0.0), 2.0 * side - 2) for r in rel]
            low = [min(int(r), max(2 * side - 3, 0)) for r in rel]
            for a in (0, 1):
                for b in (0, 1):
                    share = (1 - abs(rel[0] - low[0] - a)) * (1 - abs(rel[1] - low[1] - b))
                    logits[n] += share * table[low[0] + a, low[1] + b] if share > 0 else 0
            logits[n] += math.log(cluster_sizes[j])
        weights = logits.softmax(0)
        out.append(torch.einsum("kh,khd->hd", weights, qkv[keys, 2]).flatten())
    return attn.proj(torch.stack(out))


def explicit_block(block, x, window, shift, at=None, cluster_sizes=None, padding=None) -> Tensor:
    """One block on a map (H, W, C) of one image.

    Shifted windows begin at -shift: no rolling, no mask, and what the roll brings together with
    tokens from the other side of the map is a smaller window of its own.
    """
    height, width, channels = x.shape
    rows, cols = (-(-n // w) * w for n, w in zip((height, width), window, strict=True))
    places = F.pad(block.norm1(x), (0, 0, 0, cols - width, 0, rows - height))
    if padding is not None:
        places = torch.where(padding[..., None], 0.0, places)
    cells = [(i, j) for i in range(rows) for j in range(cols)]
    groups = [((i - shift[0]) // window[0], (j - shift[1]) // window[1]) for i, j in cells]
    at = cells if at is None else at.view(-1, 2).tolist()
    cluster_sizes = (
        [1.0] * len(cells) if cluster_sizes is None else cluster_sizes.flatten().tolist()
    )
    out = explicit_attention(block.attn, places.reshape(-1, channels), at, groups, cluster_sizes)
    x = x + out.view(rows, cols, channels)[:height, :width]
    return x + block.mlp(block.norm2(x))


def explicit_swin(swin: nn.Module, x: Tensor) -> list[Tensor]:
    """The whole plain model, one image at a time."""
    outputs = []
    for image in x:
        high, wide = (-n % PATCH for n in image.shape[1:])
        patches = F.pad(image, (0, wide, 0, high))[None]
        tokens = swin.patch_embed.norm(swin.patch_embed.proj(patches)[0].permute(1, 2, 0))
        levels = []
        for index, layer in enumerate(swin.layers):
            for number, block in enumerate(layer.blocks):
                side = layer.window_size
                tokens = explicit_block(block, tokens, (side,) * 2, (side // 2 * (number % 2),) * 2)
            levels.append(getattr(swin, f"norm{index}")(tokens).permute(2, 0, 1))
            if index == len(swin.layers) - 1:
                break
            height, width, channels = tokens.shape
            merged = torch.zeros(-(-height // 2), -(-width // 2), 4 * channels)
            for i in range(height):
                for j in range(width):
                    first = (i % 2 + 2 * (j % 2)) * channels
                    merged[i // 2, j // 2, first : first + channels] = tokens[i, j]
            tokens = layer.downsample.reduction(layer.downsample.norm(merged))
        outputs.append(levels)
    return [torch.stack(level) for level in zip(*outputs, strict=True)]
