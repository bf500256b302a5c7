"""Where things are in this repository, and its tools as modules."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = str(ROOT / "configs" / "embedded" / "vitdet.yaml")


def load_tool(name: str):
    """A script of tools/ as a module; its name is not importable."""
    path = ROOT / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"expedit_tool_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
