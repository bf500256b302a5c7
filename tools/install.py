#!/usr/bin/env python3
"""Install expedit_d2, and Detectron2 if it is missing, for the Python that runs this file.

Everything comes from PyPI and nothing is compiled. An installed torch is kept, and so is an
installed Detectron2, however it was built. Running this again is harmless and quick. It needs only
the standard library.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The versions this project is tested with, per machine type.
TORCH = {
    "default": ("2.14.1", "0.29.1"),
    # Before torch's aarch64 wheels on PyPI became CUDA builds of several GB.
    "aarch64": ("2.9.1", "0.24.1"),
}

# GB that everything takes, torch's CUDA libraries included, which its wheels for this need.
SPACE = {("Linux", "x86_64"): 7}

# Detectron2 imports pkg_resources, which setuptools 81 removes; 70.1 is the first that builds
# wheels itself, so that the project can be installed without downloading build tools.
SETUPTOOLS = "setuptools>=70.1,<81"
NUMPY = "numpy>=1.23.5,<2"

# Detectron2 has no release on PyPI under its own name. The Python files of this wheel are those of
# the official repository at commit a59f0563 (2024-04-17), but for the version string, a list(...)
# in data/common.py and a decorator in utils/testing.py. The hash pins this file.
WHEEL = "sal-detectron2"
WHEEL_VERSION = "0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"

# What that wheel needs beyond setup.py; it is installed with --no-deps, see install_detectron2.
WHEEL_NEEDS = [
    "black",
    "cloudpickle",
    "hydra-core>=1.1,<2",
    "packaging",
    "tensorboard>=2.10,<3",
    "termcolor>=1.1",
]

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# Settings of pip for where packages come from that uv would not follow.
PIP_ONLY = {"client-cert", "index-url", "no-index", "proxy", "trusted-host"}


class InstallError(Exception):
    """Ends the installation with a one-sentence message."""


class Installer:
    """Installs packages for this interpreter, or prints how it would.

    uv does it where it can, in a fraction of pip's time. It is not left behind: unless there is one
    already, it is downloaded into a temporary folder.
    """

    def __init__(self, dry_run: bool, verbose: bool) -> None:
        self.dry_run = dry_run
        self.verbose = verbose
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Installer:
        return self

    def __exit__(self, *args: object) -> None:
        self._folder.cleanup()

    def install(self, what: str, *args: str) -> None:
        """Install with uv, or with pip if uv cannot be had or does not manage."""
        if self._uv_install:
            if self._run([*self._uv_install, *args]) == 0:
                return
            print("  uv could not (its reason is above); trying pip", flush=True)
            self._uv_install = []
        self.pip_install(what, *args)

    def pip_install(self, what: str, *args: str) -> None:
        status = self._run([*PIP, "install", *args])
        if status != 0:
            raise InstallError(
                f"pip could not install {what} (exit status {status}); its reason is above."
            )

    @functools.cached_property
    def _uv_install(self) -> list[str]:
        """The command that installs with uv; empty if there is none."""
        configured = pip_configuration()
        uv = None if PIP_ONLY & configured.keys() else self._find_uv()
        if uv is None:
            return []
        constraints = configured.get("constraint", "").split()
        return [
            *(uv, "pip", "install", "--python", sys.executable),
            # As pip does: where Python may not do so itself, every start would take twice as long.
            "--compile-bytecode",
            *(part for path in constraints for part in ("--constraint", path)),
        ]

    def _find_uv(self) -> str | None:
        found = shutil.which("uv")
        if found or self.dry_run:
            return found or "uv"
        if self._run([*PIP, "install", "--target", self._folder.name, "uv"]) != 0:
            print(
                "  uv could not be downloaded (the reason is above); pip takes longer", flush=True
            )
            return None
        return shutil.which("uv", path=str(Path(self._folder.name) / "bin"))

    def _run(self, command: list[str]) -> int:
        if self.dry_run:
            print("  " + " ".join(shlex.quote(part) for part in command))
            return 0
        if not self.verbose:
            command = [*command, "--quiet"]
        # Recent versions of pip show a general warning of setuptools about "--editable".
        filters = [os.environ.get("PYTHONWARNINGS", ""), "ignore:Editable installation"]
        environment = {
            **os.environ,
            "PYTHONWARNINGS": ",".join(filter(None, filters)),
            "PIP_USE_PEP517": "1",  # or old versions would run setup.py themselves
        }
        sys.stdout.flush()  # or, in a log, our lines would come after theirs
        # From the repository root: "-e ." means the project, wherever this was called from.
        return subprocess.call(command, cwd=str(ROOT), env=environment)


def pip_configuration() -> dict[str, str]:
    """What pip's files and environment variables set: option -> value."""
    done = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True)
    found = {}
    for line in done.stdout.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            found[name.rpartition(".")[2]] = ast.literal_eval(value)
    return found


