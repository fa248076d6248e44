"""Lists of numbers as json gives them: are they numbers, finite, and as many as expected?"""

import math
from itertools import chain
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

_LIMIT = 1e30  # numbers beyond have no float32, in which boxes and areas are kept

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def are_numbers(value: object, limit: float = _LIMIT) -> TypeGuard[list[float]]:
    """Whether the value is a list of finite numbers; True and False are none."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int, float}:
        return False
    return -limit < min(value, default=0) and max(value, default=0) < limit and not math.isnan(sum(value))


def as_matrix(values: list[Any], length: int) -> Floats | None:
    """Lists of ``length`` finite numbers as ``(len(values), length)``; None if one of them is anything else.

    All at once, in a fifth of the time that one by one takes.
    """
    if not set(map(type, values)) <= {list} or not set(map(len, values)) <= {length}:
        return None
    flat = list(chain.from_iterable(values))
    if not set(map(type, flat)) <= {int, float}:
        return None
    try:
        matrix = np.array(flat, dtype=np.float64).reshape(len(values), length)
    except OverflowError:  # an int of hundreds of digits
        return None
    return matrix if (np.abs(matrix) < _LIMIT).all() else None  # not below the limit is NaN, too
