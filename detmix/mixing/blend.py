"""Blend images: ``lam * first + (1 - lam) * second``, pairs on a shared canvas or a whole batch."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from detmix.mixing.blend_cpu import copy_pixels, write, write_batch
from detmix.mixing.memory import Blend, Step, canvas_size, check_is_apart, check_out, copy_if_written, make_canvas
from detmix.mixing.plan import check_lam
from detmix.targets import like, plain


def blend_images(
    first: Tensor, second: Tensor, lam: float, *, fill: float | Sequence[float] = 0.0, out: Tensor | None = None
) -> Tensor:
    """Blend two images on a canvas that holds both: ``lam * first + (1 - lam) * second``.

    The canvas has the larger height and the larger width of the two; both lie at its top left. Where only one image
    covers the canvas, the other's share is ``fill``. Integer images are rounded to the nearest level, not truncated;
    half precision is rounded once. ``blend_images(second, first, 1 - lam)`` is the same image.

    Args:
        first: Image ``(C, H1, W1)``, integer or floating point. Its type (`tv_tensors.Image`, say) and its memory
            layout are the result's.
        second: Image ``(C, H2, W2)`` of the same dtype and device.
        lam: The share of ``first``, in [0, 1].
        fill: The value of a pixel that an image does not cover, in the image's own units: one number, or one a channel.
            0 is black before normalisation, and the mean colour after it.
        out: Where to write the blend: memory of the caller's, apart from that of the images. New if ``None``.

    Returns:
        The blend, ``(C, max(H1, H2), max(W1, W2))``, in the dtype of the inputs, which are left alone: ``out``, if
        given.

    Raises:
        ValueError: if shapes, dtypes or devices do not go together, ``lam`` is outside [0, 1] or ``fill`` does not fit.

    Example:
        >>> first = torch.full((1, 1, 2), 10, dtype=torch.uint8)
        >>> second = torch.full((1, 2, 1), 15, dtype=torch.uint8)
        >>> blend_images(first, second, 0.5)
        tensor([[[12,  5],
                 [ 8,  0]]], dtype=torch.uint8)
    """
    blend, levels = _prepare(first, second, lam, fill, out)
    if out is not None:
        check_is_apart([out], [first, second])
    write([blend], levels)
    return like(blend.out, first) if out is None else out


def blend_each(
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor | None],
    lams: Sequence[float],
    *,
    fill: float | Sequence[float] = 0.0,
    outs: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Blend images of any sizes, pair by pair, as `blend_images` does; one without a second is copied.

    On a CUDA device all are blended in one launch.

    Args:
        firsts: Images ``(C, H_i, W_i)``.
        seconds: As many images, or ``None``.
        lams: The share of each first image, in [0, 1].
        fill: See `blend_images`.
        outs: Where to write each blend; see `blend_images`.

    Returns:
        The blends, each ``(C, max(H1, H2), max(W1, W2))``.

    Raises:
        ValueError: as `blend_images`, before anything is written.

    Example:
        >>> small, wide = torch.ones(1, 1, 1), torch.zeros(1, 1, 2)
        >>> blend_each([small, wide], [wide, None], [0.75, 1.0])
        [tensor([[[0.7500, 0.0000]]]), tensor([[[0., 0.]]])]
    """
    prepared = [
        _prepare(first, first if second is None else second, lam, fill, None if outs is None else outs[i])
        for i, (first, second, lam) in enumerate(zip(firsts, seconds, lams, strict=True))
    ]
    if outs is not None:
        check_is_apart(outs, [*firsts, *(second for second in seconds if second is not None)])
    groups: defaultdict[Any, list[Blend]] = defaultdict(list)
    for (blend, levels), second in zip(prepared, seconds, strict=True):
        if second is None:
            copy_pixels(blend.first, blend.out)
        else:
            groups[blend.out.dtype, blend.out.device, levels].append(blend)
    for (_, _, levels), blends in groups.items():
        write(blends, levels)
    if outs is not None:
        return list(outs)
    return [like(blend.out, first) for (blend, _), first in zip(prepared, firsts, strict=True)]


