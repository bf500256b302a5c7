"""Tuned settings as a config or as overrides."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ..settings import Settings

__all__ = ["to_overrides", "to_yaml"]


def _as_plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _changed(settings: Settings, node: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that differ from a config node, whose keys may have any case."""
    before = {key.lower(): _as_plain(value) for key, value in node.items()}
    after = {field.name: _as_plain(getattr(settings, field.name)) for field in fields(settings)}
    del after["fused_attention"]  # belongs to the plain model
    return {name: value for name, value in after.items() if before[name] != value}


def to_yaml(
    settings: Settings,
    config_file: str | Path,
    node: Mapping[str, Any],
    folder: str | Path,
    opts: Sequence[tuple[str, Any]] = (),
    comment: str = "",
) -> str:
    """A small config based on the one that was tuned.

    Args:
        settings: the tuned settings.
        config_file: the config that was tuned.
        node: its ``MODEL.EXPEDIT``.
        folder: of the new file, which ``_BASE_`` is relative to.
        opts: further keys and values, such as weights from the command line.
        comment: first line.
    """
    content: dict[str, Any] = {"_BASE_": os.path.relpath(config_file, folder)}
    changed = {f"MODEL.EXPEDIT.{k.upper()}": v for k, v in _changed(settings, node).items()}
    for key, value in (*opts, ("MODEL.EXPEDIT.ENABLED", True), *changed.items()):
        *parents, last = key.split(".")
        inner = content
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = _as_plain(value)
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100)
    return (f"# {comment}\n" if comment else "") + text


def to_overrides(settings: Settings, node: Mapping[str, Any]) -> list[str]:
    """Command-line overrides for a LazyConfig."""
    values = {"enabled": True, **_changed(settings, node)}
    text = {name: str(value).replace(" ", "") for name, value in values.items()}
    return [f"expedit.{name}={'null' if v == 'None' else v}" for name, v in text.items()]
