"""What both sides of Albumentations need to know about its images."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

IMAGE_DTYPES = ("uint8", "float32")
"""With another dtype, about every second transform of Albumentations fails."""


def writable(image: Array) -> Array:
    """The array, or a copy that torch can take: it has no negative strides, and warns of read-only ones."""
    return np.require(image, requirements=["C", "W"])
