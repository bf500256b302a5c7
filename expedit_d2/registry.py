"""Registries that other packages add to, by a decorator or by an entry point.

As fvcore's `Registry`, which the operators and `expedite` must not need; what is registered is
checked, and entry points are loaded when something is looked up, once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

__all__ = ["Registry"]

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class Registry(Mapping[str, _T]):
    """Objects of one kind by name, in the order in which they were registered."""

    def __init__(
        self, kind: str, group: str, check: Callable[[str, Any], None], own: str = ""
    ) -> None:
        """
        Args:
            kind: what messages call one of them.
            group: of entry points that name such objects, or modules that register some.
            check: raises TypeError for a name and an object that lacks something.
            own: the module of this package that registers some, imported at the first look.
        """
        self._kind = kind
        self._group = group
        self._check = check
        self._own = own
        self._objects: dict[str, _T] = {}
        self._problems: list[str] | None = None

    def register(self, what: Any = None) -> Any:
        """Register an object by its own name.

        Args:
            what: the object; or a name for it, or None: a decorator.

        Raises:
            TypeError: if it lacks something.
            KeyError: if there is another one of this name.
        """
        if what is None or isinstance(what, str):
            return lambda obj: self._add(what or obj.__name__, obj)
        return self._add(what.__name__, what)

    def _add(self, name: str, obj: Any) -> Any:
        self._check(name, obj)
        if self._objects.setdefault(name, obj) is not obj:
            raise KeyError(f"{self._kind} {name} is registered already; give it another name")
        return obj

    def __getitem__(self, name: str) -> _T:
        if name not in self._objects:
            self._load()
        return self._objects[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._objects)

    def __len__(self) -> int:
        self._load()
        return len(self._objects)

    @property
    def problems(self) -> str:
        """What a message about something that was not found adds: entry points that failed."""
        self._load()
        return "".join(f"; {problem}" for problem in self._problems or ())

    def _load(self) -> None:
        if self._problems is not None:
            return
        self._problems = []
        if self._own:
            import_module(self._own)
        for entry in entry_points(group=self._group):
            try:
                before = len(self._objects)
                obj = entry.load()
                if len(self._objects) == before and not self._has(obj):
                    self._add(entry.name, obj)
            except Exception as error:  # it is somebody else's code
                self._problems.append(
                    f"the entry point {entry.name!r} of {self._group}, {entry.value!r}, failed: "
                    f"{type(error).__name__}: {error}"
                )
                _logger.warning(self._problems[-1])

    def _has(self, obj: Any) -> bool:
        """Whether an object, or one that a module defines, registered itself when imported."""
        known = self._objects.values()
        modules = {getattr(other, "__module__", None) for other in known}
        return any(other is obj for other in known) or getattr(obj, "__name__", None) in modules
