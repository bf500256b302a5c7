"""The versions of other libraries whose models fit; `setup.py` reads them as well."""

from __future__ import annotations

from importlib import metadata

__all__ = ["VERSIONS", "unfit"]

#: By the name of the package on PyPI.
VERSIONS = {
    "segment-anything": "==1.0",
    "timm": ">=1.0.29,<2",  # before, ViTs without class tokens have another layout
    "torchvision": ">=0.16,<1",
    "transformers": ">=5.18,<6",
}


def unfit(what: str, package: str) -> ValueError:
    """The error for a model whose parts are not those that its adapter knows."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:  # put on the path without its metadata
        version = "of an unknown version"
    return ValueError(
        f"{what} of {package} {version} has other parts than Expedit knows; "
        f"{package}{VERSIONS[package]} fits"
    )
