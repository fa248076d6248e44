"""Draw and describe mixes. A plan is a list of `Mix`, one for each sample of a batch."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Range = tuple[float, float]

Law = float | Range | Callable[[random.Random], float] | None
"""A constant, ``(low, high)`` for a uniform draw, a function of a `random.Random`, or ``None`` for Beta."""

SHARES: dict[str, Callable[[float], Range]] = {
    "lam": lambda lam: (lam, 1 - lam),
    "first": lambda lam: (1.0, 0.0),
    "ones": lambda lam: (1.0, 1.0),
}
"""What the weights of the first's and the second's boxes are multiplied by, by the name of ``box_weights``."""


class Placement(NamedTuple):
    """Where the second image lies on the first's canvas, in plain numbers that fit images of any size.

    Example:
        >>> Placement(scale=0.5, x=1.0, y=0.0)  # half as large as fits, in the upper right corner
        Placement(scale=0.5, x=1.0, y=0.0)
    """

    scale: float
    """Size of the image, as a multiple of the largest at which the whole image fits onto the canvas."""
    x: float
    """Position from 0, the left edge of the canvas, to 1, the right edge. It crops an image wider than the canvas."""
    y: float
    """Position from 0, the top edge, to 1, the bottom edge."""


class Mix(NamedTuple):
    """What is done to one sample, in plain numbers that can be logged, stored and replayed.

    Example:
        >>> Mix(partner=1, lam=0.75, shares=(0.75, 0.25))
        Mix(partner=1, lam=0.75, shares=(0.75, 0.25), placement=None)
    """

    partner: int = -1
    """Index of the sample it is mixed with; -1 leaves it unmixed."""
    lam: float = 1.0
    """Share of the sample's own image."""
    shares: tuple[float, float] = (1.0, 0.0)
    """Factors of the weights of its own boxes and of its partner's."""
    placement: Placement | None = None
    """Where the partner lies. ``None`` puts both images at the top left of the canvas, unscaled."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Mix":
        """Read the mix that a mixed target, or a JSON object, records.

        Raises:
            ValueError: If the record lacks a field.

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


def check_plan(plan: Sequence[Mix], size: int, pool_size: int) -> None:
    """Check that a plan fits a batch.

    Args:
        plan: One mix for each sample.
        size: Number of samples in the batch.
        pool_size: Number of samples that a partner can be.

    Raises:
        ValueError: If the plan has another length, a partner does not exist, or a ``lam`` lies outside [0, 1].

    Example:
        >>> check_plan([Mix(partner=2, lam=0.5)], 1, 2)
        Traceback (most recent call last):
        ValueError: partner of sample 0 must be -1 or an index below 2, but it is 2.
    """
    if len(plan) != size:
        raise ValueError(f"plan must hold one Mix for each of {size} samples, but it holds {len(plan)}.")
    for i, mix in enumerate(plan):
        if not -1 <= mix.partner < pool_size:
            raise ValueError(
                f"partner of sample {i} must be -1 or an index below {pool_size}, but it is {mix.partner}."
            )
        if mix.partner >= 0:
            check_lam(mix.lam)


def check_lam(lam: float) -> None:
    """Raise a ValueError unless ``lam`` lies in [0, 1]."""
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is the share of the first image and must lie in [0, 1], but it is {lam}.")


def check_law(alpha: float | Range, lam: Law) -> None:
    """Check both arguments of `draw_lam`.

    Raises:
        ValueError: If one is out of range. The message names it.

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
    """Draw the share of the first image.

    Args:
        rng: Source of randomness.
        alpha: Parameter of Beta(alpha, alpha), or both parameters of Beta(a, b).
        lam: Law that replaces Beta.

    Returns:
        A multiple of 2**-24. So ``lam`` and ``1 - lam`` are exact in float32 and add up to 1.

    Raises:
        ValueError: If a function draws a number outside [0, 1].

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
    """Return a pair as it is, and a number twice."""
    return (value[0], value[1]) if isinstance(value, Sequence) else (value, value)


def is_range(value: Any, *, ordered: bool = True) -> bool:
    """Tell whether a value is a finite number, or a pair of finite numbers with the lower one first."""
    if isinstance(value, str) or (isinstance(value, Sequence) and len(value) != 2):
        return False
    low, high = pair_of(value)
    return math.isfinite(low) and math.isfinite(high) and (not ordered or low <= high)
