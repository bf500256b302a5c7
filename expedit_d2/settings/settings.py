"""The settings of Expedit: keyword arguments of `expedite`, keys of ``MODEL.EXPEDIT``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..operators import AUTO, NORMALIZATIONS, check_grid, check_temperature, check_window
from .spread import SCHEDULES, Spread
from .traits import METHOD_REGISTRY, MethodTraits, default_method

__all__ = ["SCOPES", "Settings"]

SCOPES = ("map", "window")
POSITIONS = ("clusters", "grid")
RECONSTRUCT_AT = ("backbone", "head")
_CHOICES = {
    "schedule": tuple(SCHEDULES),
    "scope": SCOPES,
    "positions": POSITIONS,
    "reconstruct_at": RECONSTRUCT_AT,
    "normalize": NORMALIZATIONS,
}


@dataclass(frozen=True)
class Settings:
    """Checked settings; ``MODEL.EXPEDIT`` has the same names in upper case.

    None is a key's automatic value. What the chosen method does not read must keep its default.

    Attributes:
        alpha: number of blocks run before tokens are reduced, or several of them; None: chosen by
            budget; without one, nothing is reduced.
        grid: clusters (h, w), of the map or, with scope "window", of each attention window.
        ratio: instead of grid, clusters along each side as a share of the tokens, in (0, 1]; 0.7
            leaves half of them.
        keep: for methods that leave no grid: tokens that remain after the last alpha, as a share of
            all in (0, 1] or a number (1.0 is all of them, 1 a single one); or one such value for
            each alpha, in the order of alpha.
        budget: instead of all of these: share of the GFLOPs of the transformer's blocks to spend,
            in (0, 1); alpha and the counts follow from a rule, see `expedit_d2.budget`. With a
            given alpha, only the counts follow. Costs are those of the image size that the model
            was built for; on larger images somewhat less is spent.
        scope: "map": cluster the whole map; "window": each attention window separately.
        method: how tokens are reduced: "expedit", "merge", "tome", "density", "pool", "hard" (one
            file each in `expedit_d2.methods`), or one that another package registers. None:
            "merge" with keep, "expedit" with grid or ratio; with budget "merge", or "expedit" if
            the transformer's blocks need a grid.
        schedule: how method "merge" spreads one ``keep`` over several alphas: the share that it
            merges is "equal", or "falling" linearly from the first to the last. None: "equal".
        rounds: rounds of bipartite matching in each merge.
        iterations: soft k-means steps, the paper's kappa.
        temperature: multiplies squared distances, the paper's tau; None (or "auto") follows the
            features.
        window: odd side, in clusters, of the neighborhood that a token may join; not the attention
            window.
        neighbors: clusters that a token is rebuilt from, at most; the paper's k.
        neighbor_window: odd side, in cells, of where these are looked for; 0: everywhere, as in
            the paper.
        normalize: rebuild weights "l1" (sum to one, the paper) or "l2" (unit norm, published code).
        fused_attention: run the model's own attention layers, in the plain model and in the blocks
            before alpha, by scaled dot-product attention; see `expedit_d2.fused`.
        size_aware: add log(cluster size) to the attention logits of each key.
        positions: relative positions by the clusters' mean positions, "clusters", or as if they
            lay on a regular grid, "grid" (as published).
        residual: rebuild the change of the clusters on top of the original tokens. None: only for
            METHOD merge and methods that leave a grid.
        reconstruct_at: "backbone" rebuilds the tokens after the last block; "head" lets a head
            that can do so (Segmenter's) run on the clusters, and rebuilds its class logits.

    Raises:
        ValueError: names the key, the value and what would be valid.
    """

    alpha: int | tuple[int, ...] | None = None
    grid: tuple[int, int] | None = None
    ratio: float | None = None
    keep: float | int | tuple[float | int, ...] | None = None
    budget: float | None = None
    scope: str = "map"
    method: str | None = None
    schedule: str | None = None
    rounds: int = 2
    iterations: int = 5
    temperature: float | str | None = None
    window: int = 5
    neighbors: int = 20
    neighbor_window: int = 5
    normalize: str = "l1"
    fused_attention: bool = False
    size_aware: bool = True
    positions: str = "clusters"
    residual: bool | None = None
    reconstruct_at: str = "backbone"

    def __post_init__(self) -> None:
        fix = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        if self.method is not None and self.method not in METHOD_REGISTRY:
            raise ValueError(
                f"METHOD must be one of {sorted(METHOD_REGISTRY)}, got {self.method!r}"
                f"{METHOD_REGISTRY.problems}"
            )
        if self.temperature == AUTO:
            fix("temperature", None)
        for name in ("alpha", "grid", "keep"):
            if isinstance(getattr(self, name), list):
                fix(name, tuple(getattr(self, name)))
        self._check_alphas()
        if self.budget is not None:
            self._check_budget()
        elif self.method is None:
            fix("method", default_method(unstructured=self.keep is not None))
        self._check_values()
        if self.method is not None:
            self._check_that_all_is_read()
        if self.budget is None:
            self._check_counts(METHOD_REGISTRY[self.method])
        if isinstance(self.alpha, tuple):  # in the order in which they come, with their counts
            order = sorted(range(len(self.alpha)), key=self.alpha.__getitem__)
            for name in ("alpha", "keep"):
                values = getattr(self, name)
                if isinstance(values, tuple):
                    fix(name, tuple(values[index] for index in order))
        self._check_that_keep_falls()

    def _check_values(self) -> None:
        if self.grid is not None:
            _keyed("GRID", check_grid, self.grid)
        if self.ratio is not None and not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            raise ValueError(f"RATIO must be in (0, 1], got {self.ratio!r}")
        for name in ("fused_attention", "size_aware", "residual"):
            if name == "residual" and self.residual is None:
                continue
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"{name.upper()} must be True or False, got {getattr(self, name)!r}"
                )
        for name, valid in _CHOICES.items():
            if name == "schedule" and self.schedule is None:
                continue
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"{name.upper()} must be one of {valid}, got {getattr(self, name)!r}"
                )
        if self.temperature is not None:
            _keyed("TEMPERATURE", check_temperature, self.temperature)
        _keyed("WINDOW", check_window, self.window)
        if self.neighbor_window != 0 or isinstance(self.neighbor_window, bool):
            _keyed("NEIGHBOR_WINDOW (if not 0)", check_window, self.neighbor_window)
        for name in ("iterations", "neighbors", "rounds"):
            if not _is_count(getattr(self, name), least=1):
                raise ValueError(
                    f"{name.upper()} must be a positive integer, got {getattr(self, name)!r}"
                )

    def _check_alphas(self) -> None:
        alphas = self.alphas
        if self.alpha is not None and not (alphas and all(_is_count(a, 0) for a in alphas)):
            raise ValueError(
                f"ALPHA must be a number of blocks (0 to depth - 1), several, or None, "
                f"got {self.alpha!r}"
            )
        if len(set(alphas)) < len(alphas):
            raise ValueError(f"ALPHA must not name a block twice, got {self.alpha!r}")

    def _check_budget(self) -> None:
        """A budget replaces the settings that it chooses."""
        if not _is_number(self.budget) or not 0 < self.budget < 1:
            raise ValueError(
                f"BUDGET must be a share of the blocks' GFLOPs in (0, 1), got {self.budget!r}"
            )
        for name in ("grid", "ratio", "keep"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"BUDGET chooses {name.upper()} by itself; set one of the two, got BUDGET "
                    f"{self.budget} and {name.upper()} {getattr(self, name)}"
                )

    def _check_that_all_is_read(self) -> None:
        """A key that does nothing is a mistake, such as one that a base config sets."""
        chosen = {"method", "alpha", "budget"}
        readers = lambda key: (m for m in sorted(METHOD_REGISTRY) if key in _read_by(m))  # noqa: E731
        unread = [
            f"{field.name.upper()} {getattr(self, field.name)!r} "
            f"(for METHOD {', '.join(readers(field.name))})"
            for field in fields(self)
            if field.name not in chosen | _read_by(self.method)
            and getattr(self, field.name) != field.default
        ]
        if unread:
            reads = ", ".join(sorted(name.upper() for name in _read_by(self.method)))
            raise ValueError(
                f"{', '.join(unread)} would do nothing with METHOD {self.method}, which reads "
                f"{reads}: leave out what it does not read, or set another METHOD"
            )

    def _check_counts(self, method: type[MethodTraits]) -> None:
        """The number of tokens that are left must be given, in a key that the method reads."""
        given = [name for name in method.counts if getattr(self, name) is not None]
        if self.alpha is not None and len(given) != 1:
            keys = " and ".join(name.upper() for name in method.counts)
            values = " and ".join(f"{n.upper()} {getattr(self, n)}" for n in method.counts)
            one = "exactly one of " if len(method.counts) > 1 else ""
            raise ValueError(
                f"METHOD {self.method} needs {one}{keys}, which say how many tokens are left; got "
                f"{values}"
            )
        for name in ("grid", "ratio", "keep"):
            if self.alpha is None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name.upper()} {getattr(self, name)} needs ALPHA, the number of blocks that "
                    "run before, or nothing would be reduced; set ALPHA, or BUDGET alone"
                )
        several = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        for keep in several if self.keep is not None else ():
            if not (_is_count(keep, 1) or (isinstance(keep, float) and 0 < keep <= 1)):
                raise ValueError(
                    f"KEEP must be a share of the tokens in (0, 1], a number of them, or one of "
                    f"these for each ALPHA, got {keep!r}"
                )
        if isinstance(self.keep, tuple) and len(self.keep) != len(self.alphas):
            raise ValueError(
                f"KEEP must have one value, or one for each of the {len(self.alphas)} ALPHAs, got "
                f"{self.keep!r}"
            )

    def _check_that_keep_falls(self) -> None:
        if not isinstance(self.keep, tuple):
            return
        for kind in (int, float):
            counts = [keep for keep in self.keep if isinstance(keep, kind)]
            if counts != sorted(counts, reverse=True):
                raise ValueError(
                    f"KEEP must not grow from one ALPHA to the next, as each is a count of all "
                    f"tokens, got {self.keep} for ALPHA {self.alpha}"
                )

    @property
    def alphas(self) -> tuple[int, ...]:
        """Every alpha; empty when switched off."""
        if self.alpha is None:
            return ()
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)

    @property
    def reduces(self) -> bool:
        """Whether anything is reduced; without an alpha or a budget settings are off."""
        return bool(self.alphas) or self.budget is not None

    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        """Clusters (h, w) for a map, or a window, of height x width tokens.

        Raises:
            ValueError: if the grid is larger than the map.
        """
        if self.ratio is not None:
            return max(1, round(height * self.ratio)), max(1, round(width * self.ratio))
        if self.grid[0] > height or self.grid[1] > width:
            raise ValueError(
                f"GRID must be at most the {height} x {width} tokens of the {self.scope}, got "
                f"{self.grid}; RATIO adapts to the size of the input"
            )
        return self.grid

    def count(self, index: int, tokens: int, spread: Spread) -> int:
        """Tokens that KEEP leaves after one of the alphas.

        Args:
            index: of the alpha, from the first.
            tokens: of the whole map.
            spread: how one KEEP is spread over the alphas.
        """
        keep = self.keep[index] if isinstance(self.keep, tuple) else self.keep
        share = keep if isinstance(keep, float) else keep / tokens
        if not isinstance(self.keep, tuple):
            share = spread(min(1.0, share), index, len(self.alphas))
        return max(1, round(min(1.0, share) * tokens))

    @classmethod
    def from_node(cls, node: Mapping[str, Any]) -> Settings | None:
        """Settings of a ``MODEL.EXPEDIT`` node (keys in any case); None unless ENABLED.

        FUSED_ATTENTION is for plain models too: with it alone, settings that reduce nothing.

        Raises:
            ValueError: for an unknown key, or a value that is not valid.
        """
        values = {key.lower(): value for key, value in node.items()}
        enabled = values.pop("enabled", True)
        if not isinstance(enabled, bool):
            raise ValueError(f"ENABLED must be True or False, got {enabled!r}")
        if not enabled:
            settings = cls(fused_attention=values.get("fused_attention", False))
            return settings if settings.fused_attention else None
        unknown = cls.unknown(values)
        if unknown:
            raise ValueError(f"unknown EXPEDIT key {unknown}")
        return cls(**values)

    @classmethod
    def unknown(cls, names: Iterable[str]) -> str | None:
        """The first name that is not a setting, with a suggestion; None if all are settings."""
        known = [field.name for field in fields(cls)]
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                meant = f"did you mean {near[0]!r}? T" if near else "t"
                return f"{name!r}; {meant}he keys are {known}"
        return None


def _read_by(method: str) -> set[str]:
    """Settings that matter to a METHOD, its counts included."""
    return {*METHOD_REGISTRY[method].counts, *METHOD_REGISTRY[method].reads}


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _keyed(key: str, check: Any, value: Any) -> None:
    """Run a check of the operators, naming the config key in its message."""
    try:
        check(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
