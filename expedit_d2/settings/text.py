"""Settings in one line, as the command line and the tables have them.

``alpha=0-6 keep=0.5``: the fields of `Settings`; lists are ``0,1,2``, ranges ``0-6``,
grids also ``16x16``.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from .settings import Settings
from .traits import default_method

__all__ = ["describe", "parse_setting"]

_WORDS = {
    "none": None,
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
}


def _parse_item(text: str) -> list[Any]:
    """One element of a list; a range is several."""
    if text.lower() in _WORDS:
        return [_WORDS[text.lower()]]
    span = re.fullmatch(r"(\d+)-(\d+)", text)
    if span and int(span[1]) <= int(span[2]):
        return list(range(int(span[1]), int(span[2]) + 1))
    for kind in (int, float):
        try:
            return [kind(text)]
        except ValueError:
            pass
    return [text]


def _parse_value(text: str) -> Any:
    grid = re.fullmatch(r"(\d+)x(\d+)", text)
    if grid:
        return int(grid[1]), int(grid[2])
    items = [item for part in text.split(",") if part for item in _parse_item(part)]
    return items[0] if len(items) == 1 and "," not in text else tuple(items)


def parse_setting(text: str) -> tuple[str, Settings]:
    """A name and settings from ``[name:] key=value ...``; the name is `describe`'s without one.

    Raises:
        ValueError: for anything that is not ``key=value``, a key given twice, or settings that are
            out of range or change nothing.
    """
    name, values = "", text
    prefix = re.match(r"([^=:]+):(.*)", text, re.DOTALL)
    if prefix:
        name, values = prefix[1].strip(), prefix[2]
    parsed: dict[str, Any] = {}
    for word in values.split():
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise ValueError(f'a setting is like "alpha=0-6 keep=0.5", got {word!r} in {text!r}')
        if key.lower() in parsed:
            raise ValueError(f"{key} is given twice in the setting {text!r}")
        parsed[key.lower()] = _parse_value(value)
    try:
        settings = Settings.from_node(parsed)
    except ValueError as error:
        raise ValueError(f"setting {text!r}: {error}") from None
    if settings is None or not (settings.reduces or settings.fused_attention):
        raise ValueError(f"setting {text!r}: there is no alpha or budget, so nothing is reduced")
    return name or describe(settings), settings


def _to_text(name: str, value: Any) -> str:
    if name == "grid":
        return f"{value[0]}x{value[1]}"
    if not isinstance(value, tuple):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if len(value) == 1:
        return f"{value[0]},"
    if len(value) > 2 and list(value) == list(range(value[0], value[-1] + 1)):
        return f"{value[0]}-{value[-1]}"
    return ",".join(map(str, value))


def describe(settings: Settings, method: bool = False) -> str:
    """The fields that are not the default, as `parse_setting` takes them.

    Args:
        settings: any.
        method: name the method also where it follows from the other fields.
    """
    implied = default_method(unstructured=settings.keep is not None)
    if settings.method == implied and not method and settings.budget is None:
        shown = [field for field in fields(settings) if field.name != "method"]
    else:
        shown = sorted(fields(settings), key=lambda field: field.name != "method")
    values = {field.name: getattr(settings, field.name) for field in shown}
    return " ".join(
        f"{field.name}={_to_text(field.name, values[field.name])}"
        for field in shown
        if values[field.name] != field.default
    )