def blend_batch(
    images: Tensor,
    partners: Sequence[int],
    lams: Sequence[float],
    *,
    pool: Tensor | Sequence[Tensor] | None = None,
    fill: float | Sequence[float] = 0.0,
    inplace: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Blend each entry of a batch with another one: ``lams[i] * images[i] + (1 - lams[i]) * images[partners[i]]``.

    Args:
        images: A batch ``(B, ...)`` of any modality, integer or floating point.
        partners: For each entry the index of the other one; -1 leaves the entry as it is.
        lams: The share of each entry in its blend, in [0, 1].
        pool: Where the partners come from, if not from the batch: a tensor ``(M, ...)``, or a sequence of M images that
            are no larger than the batch's.
        fill: The value of a pixel that a smaller image of the pool does not cover; see `blend_images`.
        inplace: Write into ``images``. Beside it, no more than one entry is copied at a time.
        out: Where to write the blends, ``(B, ...)``: memory of the caller's, apart from what is blended, for a loop
            that uses it again and again. Fresh memory costs more than the arithmetic.

    Returns:
        ``(B, ...)`` in the dtype and the memory layout of ``images``: ``images`` itself if ``inplace``, ``out`` if
        given, else new.

    Raises:
        ValueError: if lengths, shapes, dtypes or devices do not go together, before anything is written.

    Example:
        >>> blend_batch(torch.tensor([[0.0, 8.0], [4.0, 0.0], [1.0, 1.0]]), [1, 0, -1], [0.75, 0.5, 1.0])
        tensor([[1., 6.],
                [2., 4.],
                [1., 1.]])
    """
    entries = plain(images)
    seconds = entries if pool is None else plain(pool) if isinstance(pool, Tensor) else pool
    _check_batch(entries, partners, lams, seconds)
    if out is not None:
        if inplace:
            raise ValueError("out must be None if the blends are written into images, inplace=True.")
        check_out(out, entries, entries.shape)
        check_is_apart([out], [entries, *([pool] if isinstance(pool, Tensor) else pool or [])])
    levels = _check_levels(fill, entries[0]) if entries.ndim == 4 and len(entries) else (0.0,)
    if not inplace and isinstance(seconds, Tensor) and _are_small(entries, seconds):
        blended = _blend_at_once(entries, partners, lams, seconds)
        return like(blended, images) if out is None else out.copy_(blended)
    target = entries if inplace else make_canvas(entries, entries.shape) if out is None else plain(out)
    order = _order(partners) if inplace and pool is None else [(i, False) for i, j in enumerate(partners) if j >= 0]
    if isinstance(seconds, Tensor):
        if inplace and pool is not None:
            seconds = copy_if_written(seconds, entries)
        steps = [Step(i, partners[i], lams[i], is_read) for i, is_read in order]
        write_batch(target, entries, seconds, steps, levels)
    else:
        others = [plain(seconds[partners[i]]) for i, _ in order]
        if inplace:
            others = [copy_if_written(other, entries) for other in others]
        write(
            [Blend(target[i], entries[i], other, lams[i]) for (i, _), other in zip(order, others, strict=True)], levels
        )
    if not inplace:
        for i, j in enumerate(partners):
            if j < 0:
                target[i].copy_(entries[i])
    return images if inplace else like(target, images) if out is None else out


def _prepare(
    first: Tensor, second: Tensor, lam: float, fill: float | Sequence[float], out: Tensor | None
) -> tuple[Blend, tuple[float, ...]]:
    """A pair, checked, with a canvas to write it on, and the levels of what is not covered."""
    check_lam(lam)
    _check_pair(first, second)
    levels = _check_levels(fill, first)
    one, other = plain(first), plain(second)
    shape = (one.shape[0], *canvas_size(one, other))
    if out is None:
        return Blend(make_canvas(one, shape), one, other, lam), levels
    check_out(out, one, shape)
    return Blend(plain(out), one, other, lam), levels


def _check_pair(first: Tensor, second: Tensor, where: str = "first and second") -> None:
    for name, image in (("first", first), ("second", second)):
        if image.ndim != 3:
            raise ValueError(f"{name} must be an image of shape (C, H, W), but its shape is {tuple(image.shape)}.")
    for what, one, other in (
        ("channels", first.shape[0], second.shape[0]),
        ("dtype", first.dtype, second.dtype),
        ("device", first.device, second.device),
    ):
        if one != other:
            raise ValueError(f"{where} must agree in {what}, but first has {one} and second has {other}.")


def _check_batch(
    entries: Tensor, partners: Sequence[int], lams: Sequence[float], seconds: Tensor | Sequence[Tensor]
) -> None:
    if not len(entries) == len(partners) == len(lams):
        raise ValueError(
            f"there must be one partner and one lam for each of the {len(entries)} entries of the batch, but there are "
            f"{len(partners)} and {len(lams)}."
        )
    size = len(seconds)
    for i, (j, lam) in enumerate(zip(partners, lams, strict=True)):
        check_lam(lam)
        if not -1 <= j < size:
            raise ValueError(f"partner {i} must be -1 or below the {size} there are, but it is {j}.")
    used = sorted({j for j in partners if j >= 0})
    for j in used[:1] if isinstance(seconds, Tensor) else used:  # those of a tensor are all alike
        first, second = entries[0], seconds[j]
        if first.ndim == 3 and second.ndim == 3:
            if second.shape[-2] > first.shape[-2] or second.shape[-1] > first.shape[-1]:
                raise ValueError(
                    f"image {j} of the pool must be no larger than those of the batch tensor, {tuple(first.shape)}, "
                    f"but is {tuple(second.shape)}: resize it, or give the batch as a list of images."
                )
            _check_pair(first, second, f"the entries of the batch and their partner {j}")
        elif first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
            raise ValueError(
                f"the entries of the batch and their partner {j} must agree in shape, dtype and device, but are "
                f"{tuple(first.shape)} {first.dtype} {first.device} and {tuple(second.shape)} {second.dtype} "
                f"{second.device}."
            )


def _are_small(entries: Tensor, seconds: Tensor) -> bool:
    # One operation for all costs a copy of the partners, one for each entry its call: rows of a table want the former.
    # It takes the shares as a tensor of the entries' dtype, which half precision would round.
    is_float = entries.dtype in (torch.float32, torch.float64) and entries.device.type == "cpu"
    return is_float and entries.shape[1:] == seconds.shape[1:] and 0 < entries[:1].numel() <= 2**14


def _blend_at_once(entries: Tensor, partners: Sequence[int], lams: Sequence[float], seconds: Tensor) -> Tensor:
    rows = torch.tensor([max(j, 0) for j in partners])
    shares = torch.tensor(
        [0.0 if j < 0 else 1 - lam for j, lam in zip(partners, lams, strict=True)], dtype=entries.dtype
    )
    shares, others = shares.reshape(-1, *[1] * (entries.ndim - 1)), plain(seconds)[rows]
    # As `kernels` does.
    return torch.where(shares == 0.5, (entries + others) * 0.5, torch.lerp(entries, others, shares))


def _order(partners: Sequence[int]) -> list[tuple[int, bool]]:
    """In which order to overwrite entries so that each is read before; where they wait in a circle, which to copy."""
    readers = Counter(partners)
    todo = dict.fromkeys(i for i, j in enumerate(partners) if j >= 0)
    free = [i for i in todo if not readers[i]]
    order = []
    while todo:
        order.append((i := free.pop() if free else next(iter(todo)), readers[i] > 0))
        del todo[i]
        j = partners[i]
        readers[j] -= 1
        if j in todo and not readers[j]:
            free.append(j)
    return order


def _check_levels(fill: float | Sequence[float], image: Tensor) -> tuple[float, ...]:
    values = tuple(fill) if isinstance(fill, Sequence) else (fill,)
    return _check_values(values, image.dtype, image.shape[0])


@lru_cache
def _check_values(values: tuple[float, ...], dtype: torch.dtype, channels: int) -> tuple[float, ...]:
    if dtype == torch.bool or dtype.is_complex:
        raise ValueError(f"images must be integer or floating point to be blended, but are {dtype}.")
    given = values if len(values) > 1 else values[0] if values else ()
    if len(values) not in (1, channels):
        raise ValueError(f"fill must be one number or one for each of {channels} channels, but it is {given}.")
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        if any(not float(value).is_integer() or not info.min <= value <= info.max for value in values):
            raise ValueError(
                f"fill must be a whole number from {info.min} to {info.max} for images of {dtype}, but it is {given}."
            )
    return values
