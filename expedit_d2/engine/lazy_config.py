"""LazyConfigs (``.py``, as ViTDet's official ones): reading them, and command-line overrides.

Such a config gets a node ``expedit`` with the keys of ``MODEL.EXPEDIT`` in lower case, so that
``expedit.enabled=True expedit.alpha=4 expedit.ratio=0.7`` can be given on the command line.
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
    """A LazyConfig with the ``expedit`` node and the overrides of the command line.

    What ``train`` does not say is Detectron2's own, from ``common/train.py``.

    Args:
        path: the ``.py`` file, or the name of one that comes with the package.
        overrides: ``key.path=value``, as Detectron2 takes them; ``+key.path=value`` for a key that
            the config does not have.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no ``.py`` file, since Detectron2 would read YAML with tags that run
            code; if it cannot be run, has no ``model`` or no ``train``, or for overrides that
            are none or of unknown keys.
    """
    if not path.endswith(".py"):
        raise ValueError(f"a LazyConfig is a .py file, got {path!r}")
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
    """The config objects of a file; whatever goes wrong in it is said with its line."""
    importer = builtins.__import__
    try:
        return LazyConfig.load(path)
    except SyntaxError as error:
        inner = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
        raise ValueError(f"{path}, line {inner.lineno}: {inner.msg}") from None
    except Exception as error:
        # The last place in a file of configs: the file itself, or one that it imports.
        lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}, line {lines[-1].lineno}" if lines else path
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from None
    finally:
        builtins.__import__ = importer  # LazyConfig.load leaves its own after an error


def _parse(overrides: Sequence[str]) -> Iterator[Override]:
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            override = None
        if override is None or override.is_sweep_override():
            raise ValueError(f"overrides of a LazyConfig are key.path=value, got {text!r}")
        if override.is_delete():
            raise ValueError(
                f"a key of a LazyConfig cannot be deleted, got {text!r}; set it to null"
            )
        yield override


def _check_key(cfg: DictConfig, key: str) -> None:
    """A key must be in the config, or be an argument of what the node above it calls."""
    node: Any = cfg
    for depth, name in enumerate(key.split(".")):
        known = _arguments(node)
        if name not in known:
            above = ".".join(key.split(".")[:depth])
            where = f"{above} of the LazyConfig" if above else "the LazyConfig"
            raise ValueError(
                f"there is no key {name!r} in {where}, got {key!r}{close_to(name, known)}; "
                f"+{key}=… adds a new one"
            )
        node = OmegaConf.select(node, name) if name in node else OmegaConf.create({})


def _arguments(node: Any) -> list[str]:
    """Keys of a node, and the arguments that its ``_target_`` takes besides."""
    if OmegaConf.is_list(node):
        return [str(index) for index in range(len(node))]
    if not OmegaConf.is_dict(node):
        return []
    known = [str(key) for key in node]
    target = node.get("_target_")
    try:
        known += [name for name in inspect.signature(target).parameters if name not in known]
    except (TypeError, ValueError):  # it is given by its name, or is none
        pass
    return known
