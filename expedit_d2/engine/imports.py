"""Import a user's modules, which register models and data sets."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["import_modules"]


def import_modules(names: Iterable[str]) -> None:
    """Import modules that register meta architectures, backbones or data sets.

    Args:
        names: modules, also in the current folder, or paths of .py files.

    Raises:
        FileNotFoundError: if a .py file does not exist.
        ModuleNotFoundError: if a module does not exist.
        ValueError: for a syntax error, or a file with the name of another module.
    """
    for name in names:
        try:
            _import_file(name) if name.endswith(".py") else _import_module(name)
        except SyntaxError as error:
            raise ValueError(
                f"--import {name}: {error.filename}, line {error.lineno}: {error.msg}"
            ) from None
        except ModuleNotFoundError as error:
            missing = "" if error.name == name else f", which {name} imports"
            raise ModuleNotFoundError(
                f"--import {name}: there is no module {error.name!r}{missing}; give the name of a "
                "module that Python finds, or the path of a .py file"
            ) from None


def _import_module(name: str) -> None:
    if not name or name.startswith("."):
        raise ValueError(f"--import must be a module or a .py file, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the path of a script starts at its own folder
    importlib.import_module(name)


def _import_file(path: str) -> None:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"--import: there is no file {path!r}")
    # Once per process, as its names must not be registered again.
    if any(getattr(module, "__file__", None) == str(file) for module in [*sys.modules.values()]):
        return
    if file.stem in sys.modules:
        raise ValueError(f"--import {path}: there is another module {file.stem!r}; rename the file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # needed to look up classes defined in it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
