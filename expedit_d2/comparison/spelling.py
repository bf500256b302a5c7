"""Settings in one line; see `expedit_d2.spelling`."""

from __future__ import annotations

from ..settings import Settings
from ..spelling import describe, parse_setting

__all__ = ["changes_tokens", "describe", "parse_setting"]


def changes_tokens(settings: Settings) -> bool:
    """Whether settings reduce anything; without an alpha or a budget they are switched off."""
    return settings.reduces
