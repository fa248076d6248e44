"""Check segmentations of COCO's three forms, keep them in one block of bytes, and draw them."""

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from detmix.datasets.coco.values import Ints, are_numbers

_FARTHEST = 1e5  # pixels: pycocotools walks along polygon edges, so a point at 1e12 would use up the memory


class Masks:
    """Keep the segmentations of all objects, one pickle each, in one block of bytes.

    Lists of Python numbers would take about five times the memory. Worker processes would also copy them page by page,
    because reading a Python object changes its reference count.
    """

    def __init__(self, packed: Sequence[bytes]) -> None:
        self.block = b"".join(packed)
        self.ends = np.cumsum([0, *map(len, packed)])

    def draw(self, objects: slice, height: int, width: int) -> npt.NDArray[np.uint8]:
        """Draw the masks of a range of objects, uint8 ``(N, height, width)``."""
        masks = np.zeros((objects.stop - objects.start, height, width), dtype=np.uint8)
        for mask, row in zip(masks, range(objects.start, objects.stop), strict=True):
            segmentation = pickle.loads(self.block[self.ends[row] : self.ends[row + 1]])
            if isinstance(segmentation, list):
                segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
            runs = _runs(segmentation["counts"])
            assert runs is not None  # checked at construction
            mask[:] = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
        return masks


def pack_segmentation(segmentation: Any, height: int, width: int) -> bytes | None:
    """Return the bytes that `Masks` keeps of a segmentation, or None if the segmentation is broken.

    A segmentation is a list of polygons of at least 3 points each, or a run-length code of exactly ``height * width``
    pixels.
    """
    if isinstance(segmentation, dict):
        segmentation = _checked_rle(segmentation, height, width)
    elif not isinstance(segmentation, list) or not all(map(_is_polygon, segmentation)):
        return None
    return None if segmentation is None else pickle.dumps(segmentation, protocol=5)


def _is_polygon(value: object) -> bool:
    return are_numbers(value, _FARTHEST) and len(value) >= 6 and len(value) % 2 == 0


def _checked_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any] | None:
    """Return the compressed run-length code if its runs cover the image exactly, else None."""
    counts = rle.get("counts")
    if rle.get("size") != [height, width]:
        return None
    if isinstance(counts, list):
        sound = set(map(type, counts)) <= {int} and min(counts, default=-1) >= 0 and sum(counts) == height * width
        return coco_mask.frPyObjects(rle, height, width) if sound else None
    runs = _runs(counts) if isinstance(counts, str) else None
    return (
        {"size": [height, width], "counts": counts}
        if runs is not None and runs.min() >= 0 and runs.sum() == height * width
        else None
    )


def _runs(counts: str | bytes) -> Ints | None:
    """Return the run lengths of a compressed code, or None if the code is broken.

    ``pycocotools.mask.decode`` does not initialise the pixels after a code that ends early, so the runs are checked
    here. A character holds 5 bits of a number, lowest first, and a sixth bit that is set if more follow. From the
    fourth number on, a number is the difference to the number two places before.
    """
    # json can hold half a surrogate pair, which has no UTF-8 bytes; surrogatepass puts it out of the code's range.
    given = counts.encode(errors="surrogatepass") if isinstance(counts, str) else counts
    code = np.frombuffer(given, dtype=np.uint8).astype(np.int64) - 48
    if not len(code) or code.min() < 0 or code.max() > 63 or code[-1] & 32:
        return None
    ends = np.flatnonzero((code & 32) == 0) + 1
    lengths = np.diff(ends, prepend=0)
    if lengths.max() > 7:
        return None
    shift = 5 * (np.arange(len(code)) - np.repeat(ends - lengths, lengths))
    runs = np.add.reduceat((code & 31) << shift, ends - lengths)
    runs -= np.where(code[ends - 1] & 16, 1 << 5 * lengths, 0)  # the highest bit is the sign
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
