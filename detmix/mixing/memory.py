"""What a blend reads and writes: canvases, memory of the caller's, and what overlaps."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detmix.targets import plain

Layout = Literal["flat", "channels first", "channels last"]
"""How entries of one memory order are a stack of planes of rows: one row, a plane a channel, or one of pixels."""


class Blend(NamedTuple):
    """One blend to write: ``out`` holds both images at its top left; it may be the memory of ``first``."""

    out: Tensor
    first: Tensor
    second: Tensor
    lam: float


class Step(NamedTuple):
    """One blend of entries of batches."""

    entry: int
    partner: int
    lam: float
    is_read_later: bool
    """Whether a later step reads what the entry was before."""


def canvas_size(first: Tensor, second: Tensor) -> tuple[int, int]:
    """The (height, width) in pixels of the smallest canvas that holds both images at its top left.

    Example:
        >>> canvas_size(torch.zeros(3, 4, 9), torch.zeros(3, 6, 2))
        (6, 9)
    """
    return max(first.shape[-2], second.shape[-2]), max(first.shape[-1], second.shape[-1])


def make_canvas(image: Tensor, shape: tuple[int, ...]) -> Tensor:
    # The layout of the image: channels last stays so.
    sides = range(image.ndim)
    layout = sorted(sides, key=image.stride().__getitem__, reverse=True)
    if image.is_cpu and image.dtype == torch.uint8 and all(shape):
        # Memory of numpy's, as what it frees is used again, while torch's aligned memory tends to come fresh from the
        # system: first touches would cost a quarter of the blend.
        array = np.empty([shape[side] for side in layout], np.uint8)
        return torch.from_numpy(array).permute([layout.index(side) for side in sides])
    return torch.empty_permuted(shape, layout, dtype=image.dtype, device=image.device)


def check_out(out: Tensor, template: Tensor, shape: Sequence[int]) -> None:
    for what, given, expected in (
        ("shape", tuple(out.shape), tuple(shape)),
        ("dtype", out.dtype, template.dtype),
        ("device", out.device, template.device),
    ):
        if given != expected:
            raise ValueError(f"out must have the blend's {what}, {expected}, but has {given}.")


def check_is_apart(outs: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    extents = [_memory(tensor) for tensor in {id(tensor): tensor for tensor in read}.values()]
    if any(is_overlap(out, extent) for out in map(_memory, outs) for extent in extents):
        raise ValueError("out must not share memory with what is blended; inplace=True writes into the batch itself.")


def copy_if_written(tensor: Tensor, entries: Tensor) -> Tensor:
    """What is read must outlast what is written."""
    return tensor.clone() if is_overlap(_memory(tensor), _memory(entries)) else tensor


def is_overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _memory(tensor: Tensor) -> tuple[int, int]:
    """The addresses that a tensor begins and ends at."""
    memory = plain(tensor)
    extent = sum((size - 1) * stride for size, stride in zip(memory.shape, memory.stride(), strict=True))
    start = memory.data_ptr()
    return start, start + (extent + 1) * memory.element_size() if memory.numel() else start
