"""Data: the embedded labelled set "collage" and registrations with Detectron2.

Rendering scenes (``make_scene``, ``write_collage``) needs no Detectron2; the two ``register_``
functions import it on first use.
"""

from importlib import import_module

from .collage import Scene, collage_folder, make_scene, write_collage

__all__ = [
    "Scene",
    "collage_folder",
    "make_scene",
    "register_by_path",
    "register_collage",
    "write_collage",
]


def __getattr__(name: str) -> object:
    module = {"register_collage": ".collage.register", "register_by_path": ".by_path"}.get(name)
    if module is not None:
        return getattr(import_module(module, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