def installed_version(distribution: str) -> str | None:
    """The version of a distribution in this environment, found without importing it."""
    from importlib import metadata  # not at the top: Python 3.7 should get the message below

    importlib.invalidate_caches()
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def is_isolated() -> bool:
    """Whether this interpreter belongs to a virtual environment or to conda."""
    return sys.prefix != sys.base_prefix or (Path(sys.prefix) / "conda-meta").is_dir()


def check_interpreter(system: bool) -> None:
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        raise InstallError(
            f"Python 3.10, 3.11 or 3.12 is needed, but {sys.executable} is "
            f"{platform.python_version()}."
        )
    # Not importlib.util.find_spec, which setuptools hooks into: a search for pip makes it turn off
    # its own distutils for the rest of the process.
    if importlib.machinery.PathFinder.find_spec("pip") is None:
        raise InstallError(
            f"{sys.executable} has no pip; get it with `{sys.executable} -m ensurepip`."
        )
    if not (system or is_isolated()):
        raise InstallError(
            f"{sys.executable} is not in a virtual or conda environment; make one with "
            "`python3 -m venv .venv` and run `.venv/bin/python tools/install.py`, or add --system "
            "to install there all the same."
        )


def find_detectron2() -> str | None:
    """The installed Detectron2, "wheel" for the pinned one; None if there is none.

    Raises:
        InstallError: there is one, but it cannot be imported or has no ViTDet.
    """
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:  # no origin: merely a folder of that name
        return None
    if installed_version(WHEEL) == WHEEL_VERSION:
        return "wheel"
    probe = "import detectron2 as d; print(d.__version__); from detectron2.modeling import ViT"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InstallError(
            f"the Detectron2 at {os.path.dirname(spec.origin)} is broken or older than ViTDet "
            f"({reason}); update or uninstall it and run this again."
        )
    return f"{done.stdout.split()[0]} at {os.path.dirname(spec.origin)}"


def check_space() -> None:
    """Refuse a disk that is too full for torch, before minutes of downloads."""
    folder = sysconfig.get_path("purelib")
    free = shutil.disk_usage(folder).free / 1e9
    needed = SPACE.get((platform.system(), platform.machine()), 2)
    if free < needed:
        raise InstallError(
            f"{folder} has {free:.1f} GB of free disk space, and {needed} GB are needed: free "
            "some, or install a smaller build of torch first (for CPU only, for instance)."
        )


def install_torch(installer: Installer) -> str:
    """Install torch and torchvision if missing; return the version of torch."""
    torch, torchvision = TORCH.get(platform.machine(), TORCH["default"])
    have = installed_version("torch")
    if have is None:
        print(f"[1/3] torch {torch} and torchvision {torchvision}: installing (a large download)")
        wanted = [f"torch=={torch}", f"torchvision=={torchvision}", NUMPY]
        if not installer.dry_run:
            check_space()
    else:
        print(f"[1/3] torch {have} is already there, leaving it alone")
        # Naming the installed torch lets pip find the matching torchvision.
        torch, wanted = have, []
        if installed_version("torchvision") is None:
            wanted = [f"torch=={have}", "torchvision", NUMPY]
    # If setuptools fits as well, there is nothing to do.
    if wanted or not setuptools_is_right():
        installer.install("torch, torchvision and setuptools", SETUPTOOLS, *wanted)
    return torch


