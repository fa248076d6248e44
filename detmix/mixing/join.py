"""Join the per-box values of two targets, whatever their types."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from detmix.targets import like, plain

SHARED_BYTES = 2**18
"""Largest tensor that several targets may hold parts of. Larger values are joined for each target by itself."""

_JOINABLE = (Tensor, tv_tensors.BoundingBoxes, tv_tensors.KeyPoints)


def as_alike(key: str, values: Sequence[Any], numbers: Sequence[int]) -> Sequence[Tensor] | None:
    """Return the values as plain tensors if one `torch.cat` can join them all, otherwise ``None``.

    That holds for plain tensors, boxes of one format and keypoints, alike in dtype, device and shape of an entry, each
    with its number of entries. It does not hold for masks, since each image has its own canvas.
    """
    kind, tensors = type(values[0]), values
    if key == "masks" or kind not in _JOINABLE or {*map(type, values)} != {kind}:
        return None
    if kind is not Tensor:
        if len({getattr(value, "format", None) for value in values}) > 1:
            return None
        tensors = [plain(value) for value in values]
    first = tensors[0]
    dtype, device, requires_grad, entry = first.dtype, first.device, first.requires_grad, first.shape[1:]
    for tensor, number in zip(tensors, numbers, strict=True):
        if tensor.shape != (number, *entry) or tensor.dtype != dtype or tensor.device != device:
            return None
        if tensor.requires_grad != requires_grad:  # joined, all would require it
            return None
    return None if first.is_sparse else tensors


def join_alike(tensors: Sequence[Tensor], samples: Sequence[Sequence[int]], sizes: list[int]) -> Sequence[Tensor]:
    """Join the tensors of each sample, for all samples in one operation.

    The results are parts of one tensor. If that would have more than `SHARED_BYTES`, they are not: all of it would be
    kept in memory, and stored, with any of them.

    Args:
        tensors: Tensors of a batch, all alike.
        samples: For each sample the places of first and second among the tensors, or of a first alone.
        sizes: Number of entries in the result of each sample.

    Returns:
        A new tensor for each sample.

    Example:
        >>> join_alike([torch.tensor([1, 2]), torch.tensor([3])], [[0, 1], [1]], [3, 1])
        (tensor([1, 2, 3]), tensor([3]))
    """
    if sum(sizes) * tensors[0].shape[1:].numel() * tensors[0].itemsize > SHARED_BYTES:
        return [torch.cat([tensors[place] for place in places]) for places in samples]
    return split(torch.cat([tensors[place] for places in samples for place in places]), sizes)


def split(joined: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Cut a tensor that nobody else holds into tensors ``(size, ...)`` that can each be changed in place.

    Autograd does not allow changing the views that ``split`` makes. Of slices, it would count a change to one as a
    change to all.
    """
    return [joined] if len(sizes) == 1 else torch.unsafe_split_with_sizes(joined, sizes)


def join(key: str, first: Any, second: Any, canvas: tuple[int, int]) -> Any:
    """Put the entries of second after those of first, in the type and format of first. Pad masks to the canvas.

    Raises:
        ValueError: If the two cannot be joined. The message names the key.
    """
    if not isinstance(first, Tensor) and not isinstance(second, Tensor):
        return np.concatenate([first, second]) if isinstance(first, np.ndarray) else [*first, *second]
    tensor = first if isinstance(first, Tensor) else second
    pair = [
        part if isinstance(part, Tensor) else torch.as_tensor(part).to(tensor.device, non_blocking=True)
        for part in (first, second)
    ]
    first, second = pair
    if first.device != second.device:
        raise ValueError(
            f"{key!r} must be on one device, but is on {first.device} in the first target and on {second.device} in "
            f"the second."
        )
    # An empty tensor, often torch.tensor([]), must not determine type, dtype or shape.
    template = first if len(first) or not len(second) else second
    if isinstance(first, tv_tensors.BoundingBoxes) and isinstance(second, tv_tensors.BoundingBoxes):
        template, second = first, _convert(key, first, second)
    elif len(first) and len(second) and any(isinstance(part, tv_tensors.BoundingBoxes) for part in pair):
        types = f"{type(first).__name__} in the first target and {type(second).__name__} in the second"
        raise ValueError(
            f"{key!r} must be of one type, since a plain tensor does not say its box format, but is {types}."
        )
    parts = [
        _pad(key, part, canvas) if key == "masks" or isinstance(part, tv_tensors.Mask) else plain(part)
        for part in (first, second)
    ]
    full = [part for part in parts if len(part)] or parts[:1]
    if full[0].shape[1:] != full[-1].shape[1:]:
        raise ValueError(
            f"{key!r} must have entries of one shape, but they have shape {tuple(full[0].shape[1:])} in the first "
            f"target and {tuple(full[-1].shape[1:])} in the second."
        )
    return like(torch.cat(full), template, canvas)


def copied(value: Any) -> Any:
    """Copy a per-box value: the entries of a tensor or array too, a list shallowly."""
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def _convert(key: str, first: Any, second: Any) -> Any:
    if first.format == second.format:
        return second
    rotated = [tv_tensors.is_rotated_bounding_format(part.format) for part in (first, second)]
    if rotated[0] != rotated[1]:
        raise ValueError(
            f"{key!r} must be rotated in both targets or in neither, but the format is {first.format.value} in the "
            f"first and {second.format.value} in the second."
        )
    # Whole numbers would lose half a pixel where corners become a centre.
    second = tv_tensors.wrap(plain(second).to(torch.promote_types(first.dtype, second.dtype)), like=second)
    return TF.convert_bounding_box_format(second, new_format=first.format)


def _pad(key: str, masks: Tensor, canvas: tuple[int, int]) -> Tensor:
    if masks.ndim < 3 and not len(masks):  # torch.tensor([])
        return plain(masks)
    height, width = masks.shape[-2:]
    if height > canvas[0] or width > canvas[1]:
        raise ValueError(f"{key!r} must fit on the canvas of {canvas}, but is of size {(height, width)}.")
    if (height, width) == canvas:
        return plain(masks)
    padded: Tensor = F.pad(plain(masks), (0, canvas[1] - width, 0, canvas[0] - height))
    return padded
