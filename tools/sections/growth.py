"""Time growing numbers of boxes and pixels, each size beside the one before it."""

import functools
import itertools
from collections.abc import Sequence

import torch

from detmix import functional
from sections import Case, Section
from sections.batch import plan_rotation
from sections.inputs import draw_pixels, draw_targets

BOXES = (1, 10, 100, 1000)
SIDES = (256, 512, 1024, 2048)


def boxes(device: torch.device, *, numbers: Sequence[int] = BOXES, count: int = 8) -> Case:
    """Mix targets of growing numbers of boxes, with images of one pixel."""
    images, plan = torch.rand(count, 3, 1, 1, device=device), plan_rotation(count)
    runs = {
        f"{number} an image": functools.partial(
            functional.mixup_batch, images, draw_targets([(1, 1)] * count, number, device), plan
        )
        for number in numbers
    }
    units = dict(zip(runs, [count * number for number in numbers], strict=True))
    comparisons = [(more, fewer) for fewer, more in itertools.pairwise(runs)]
    return Case(f"{count} images of 1 pixel", runs, comparisons, "box", units)


def pixels(device: torch.device, *, dtype: torch.dtype, sides: Sequence[int] = SIDES, channels: int = 3) -> Case:
    """Blend two square images of growing sides, beside a fresh copy of one.

    The speed of memory depends on the size: memory in the cache is faster, and memory that an allocator does not keep
    is slower. The copy shows by how much.
    """
    runs, copies, units = {}, [], {}
    for side in sides:
        pair = [draw_pixels(channels, side, side, dtype=dtype, device=device) for _ in range(2)]
        name, copy = f"{side} a side", f"{side}, clone of one"
        runs |= {name: functools.partial(functional.blend_images, *pair, 0.4), copy: pair[0].clone}
        units |= dict.fromkeys((name, copy), side**2)
        copies.append((name, copy))
    comparisons = [(larger, smaller) for (smaller, _), (larger, _) in itertools.pairwise(copies)]
    return Case(f"2 square images of {channels} channels", runs, comparisons + copies, "pixel", units)


SECTION = Section(
    {
        "boxes": boxes,
        "pixels uint8": functools.partial(pixels, dtype=torch.uint8),
        "pixels float32": functools.partial(pixels, dtype=torch.float32),
    }
)