def setuptools_is_right() -> bool:
    numbers = (installed_version("setuptools") or "0").split(".")
    release = tuple(int(number) for number in numbers[:2] if number.isdigit())
    return (70, 1) <= release < (81,)


def install_detectron2(installer: Installer) -> bool:
    """Install the wheel if Detectron2 is missing; return whether the wheel is used."""
    have = find_detectron2()
    if have == "wheel":
        print(f"[2/3] Detectron2 ({WHEEL} {WHEEL_VERSION}) is already there")
        return True
    if have is not None:
        print(f"[2/3] Detectron2 {have} is already there, leaving it alone")
        return False

    print(f"[2/3] Detectron2: installing the wheel {WHEEL} {WHEEL_VERSION} from PyPI")
    requirement = f"{WHEEL}=={WHEEL_VERSION} --hash=sha256:{WHEEL_SHA256}"
    # pip takes hashes from a requirements file only.
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "detectron2.txt"
        requirements.write_text(requirement + "\n", encoding="utf-8")
        if installer.dry_run:
            print(f"  # {requirements} holds: {requirement}")
        # The wheel is tagged for CPython 3.10 because of a compiled part, which other versions of
        # Python do not see and this project does not need. pip installs a wheel for another version
        # only with --target and --no-deps.
        installer.pip_install(
            "Detectron2",
            "--require-hashes",
            *("--requirement", str(requirements)),
            *("--target", sysconfig.get_path("purelib")),
            *("--python-version", "3.10", "--implementation", "cp"),
            *("--abi", "none", "--platform", "any"),
            "--only-binary=:all:",
            "--no-deps",
        )
    return True


def install_project(installer: Installer, extras: str, torch: str, uses_wheel: bool) -> None:
    print(f"[3/3] expedit_d2{extras} and the packages it needs: installing")
    # One call, so that pip resolves all requirements together, with the torch that must not change
    # and the dependencies of the wheel that was installed without them.
    installer.install(
        "expedit_d2 or one of the packages it needs",
        # Nothing is compiled, so the installed setuptools is enough to build the project itself and
        # the few source archives, which are pure Python.
        "--no-build-isolation",
        *("--editable", f".{extras}"),
        f"torch=={torch}",
        SETUPTOOLS,
        *(WHEEL_NEEDS if uses_wheel else []),
    )


def parse_extras(text: str) -> str:
    """'demo,test' -> '[demo,test]', '' -> ''."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return f"[{','.join(names)}]" if names else ""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Install expedit_d2, and Detectron2 if it is missing, for this Python "
        f"({sys.executable}).",
        epilog="To choose another build of torch, for CPU only for instance, install it first.",
    )
    parser.add_argument(
        "--extras",
        default="",
        help="optional parts, separated by commas: demo, test, docs, onnx, sam, transformers",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument(
        "--system", action="store_true", help="allow a Python outside of an environment"
    )
    parser.add_argument("--verbose", action="store_true", help="show the output of uv and pip")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start = time.monotonic()
    try:
        check_interpreter(args.system)
        with Installer(args.dry_run, args.verbose) as installer:
            torch = install_torch(installer)
            uses_wheel = install_detectron2(installer)
            install_project(installer, parse_extras(args.extras), torch, uses_wheel)
    except InstallError as error:
        print(f"install.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("install.py: interrupted; run it again to go on.", file=sys.stderr)
        return 130
    if args.dry_run:
        print("dry run: nothing was installed")
    else:
        print(f"done in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
