"""Read YAML configs as data, without tags that create objects or call functions."""

from __future__ import annotations

from typing import IO, Any

import yaml
from detectron2.config import CfgNode

from ..files import fetch, runs_code
from ..files.trust import REMEDY

__all__ = ["load_yaml"]


class _Reader(CfgNode):
    """Also opens ``_BASE_`` files that are URLs."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        return open(fetch(filename, "the config"), encoding="utf-8")


def load_yaml(path: str) -> dict[str, Any]:
    """The content of a YAML config merged with its ``_BASE_`` files.

    Raises:
        OSError: if a file does not exist or cannot be downloaded.
        ValueError: if a tag would create a Python object.
    """
    try:
        return _Reader.load_yaml_with_base(path, allow_unsafe=runs_code())
    except yaml.constructor.ConstructorError as error:
        mark, problem = error.problem_mark, str(error.problem)
        if "constructor for the tag" not in problem:
            raise
        tag = problem.partition("'")[2].strip("'").replace("tag:yaml.org,2002:", "!!")
        raise ValueError(
            f"the config {mark.name!r}, line {mark.line + 1}: the tag {tag} is refused, as such "
            f"tags can run any code; write the value itself, or {REMEDY}"
        ) from None
