"""Config keys: ``MODEL.EXPEDIT``, and adding keys to a config that other projects share."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from typing import Any

from detectron2.config import CfgNode as CN

from .settings import Settings

__all__ = ["add_expedit_config", "add_keys"]


def add_keys(node: CN, defaults: Mapping[str, Any]) -> None:
    """Add keys to a config node; mappings are nodes of their own.

    Nodes and keys that another project has already added stay as they are.
    """
    for key, value in defaults.items():
        if isinstance(value, Mapping) and not isinstance(value, CN):
            add_keys(node.setdefault(key, CN()), value)
        else:
            node.setdefault(key, deepcopy(value))


def add_expedit_config(cfg: CN) -> None:
    """Add ``MODEL.EXPEDIT``: ENABLED, and the fields of `expedit_d2.settings.Settings`.

    Meaning and defaults are documented there. A key whose default is None takes values of several
    types; None is that key's automatic value. FUSED_ATTENTION works without ENABLED too.
    """
    settings = {field.name.upper(): field.default for field in fields(Settings)}
    add_keys(cfg.MODEL, {"EXPEDIT": {"ENABLED": False, **settings}})
