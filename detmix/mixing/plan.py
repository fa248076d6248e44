"""The law of ``lam``, the share of the first image: Beta, uniform, constant or any function."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

Range = tuple[float, float]
Law = float | Range | Callable[[random.Random], float] | None
"""A constant, ``(low, high)`` for the uniform law, a function of the source of draws, or ``None`` for Beta."""


def check_law(alpha: float | Range, lam: Law) -> None:
    """Check both arguments of `draw_lam`.

    Raises:
        ValueError: naming the one that is out of range.

    Example:
        >>> check_law(1.5, (0.6, 0.4))
        Traceback (most recent call last):
        ValueError: lam must be a share in [0, 1], or (low, high), or a function, but it is (0.6, 0.4).
    """
    if not is_range(alpha, ordered=False) or min(pair_of(alpha)) <= 0:
        raise ValueError(f"alpha must be positive and finite, one number or two, but it is {alpha!r}.")
    if lam is None or callable(lam):
        return
    if not is_range(lam) or not 0 <= pair_of(lam)[0] <= pair_of(lam)[1] <= 1:
        raise ValueError(f"lam must be a share in [0, 1], or (low, high), or a function, but it is {lam!r}.")


def draw_lam(rng: random.Random, alpha: float | Range, lam: Law = None) -> float:
    """Draw a share.

    Args:
        rng: Where the draws come from.
        alpha: Of Beta(alpha, alpha), or both parameters of Beta.
        lam: Another law in its place.

    Returns:
        A multiple of 2**-24, so that it and 1 minus it are exact in float32 and add up to 1.

    Raises:
        ValueError: if a function draws what is no share.

    Example:
        >>> draw_lam(random.Random(0), 1.5, lam=0.25)
        0.25
    """
    if callable(lam):
        share = float(lam(rng))
        if not 0 <= share <= 1:
            raise ValueError(f"lam must draw shares in [0, 1], but drew {share}.")
    else:
        share = rng.betavariate(*pair_of(alpha)) if lam is None else rng.uniform(*pair_of(lam))
    return round(share * 2**24) / 2**24


def pair_of(value: Any) -> Range:
    """A pair as it is, and a number twice."""
    return (value[0], value[1]) if isinstance(value, Sequence) else (value, value)


def is_range(value: Any, *, ordered: bool = True) -> bool:
    """Whether a value is a finite number or a pair of such, low before high."""
    if isinstance(value, str) or (isinstance(value, Sequence) and len(value) != 2):
        return False
    low, high = pair_of(value)
    return math.isfinite(low) and math.isfinite(high) and (not ordered or low <= high)
