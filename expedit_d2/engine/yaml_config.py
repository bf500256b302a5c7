"""Merge YAML files and command-line overrides into a config, with clear errors.

Files are first parsed as trees of nodes, which know their line numbers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from ..files import runs_code
from .errors import close_to
from .safe_config import load_yaml

__all__ = ["merge_file", "merge_overrides"]

_BASE = "_BASE_"
_NAMES = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number with a point or an exponent",
    str: "text",
    tuple: "a list",
    list: "a list",
}


def merge_file(cfg: CfgNode, path: str | Path) -> None:
    """Merge a YAML file and its ``_BASE_`` files into a config.

    Raises:
        FileNotFoundError: if the file or a base does not exist.
        ValueError: if a file is not a mapping, is its own base, or has a duplicate or unknown key,
            a value of the wrong type, or a tag that would create a Python object.
        yaml.YAMLError: for invalid YAML.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config file {str(path)!r}")
    sources = list(_sources(str(path), ()))
    before = {key: _get(cfg, key) for key in _keys(cfg) if key in _needed()}
    load_yaml(str(path))  # refuses tags that run code, before Detectron2 reads the file
    try:
        cfg.merge_from_file(str(path), allow_unsafe=runs_code())
    except (KeyError, ValueError, AssertionError) as error:
        problem = str(error.args[0]) if error.args else str(error)
        unknown = re.search(r"Non-existent config key: (\S+)$", problem)
        mismatch = re.search(r"Type mismatch .* for config key: (\S+)$", problem, re.DOTALL)
        if unknown:
            key = unknown[1]
            raise ValueError(f"{_find(sources, key)[0]}: {_unknown(cfg, key)}") from None
        if mismatch:
            key = mismatch[1]
            where, given = _find(sources, key)
            raise ValueError(f"{where}: {_mismatch(key, _get(cfg, key), given)}") from None
        raise ValueError(f"{path}: {problem}") from None
    for key, value in before.items():  # yacs accepts None for any type
        if _get(cfg, key) is None:
            where, given = _find(sources, key)
            raise ValueError(f"{where}: {_mismatch(key, value, given)}")


def merge_overrides(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Merge ``KEY VALUE KEY VALUE …`` of a command line into a config.

    Raises:
        ValueError: for a key without a value, an unknown key, or a value of the wrong type.
    """
    for key in opts[0::2]:
        if key.startswith("-"):
            raise ValueError(f"{key!r} follows the config overrides; give options before them")
        if "=" in key:
            raise ValueError(f"overrides of a YAML config must be KEY VALUE pairs, got {key!r}")
    if len(opts) % 2:
        raise ValueError(f"overrides must be KEY VALUE pairs, but {opts[-1]!r} has no value")
    for key, value in zip(opts[0::2], opts[1::2], strict=True):
        if key not in _keys(cfg):
            raise ValueError(_unknown(cfg, key))
        before = _get(cfg, key)
        if isinstance(before, CfgNode):
            raise ValueError(_mismatch(key, before, repr(value)))
        try:
            cfg.merge_from_list([key, value])
        except (ValueError, TypeError):
            raise ValueError(_mismatch(key, before, repr(value))) from None
        if key in _needed() and _get(cfg, key) is None:
            raise ValueError(_mismatch(key, before, repr(value)))


# ------------------------------------------------------------------------------ keys of a config


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """All dotted keys, including those of nodes."""
    for name, value in cfg.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")


@cache
def _needed() -> frozenset[str]:
    """Keys of Detectron2 that must not be None; the keys of this package have their own checks."""
    cfg = get_cfg()
    return frozenset(key for key in _keys(cfg) if _get(cfg, key) is not None)


def _get(cfg: CfgNode, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def _unknown(cfg: CfgNode, key: str) -> str:
    known = list(_keys(cfg))
    last = key.upper().rpartition(".")[2]
    same = [other for other in known if other.rpartition(".")[2] == last]
    like = close_to(key.upper(), known) or close_to(key, same, cutoff=0.0)
    return f"there is no config key {key!r}{like}"


def _mismatch(key: str, before: Any, given: str) -> str:
    if isinstance(before, CfgNode):
        below = ", ".join(f"{key}.{name}" for name in list(before)[:2])
        return f"{key} is a node with keys ({below}, …), got {given}"
    kind = _KINDS.get(type(before), f"a {type(before).__name__}")
    return f"{key} must be {kind}, such as {before!r}, got {given}"


# ------------------------------------------------------------------------------- trees of a file


def _sources(path: str, chain: tuple[str, ...]) -> Iterator[tuple[str, yaml.MappingNode]]:
    """The file and its bases with their trees, the overriding file first.

    Args:
        path: of an existing file.
        chain: the files that have led to it.
    """
    real = os.path.realpath(path)
    if real in chain:
        raise ValueError(f"{path}: its {_BASE} leads back to itself; give another file")
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.compose(file, Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file; give a YAML config") from None
    if tree is None:
        raise ValueError(f"{path} is empty; a config has keys, such as MODEL: {{WEIGHTS: my.pth}}")
    if not isinstance(tree, yaml.MappingNode):
        raise ValueError(
            f"{path} has {_written(tree)}; a config has keys, such as MODEL: {{WEIGHTS: my.pth}}"
        )
    _check_keys(path, tree, ())
    yield path, tree
    for base in _bases(path, tree):
        yield from _sources(base, (*chain, real))


def _bases(path: str, tree: yaml.MappingNode) -> Iterator[str]:
    for key, value in tree.value:
        if key.value != _BASE:
            continue
        for node in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if not isinstance(node, yaml.ScalarNode) or not node.value:
                raise ValueError(f"{_place(path, node)}: {_BASE} must be a file or a list of files")
            if "://" in node.value:
                continue  # downloaded later
            base = os.path.join(os.path.dirname(path), os.path.expanduser(node.value))
            if not os.path.isfile(base):
                raise FileNotFoundError(
                    f"{_place(path, node)}: {_BASE} {node.value!r} does not exist; give a path "
                    "relative to the folder of this file"
                )
            yield base


def _check_keys(path: str, tree: yaml.MappingNode, above: tuple[int, ...]) -> None:
    if id(tree) in above:
        raise ValueError(f"{_place(path, tree)}: an alias refers to itself; write it out")
    seen: set[str] = set()
    for key, value in tree.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in _NAMES:
            raise ValueError(f"{_place(path, key)}: a key must be a name, got {_written(key)}")
        if key.value in seen:
            raise ValueError(f"{_place(path, key)}: {key.value} is given twice; remove one of them")
        seen.add(key.value)
        if isinstance(value, yaml.MappingNode):
            _check_keys(path, value, (*above, id(tree)))


def _find(sources: Sequence[tuple[str, yaml.MappingNode]], key: str) -> tuple[str, str]:
    """Where a key is given, and its value as written there."""
    for path, tree in sources:
        node: yaml.Node | None = tree
        for name in key.split("."):
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            node = next((value for given, value in pairs if given.value == name), None)
        if node is not None:
            return _place(path, node), _written(node)
    return sources[0][0], "another type"


def _place(path: str, node: yaml.Node) -> str:
    return f"{path}, line {node.start_mark.line + 1}"


def _written(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value[:80]) if node.value else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "keys"
