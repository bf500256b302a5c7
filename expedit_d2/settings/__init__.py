"""What can be set, and what a method says about it: below the methods, which import this."""

from .settings import SCOPES, Settings
from .text import describe, parse_setting
from .traits import METHOD_REGISTRY, MethodTraits, default_method

__all__ = [
    "METHOD_REGISTRY",
    "SCOPES",
    "MethodTraits",
    "Settings",
    "default_method",
    "describe",
    "parse_setting",
]
