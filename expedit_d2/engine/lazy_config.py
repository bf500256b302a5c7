"""Load LazyConfigs (``.py``, the format of ViTDet's official configs) with overrides.

They get a node ``expedit`` with the keys of ``MODEL.EXPEDIT`` in lower case, for overrides such as
``expedit.enabled=True expedit.alpha=4 expedit.ratio=0.7``.
"""

from __future__ import annotations

import builtins
import inspect
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from detectron2 import model_zoo
from detectron2.config import LazyConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..files.shipped import config_file
from ..settings import Settings
from .config import choose_device
from .errors import close_to

__all__ = ["load_lazy_config"]


def load_lazy_config(path: str, overrides: Sequence[str]) -> DictConfig:
    """Load a LazyConfig, with the ``expedit`` node and overrides.

    Missing keys of ``train`` get Detectron2's defaults, from ``common/train.py``.

    Args:
        path: the ``.py`` file, or the name of one in the package.
        overrides: ``key.path=value`` as in Detectron2, ``+key.path=value`` to add a key.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not a ``.py`` file (in YAML, Detectron2 would read tags that run code),
            if it cannot be run or has no ``model`` or ``train``, or for malformed overrides and
            unknown keys.
    """
    if not path.endswith(".py"):
        raise ValueError(f"a LazyConfig must be a .py file, got {path!r}")
    path = str(config_file(path))
    cfg = _run(path)
    for name, example in (
        ("model", "common/models/mask_rcnn_vitdet.py"),
        ("train", "common/train.py"),
    ):
        if not isinstance(cfg.get(name), DictConfig):
            raise ValueError(
                f"{path}: a LazyConfig needs {name!r}, such as "
                f'{name} = model_zoo.get_config("{example}").{name}'
            )
    cfg.train = OmegaConf.merge(model_zoo.get_config("common/train.py").train, cfg.train)
    defaults: dict[str, Any] = {"enabled": False}
    defaults.update({f.name: f.default for f in fields(Settings)})
    node = OmegaConf.create(defaults, flags={"allow_objects": True})
    cfg.expedit = OmegaConf.merge(node, cfg.get("expedit") or {})
    for override in _parse(overrides):
        if not override.is_add():
            _check_key(cfg, override.key_or_group)
    try:
        cfg = LazyConfig.apply_overrides(cfg, list(overrides))
    except (KeyError, NotImplementedError, OmegaConfBaseException) as error:
        words = error.args[0] if error.args else error
        raise ValueError(f"the overrides {' '.join(overrides)}: {words}") from None
    cfg.train.device = choose_device(cfg.train.device, "train.device")
    return cfg


def _run(path: str) -> DictConfig:
    """Run a config file; errors name its line."""
    importer = builtins.__import__
    try:
        return LazyConfig.load(path)
    except SyntaxError as error:
        inner = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
        raise ValueError(f"{path}, line {inner.lineno}: {inner.msg}") from None
    except Exception as error:
        # The last line of the file itself in the traceback.
        lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}, line {lines[-1].lineno}" if lines else path
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from None
    finally:
        builtins.__import__ = importer  # LazyConfig.load does not restore it after an error


def _parse(overrides: Sequence[str]) -> Iterator[Override]:
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            override = None
        if override is None or override.is_sweep_override():
            raise ValueError(f"overrides of a LazyConfig must be key.path=value, got {text!r}")
        if override.is_delete():
            raise ValueError(
                f"a key of a LazyConfig cannot be deleted, got {text!r}; set it to null"
            )
        yield override


def _check_key(cfg: DictConfig, key: str) -> None:
    """Check that a key is in the config, or is an argument of its parent's ``_target_``."""
    node: Any = cfg
    for depth, name in enumerate(key.split(".")):
        known = _arguments(node)
        if name not in known:
            parent = ".".join(key.split(".")[:depth])
            where = f"{parent} of the LazyConfig" if parent else "the LazyConfig"
            raise ValueError(
                f"there is no key {name!r} in {where}, got {key!r}{close_to(name, known)}; "
                f"+{key}=… adds a new one"
            )
        node = OmegaConf.select(node, name) if name in node else OmegaConf.create({})


def _arguments(node: Any) -> list[str]:
    """Keys of a node, and further arguments of its ``_target_``."""
    if OmegaConf.is_list(node):
        return [str(index) for index in range(len(node))]
    if not OmegaConf.is_dict(node):
        return []
    known = [str(key) for key in node]
    target = node.get("_target_")
    try:
        known += [name for name in inspect.signature(target).parameters if name not in known]
    except (TypeError, ValueError):  # given by name, or missing
        pass
    return known
