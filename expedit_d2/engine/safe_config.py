"""Reading YAML configs as data: no tag in them makes an object or calls a function."""

from __future__ import annotations

from typing import IO, Any

import yaml
from detectron2.config import CfgNode

from ..files import fetch, runs_code
from ..files.trust import REMEDY

__all__ = ["load_yaml", "merge_yaml"]


class _Reader(CfgNode):
    """Opens the ``_BASE_`` files as well, which may be URLs."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        return open(fetch(filename, "the config"), encoding="utf-8")


def load_yaml(path: str) -> dict[str, Any]:
    """The content of a YAML config, on top of its ``_BASE_`` files.

    Raises:
        OSError: if one of the files is not there, or cannot be downloaded.
        ValueError: if a tag would make a Python object.
    """
    try:
        return _Reader.load_yaml_with_base(path, allow_unsafe=runs_code())
    except yaml.constructor.ConstructorError as error:
        mark, problem = error.problem_mark, str(error.problem)
        if "constructor for the tag" not in problem:
            raise
        tag = problem.partition("'")[2].strip("'").replace("tag:yaml.org,2002:", "!!")
        raise ValueError(
            f"the config {mark.name!r}, line {mark.line + 1}: the tag {tag} is not read, since "
            f"such tags can run any code; write the value itself, or {REMEDY}"
        ) from None


def merge_yaml(cfg: CfgNode, path: str) -> None:
    """Merge a YAML config into another one, as `CfgNode.merge_from_file` does.

    Raises:
        OSError, ValueError: as `load_yaml`.
        KeyError: for a key that the config does not have.
    """
    load_yaml(path)  # says what is wrong with the file, before Detectron2 reads it
    cfg.merge_from_file(path, allow_unsafe=runs_code())
