"""Handle the image arrays of Albumentations."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

IMAGE_DTYPES = ("uint8", "float32")
"""The dtypes that all transforms of Albumentations take; with others about half of them fail."""


def writable(image: Array) -> Array:
    """Return the array, or a copy that torch takes: torch has no negative strides and warns of read-only arrays."""
    return np.require(image, requirements=["C", "W"])
