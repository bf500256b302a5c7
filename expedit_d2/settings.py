"""The settings of Expedit: keyword arguments of `expedite`, keys of ``MODEL.EXPEDIT``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .operators import AUTO, NORMALIZATIONS, check_grid, check_temperature, check_window

__all__ = ["OFF_GRID", "SCHEDULES", "SCOPES", "Settings", "spread_share"]

SCOPES = ("map", "window")
POSITIONS = ("clusters", "grid")
#: Methods that leave a number of tokens, KEEP, on no grid; the others leave a GRID.
OFF_GRID = ("merge", "tome", "density")
SCHEDULES = ("falling", "equal")
RECONSTRUCT_AT = ("backbone", "head")


@dataclass(frozen=True)
class Settings:
    """Checked settings; ``MODEL.EXPEDIT`` has the same names in upper case.

    Attributes:
        alpha: number of blocks run before clustering, or several of them; None: off.
        grid: clusters (h, w), of the map or, with scope "window", of each attention window.
        ratio: instead of grid, clusters along each side as a share of the tokens, in (0, 1].
        keep: for methods off the grid: tokens left behind the last alpha, as a share of all in
            (0, 1] or a number; or one such value for each alpha.
        budget: instead of all these: share of the GFLOPs of the transformer's blocks to spend, in
            (0, 1); alpha and the counts follow from a rule, see `expedit_d2.budget`.
        scope: "map" or "window".
        method: a name in `expedit_d2.methods.METHODS`; None: "merge" with keep, "expedit" with
            grid or ratio, and with budget what is best for the transformer.
        schedule: how method "merge" spreads one ``keep`` over several alphas: the share that it
            merges is "falling" linearly from the first to the last, or "equal". None: "falling",
            and with budget what is best for the transformer.
        rounds: of bipartite matching in each merge.
        iterations: soft k-means steps.
        temperature: multiplies squared distances; "auto" (or None) follows the features.
        window: odd side, in cells, of the clusters a token may join.
        neighbors: clusters that a token is rebuilt from, at most.
        neighbor_window: odd side, in cells, of where these are looked for; 0: everywhere.
        normalize: rebuild weights "l1" (sum to one) or "l2" (unit norm).
        fused_attention: run the model's own attention layers, which the blocks before alpha and the
            plain model have, by scaled dot-product attention; see `expedit_d2.fused`.
        size_aware: add log(cluster size) to the attention logits of each key.
        positions: relative positions by the clusters' mean positions, "clusters", or as if they
            lay on a regular grid, "grid" (as published).
        residual: rebuild the change of the clusters on top of the original tokens. None: for
            methods that leave a grid, which gain by it.
        reconstruct_at: "backbone" rebuilds the tokens behind the last block; "head" lets a head
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
    temperature: float | str | None = AUTO
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
        if self.temperature is None:
            fix("temperature", AUTO)
        if isinstance(self.alpha, Sequence):
            fix("alpha", tuple(self.alpha))
        if isinstance(self.grid, Sequence):
            fix("grid", tuple(self.grid))
        if isinstance(self.keep, Sequence):
            fix("keep", tuple(self.keep))
        for alpha in self.alphas:
            if not isinstance(alpha, int) or isinstance(alpha, bool) or alpha < 0:
                raise ValueError(
                    f"ALPHA must be a number of blocks (0 to depth - 1), several, or None, "
                    f"got {self.alpha!r}"
                )
        if len(set(self.alphas)) < len(self.alphas):
            raise ValueError(f"ALPHA must not name a block twice, got {self.alpha!r}")
        if self.budget is not None:
            self._check_budget()
        else:
            if self.method is None:
                fix("method", "expedit" if self.keep is None else "merge")
            self._check_counts()
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise ValueError(f"SCHEDULE must be one of {SCHEDULES}, got {self.schedule!r}")
        if self.grid is not None:
            _keyed("GRID", check_grid, self.grid)
        if self.ratio is not None and not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            raise ValueError(f"RATIO must be in (0, 1], got {self.ratio!r}")
        if not isinstance(self.fused_attention, bool):
            raise ValueError(f"FUSED_ATTENTION must be True or False, got {self.fused_attention!r}")
        if self.scope not in SCOPES:
            raise ValueError(f"SCOPE must be one of {SCOPES}, got {self.scope!r}")
        if self.positions not in POSITIONS:
            raise ValueError(f"POSITIONS must be one of {POSITIONS}, got {self.positions!r}")
        if self.reconstruct_at not in RECONSTRUCT_AT:
            raise ValueError(
                f"RECONSTRUCT_AT must be one of {RECONSTRUCT_AT}, got {self.reconstruct_at!r}"
            )
        _keyed("TEMPERATURE", check_temperature, self.temperature)
        _keyed("WINDOW", check_window, self.window)
        if self.neighbor_window != 0:
            _keyed("NEIGHBOR_WINDOW (if not 0)", check_window, self.neighbor_window)
        for name in ("iterations", "neighbors", "rounds"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name.upper()} must be a positive integer, got {value!r}")
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"NORMALIZE must be one of {NORMALIZATIONS}, got {self.normalize!r}")

    def _check_budget(self) -> None:
        """A budget stands for the settings that it is turned into."""
        if not _is_number(self.budget) or not 0 < self.budget < 1:
            raise ValueError(
                f"BUDGET must be a share of the blocks' GFLOPs in (0, 1), got {self.budget!r}"
            )
        for name in ("alpha", "grid", "ratio", "keep"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"BUDGET chooses {name.upper()} by itself; set one of the two, got BUDGET "
                    f"{self.budget} and {name.upper()} {getattr(self, name)}"
                )

    def _check_counts(self) -> None:
        """How many tokens are left must be said, in the way that the method has it."""
        if self.method in OFF_GRID:
            if self.grid is not None or self.ratio is not None:
                raise ValueError(
                    f"METHOD {self.method} leaves no grid: set KEEP instead of GRID or RATIO"
                )
            if self.alpha is not None and self.keep is None:
                raise ValueError(
                    f"METHOD {self.method} needs KEEP: the share of the tokens that is left"
                )
        elif self.keep is not None:
            raise ValueError(
                f"KEEP is for METHOD {', '.join(OFF_GRID)}; METHOD {self.method} takes GRID or "
                "RATIO"
            )
        elif self.alpha is not None and (self.grid is None) == (self.ratio is None):
            raise ValueError(
                f"exactly one of GRID and RATIO must be given, got GRID {self.grid} and "
                f"RATIO {self.ratio}"
            )
        several = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        for keep in several if self.keep is not None else ():
            whole = isinstance(keep, int) and not isinstance(keep, bool) and keep > 0
            if not (whole or (isinstance(keep, float) and 0 < keep <= 1)):
                raise ValueError(
                    f"KEEP must be a share of the tokens in (0, 1], a number of them, or one of "
                    f"these for each ALPHA, got {self.keep!r}"
                )
        if isinstance(self.keep, tuple) and len(self.keep) != len(self.alphas):
            raise ValueError(
                f"KEEP must have one value, or one for each of the {len(self.alphas)} ALPHAs, got "
                f"{self.keep!r}"
            )

    @property
    def alphas(self) -> tuple[int, ...]:
        """Every alpha; empty when switched off."""
        if self.alpha is None:
            return ()
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)

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

    def count(self, index: int, tokens: int, spread: str) -> int:
        """Tokens that KEEP leaves behind one of the alphas.

        Args:
            index: of the alpha, from the first.
            tokens: of the whole map.
            spread: "equal" if each alpha keeps the same share of what it gets, "falling" if what
                it merges falls linearly, "numbers" if each takes away the same number.
        """
        keep = self.keep[index] if isinstance(self.keep, tuple) else self.keep
        share = keep if isinstance(keep, float) else keep / tokens
        if not isinstance(self.keep, tuple):
            share = spread_share(min(1.0, share), index, len(self.alphas), spread)
        return max(1, round(min(1.0, share) * tokens))

    @classmethod
    def from_node(cls, node: Mapping[str, Any]) -> Settings | None:
        """Settings of a ``MODEL.EXPEDIT`` node (keys in any case); None unless ENABLED.

        FUSED_ATTENTION is for plain models too: with it alone, settings that reduce nothing.

        Raises:
            ValueError: for an unknown key.
        """
        values = {key.lower(): value for key, value in node.items()}
        if not values.pop("enabled", True):
            fused = values.get("fused_attention", False)
            return cls(fused_attention=fused) if fused else None
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown EXPEDIT key {unknown[0]!r}; the keys are {known}")
        return cls(**values)


def spread_share(keep: float, index: int, alphas: int, spread: str) -> float:
    """The share of all tokens that is left behind one of several alphas; see `Settings.count`."""
    done = (index + 1) / alphas
    if spread == "numbers":
        return 1 - (1 - keep) * done
    if spread == "falling":  # weights alphas, alphas - 1, ... 1, summed up
        done = (index + 1) * (2 * alphas - index) / (alphas * (alphas + 1))
    return keep**done


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _keyed(key: str, check: Any, value: Any) -> None:
    """Run a check of the operators, naming the config key in its message."""
    try:
        check(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
