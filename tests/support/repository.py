"""Where things are in this repository, and its tools as modules."""

import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_TINY = ROOT / "tests" / "support" / "configs"

#: Configs of tiny models, of which there are no weights.
VITDET, DPT, MASK2FORMER = (str(_TINY / f"{n}.yaml") for n in ("vitdet", "dpt", "mask2former"))
#: A small model with weights.
SEGMENTER = str(ROOT / "configs" / "embedded" / "small_segmenter.yaml")


#: Scripts of tools/ that only call a command, and its name.
COMMANDS = {name: name for name in ("compare", "draw", "export", "report", "tune")}
COMMANDS["train_net"] = "train"


def load_tool(name: str):
    """A script of tools/ as a module, whose name is not importable; of a command, its module."""
    if name in COMMANDS:
        return importlib.import_module(f"expedit_d2.cli.{COMMANDS[name]}")
    path = ROOT / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"expedit_tool_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
