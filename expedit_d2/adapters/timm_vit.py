"""timm's ``VisionTransformer``: tokens (B, prefix + H * W, C), global attention in every block.

Covers plain ViTs, DINOv2 (registers, LayerScale), CLIP and AugReg encoders. timm's blocks take an
additive ``attn_mask``, so nothing of theirs is replaced.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..attention import key_bias
from ..operators import shape_of
from ..tokens import Tokens
from .host import Host, is_class

FAMILY = "timm's VisionTransformer"

# The size of the token map, known where patches are made and needed where blocks begin. Written
# and read within one forward, by one thread.
_call = threading.local()


def matches(module: nn.Module) -> bool:
    return is_class(module, "VisionTransformer", "timm.models.vision_transformer")


def _remember_size(patch_embed: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    _call.size = patch_embed.dynamic_feat_size(shape_of(args[0])[-2:])


def _remember_shape(proj: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    _call.size = shape_of(output)[-2:]


def adapt(vit: nn.Module) -> Host:
    return host_of(vit, PrefixLayout)


def host_of(vit: nn.Module, layout: Callable[..., PrefixLayout]) -> Host:
    """The host of a timm transformer; ``layout`` takes ``prefix`` and ``size_aware``."""

    def attach() -> Callable[[], None]:
        embed = vit.patch_embed
        hooks = (
            embed.register_forward_hook(_remember_size),
            # For callers that run the ResNet of a hybrid by themselves.
            embed.proj.register_forward_hook(_remember_shape),
        )

        def detach() -> None:
            for hook in hooks:
                hook.remove()

        return detach

    def build(size_aware: bool) -> PrefixLayout:
        if size_aware and not all(
            "attn_mask" in inspect.signature(block.forward).parameters for block in vit.blocks
        ):
            raise ValueError(
                f"SIZE_AWARE needs blocks that take attn_mask, and {type(vit.blocks[0]).__name__} "
                "does not; set SIZE_AWARE False or update timm"
            )
        return layout(prefix=vit.num_prefix_tokens, size_aware=size_aware)

    return Host(
        owner=vit,
        attribute="blocks",
        layout=build,
        # Known to who drives the model (`expedit_d2.backbones.timm_vit`), else it may read any.
        outputs=getattr(vit, "expedit_outputs", None),
        attach=attach,
    )


@dataclass(frozen=True, eq=False)
class PrefixLayout:
    """Class and register tokens, then the map's: (B, prefix + H * W, C).

    Attributes:
        prefix: number of class and register tokens.
        size_aware: clusters have as many votes as they stand for tokens.
        size: (H, W) of this run's map.
    """

    prefix: int
    size_aware: bool
    size: tuple[int, int] | None = None

    def begin(self) -> PrefixLayout:
        return replace(self, size=_call.size)

    def split(self, x: Tensor) -> tuple[Tensor, Tokens]:
        size = self.size
        tokens = x[:, self.prefix :]
        if tokens.shape[1] != size[0] * size[1]:
            raise ValueError(
                f"expected a map of {size[0]} x {size[1]} tokens, got {tokens.shape[1]}; "
                "dropping patches is not supported"
            )
        return x[:, : self.prefix], Tokens(tokens.unflatten(1, size), size=size, span=size)

    def join(self, prefix: Tensor, features: Tensor) -> Tensor:
        return torch.cat([prefix, features.flatten(1, -2)], dim=1)

    def run(
        self, block: nn.Module, prefix: Tensor, tokens: Tokens, **kwargs
    ) -> tuple[Tensor, Tokens]:
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise ValueError("a model with Expedit takes no attn_mask: it is for all tokens")
        x = self.join(prefix, tokens.features)
        if self.size_aware and tokens.sizes is not None:
            # Class and register tokens count one each.
            ones = tokens.sizes.new_ones(x.shape[0], self.prefix)
            votes = torch.cat([ones, tokens.sizes.flatten(1)], dim=1)
            kwargs["attn_mask"] = key_bias(votes)[:, None, None].to(x.dtype)
        x = block(x, **kwargs)
        shape = shape_of(tokens.features)[1:-1]
        features = x[:, self.prefix :].unflatten(1, shape)
        return x[:, : self.prefix], replace(tokens, features=features)
