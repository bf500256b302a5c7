"""Dataclasses from JSON with type checks, as files may be edited or of another kind."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["read_dataclass"]


def read_dataclass(kind: type, values: Any, where: str) -> Any:
    """The inverse of `dataclasses.asdict`, also after a round trip through JSON.

    Args:
        kind: the dataclass, with fields of numbers, strings, lists, dicts and dataclasses.
        values: the content of the JSON.
        where: name of this value, for error messages.

    Raises:
        ValueError: for a missing or unknown key, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be an object, got {values!r:.60}")
    known = {field.name: field for field in fields(kind)}
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"{where} has an unknown key {unknown[0]!r}")
    for name, field in known.items():
        if name not in values and field.default is field.default_factory is MISSING:
            raise ValueError(f"{where} has no {name!r}")
    hints = get_type_hints(kind)
    read = {name: _read(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    return kind(**read)


def _read(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return read_dataclass(hint, value, where)
    outer, inner = get_origin(hint), get_args(hint)
    if outer in (Union, types.UnionType):
        return _read_union(inner, value, where)
    if outer is tuple and isinstance(value, (list, tuple)):
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        if len(kinds) == len(value):
            return tuple(_read(k, v, where) for k, v in zip(kinds, value, strict=True))
    elif outer is list and isinstance(value, list):
        return [_read(inner[0], v, f"{where} {number}") for number, v in enumerate(value, 1)]
    elif outer is dict and isinstance(value, Mapping):
        return {key: _read(inner[1], v, f"{where}: {key}") for key, v in value.items()}
    elif outer is None and _is_a(hint, value):
        return value
    raise ValueError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r:.60}")


def _is_a(hint: type, value: Any) -> bool:
    allowed = (int, float) if hint is float else hint
    return isinstance(value, allowed) and (hint is bool or not isinstance(value, bool))


def _read_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Read as the first type that fits; a mapping is read as a dataclass if possible."""
    if isinstance(value, Mapping):
        kinds = [kind for kind in kinds if is_dataclass(kind)] or kinds
    for kind in kinds[:-1]:
        try:
            return _read(kind, value, where)
        except ValueError:
            pass
    return _read(kinds[-1], value, where)
