"""The ResNet of DPT-Hybrid, with the weight standardisation of its training."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import StdConv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

__all__ = ["StandardizedConv2d", "standardize"]

#: Added to the standard deviation of a kernel.
EPS = 1e-5


class StandardizedConv2d(StdConv2dSame):
    """A convolution by (w - mean) / (std + 1e-5), for the kernel w of each output channel.

    This is weight standardisation as in timm 0.4.5, the official code's version. Today's timm
    divides by sqrt(var + 1e-8), which differs for kernels of small weights (2e-3 in the depth).
    """

    def kernels(self) -> Tensor:
        """The standardised kernels (C_out, C_in, k, k)."""
        centred = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        std = centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        return centred / (std + EPS)

    def forward(self, x: Tensor) -> Tensor:
        if self.same_pad:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        rest = (self.bias, self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(x, self.kernels(), *rest)


def standardize(resnet: nn.Module) -> None:
    """Replace timm's convolutions by `StandardizedConv2d`, with the same weights and names."""
    for name, conv in list(resnet.named_modules()):
        if type(conv) is not StdConv2dSame:
            continue
        new = StandardizedConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        new.padding, new.same_pad = conv.padding, conv.same_pad
        new.weight, new.bias = conv.weight, conv.bias
        parent, _, child = name.rpartition(".")
        setattr(resnet.get_submodule(parent), child, new)
