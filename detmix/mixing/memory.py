"""Where a blend is written: canvases, memory that the caller gives, and memory that overlaps."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detmix.targets import plain

Layout = Literal["flat", "channels first", "channels last"]
"""Memory layout of images: one flat row, one plane per channel, or one plane of pixels."""


class Blend(NamedTuple):
    """One blend to write. ``out`` holds both images at its top left, and may be the memory of ``first``."""

    out: Tensor
    first: Tensor
    second: Tensor
    lam: float


class Step(NamedTuple):
    """One blend of two images of a batch."""

    place: int
    """Index of the image that is written."""
    partner: int
    lam: float
    is_read_later: bool
    """Whether a later step reads the image as it was before this one."""


def canvas_size(first: Tensor, second: Tensor) -> tuple[int, int]:
    """Return (height, width), in pixels, of the smallest canvas that holds both images at its top left.

    Example:
        >>> canvas_size(torch.zeros(3, 4, 9), torch.zeros(3, 6, 2))
        (6, 9)
    """
    return max(first.shape[-2], second.shape[-2]), max(first.shape[-1], second.shape[-1])


def make_canvas(image: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Allocate a canvas with the dtype, device and memory layout of an image, such as channels last."""
    sides = range(image.ndim)
    layout = sorted(sides, key=image.stride().__getitem__, reverse=True)
    if image.is_cpu and image.dtype == torch.uint8 and all(shape):
        # numpy reuses memory that it has freed. torch's aligned memory tends to be fresh from the system, and the first
        # touch of its pages would take a quarter of the blend's time.
        array = np.empty([shape[side] for side in layout], np.uint8)
        return torch.from_numpy(array).permute([layout.index(side) for side in sides])
    return torch.empty_permuted(shape, layout, dtype=image.dtype, device=image.device)


def check_out(out: Tensor, template: Tensor, shape: Sequence[int]) -> None:
    """Raise a ValueError unless ``out`` has a blend's shape, and the dtype and device of ``template``."""
    for what, given, expected in (
        ("shape", tuple(out.shape), tuple(shape)),
        ("dtype", out.dtype, template.dtype),
        ("device", out.device, template.device),
    ):
        if given != expected:
            raise ValueError(f"out must have the blend's {what}, {expected}, but has {given}.")


def check_is_apart(outs: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """Raise a ValueError if a tensor that is written shares memory with one that is read."""
    extents = [_extent(tensor) for tensor in {id(tensor): tensor for tensor in read}.values()]
    if any(_overlap(out, extent) for out in map(_extent, outs) for extent in extents):
        raise ValueError("out must not share memory with what is blended; inplace=True writes into the batch itself.")


def copy_if_written(tensor: Tensor, written: Tensor) -> Tensor:
    """Copy a tensor that shares memory with one that is written, since it is still to be read."""
    return tensor.clone() if _overlap(_extent(tensor), _extent(written)) else tensor


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses at which a tensor begins and ends."""
    memory = plain(tensor)
    extent = sum((size - 1) * stride for size, stride in zip(memory.shape, memory.stride(), strict=True))
    start = memory.data_ptr()
    return start, start + (extent + 1) * memory.element_size() if memory.numel() else start
