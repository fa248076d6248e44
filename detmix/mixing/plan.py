"""The law of ``lam``, the share of the first image: Beta, uniform, constant or any function."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Placement(NamedTuple):
    """Where the second image lies on the first's canvas: plain numbers that fit images of any size.

    Example:
        >>> Placement(scale=0.5, x=1.0, y=0.0)  # half as large as fits, in the upper right corner
        Placement(scale=0.5, x=1.0, y=0.0)
    """

    scale: float
    """Its size, as a multiple of the largest at which the whole image fits onto the canvas."""
    x: float
    """0 to 1: at the left edge of the canvas, at the right one, or between; where it is wider, which part is seen."""
    y: float
    """0 to 1: the same from top to bottom."""


class Mix(NamedTuple):
    """What is done to one sample, drawn before anything is done: plain numbers, to log, to store and to replay.

    Example:
        >>> Mix(partner=1, lam=0.75, shares=(0.75, 0.25))
        Mix(partner=1, lam=0.75, shares=(0.75, 0.25), placement=None)
    """

    partner: int = -1
    """The index of the sample it is mixed with; -1 for one that is left as it is."""
    lam: float = 1.0
    """The sample's own share of the image."""
    shares: tuple[float, float] = (1.0, 0.0)
    """What the weights of its own boxes and of its partner's are multiplied by."""
    placement: Placement | None = None
    """How the partner lies on its canvas; both at the top left, unscaled, if ``None``."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Mix":
        """The plan that a mixed target, or a JSON object, records.

        Example:
            >>> Mix.of({"boxes": ..., "partner": 3, "lam": 0.25, "shares": [0.25, 0.75], "placement": None})
            Mix(partner=3, lam=0.25, shares=(0.25, 0.75), placement=None)
        """
        if missing := [field for field in cls._fields if field not in record]:
            raise ValueError(f"a record of a mix must hold {list(cls._fields)}, but {missing} are missing.")
        placement = record["placement"]
        return cls(
            int(record["partner"]),
            float(record["lam"]),
            (float(record["shares"][0]), float(record["shares"][1])),
            None if placement is None else Placement(*map(float, placement)),
        )


Range = tuple[float, float]


Law = float | Range | Callable[[random.Random], float] | None
"""A constant, ``(low, high)`` for the uniform law, a function of the source of draws, or ``None`` for Beta."""

SHARES: dict[str, Callable[[float], Range]] = {
    "lam": lambda lam: (lam, 1 - lam),
    "first": lambda lam: (1.0, 0.0),
    "ones": lambda lam: (1.0, 1.0),
}
"""What the weights of the boxes of first and second are multiplied by, by name."""


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


def check_lam(lam: float) -> None:
    """Raise a ValueError unless lam is a share."""
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is the share of the first image and must lie in [0, 1], but it is {lam}.")


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
