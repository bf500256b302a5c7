"""How one KEEP is spread over several alphas: the share of all tokens that is left after each."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["SCHEDULES", "Spread", "equal", "falling", "same_number"]

#: (share left in the end, index of the alpha from the first, number of alphas) to the share that is
#: left after this one.
Spread = Callable[[float, int, int], float]


def equal(keep: float, index: int, alphas: int) -> float:
    """Each alpha keeps the same share of the tokens it is given."""
    return keep ** ((index + 1) / alphas)


def falling(keep: float, index: int, alphas: int) -> float:
    """The share that an alpha merges falls linearly: weights alphas, alphas - 1, ... 1."""
    return keep ** ((index + 1) * (2 * alphas - index) / (alphas * (alphas + 1)))


def same_number(keep: float, index: int, alphas: int) -> float:
    """Each alpha removes the same number of tokens."""
    return 1 - (1 - keep) * (index + 1) / alphas


#: Valid values of SCHEDULE.
SCHEDULES: dict[str, Spread] = {"falling": falling, "equal": equal}
