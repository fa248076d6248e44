"""Blend images: ``lam * first + (1 - lam) * second``, in pairs on a shared canvas or as a whole batch."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from detmix.mixing.blend_cpu import copy_pixels, write, write_batch
from detmix.mixing.memory import Blend, Step, canvas_size, check_is_apart, check_out, copy_if_written, make_canvas
from detmix.mixing.plan import Mix, check_lam, check_plan
from detmix.targets import like, plain


def blend_images(
    first: Tensor, second: Tensor, lam: float, *, fill: float | Sequence[float] = 0.0, out: Tensor | None = None
) -> Tensor:
    """Blend two images on a canvas that holds both: ``lam * first + (1 - lam) * second``.

    The canvas has the larger height and the larger width of the two. Both images lie at its top left. Where only one
    of them covers the canvas, ``fill`` takes the share of the other. Integer images are rounded to the nearest level,
    not truncated; half precision is rounded once. ``blend_images(second, first, 1 - lam)`` gives the same image.

    Args:
        first: Image ``(C, H1, W1)``, integer or floating point. The result has its type, such as `tv_tensors.Image`,
            and its memory layout.
        second: Image ``(C, H2, W2)`` of the same dtype and device.
        lam: Share of ``first``, in [0, 1].
        fill: Value of pixels that an image does not cover, in the image's own units: one number, or one per channel. 0
            is black before normalisation, and the mean colour after it.
        out: Tensor to write the blend into. It must not share memory with the images. ``None`` allocates one.

    Returns:
        The blend, ``(C, max(H1, H2), max(W1, W2))``, in the dtype of the images. It is ``out`` if that is given. The
        images do not change.

    Raises:
        ValueError: If shapes, dtypes or devices differ, ``lam`` is outside [0, 1] or ``fill`` does not fit.

    Example:
        >>> first = torch.full((1, 1, 2), 10, dtype=torch.uint8)
        >>> second = torch.full((1, 2, 1), 15, dtype=torch.uint8)
        >>> blend_images(first, second, 0.5)
        tensor([[[12,  5],
                 [ 8,  0]]], dtype=torch.uint8)
    """
    check_lam(lam)
    blend, levels = _prepare(first, second, lam, fill, out)
    if out is not None:
        check_is_apart([out], [first, second])
    write([blend], levels)
    return like(blend.out, first) if out is None else out


def blend_batch(
    images: Tensor,
    plan: Sequence[Mix],
    *,
    pool: Tensor | Sequence[Tensor] | None = None,
    fill: float | Sequence[float] = 0.0,
    inplace: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Blend each image of a batch with its partner: ``lam * images[i] + (1 - lam) * images[partner]``.

    Args:
        images: Batch ``(B, ...)`` of any modality, integer or floating point.
        plan: B mixes. Their ``partner`` and ``lam`` are used; a partner of -1 leaves the image unmixed.
        pool: Where the partners come from, if not from the batch: a tensor ``(M, ...)``, or a sequence of M images no
            larger than the batch's.
        fill: Value of pixels that a smaller image of the pool does not cover; see `blend_images`.
        inplace: Write into ``images``. At most one image is copied at a time.
        out: Tensor ``(B, ...)`` to write into. It must not share memory with what is blended. Reuse one in a loop:
            fresh memory costs more time than the arithmetic.

    Returns:
        ``(B, ...)`` in the dtype and memory layout of ``images``: ``images`` itself if ``inplace``, ``out`` if given,
        otherwise a new tensor.

    Raises:
        ValueError: If lengths, shapes, dtypes or devices do not fit. Nothing is written then.

    Example:
        >>> plan = [Mix(partner=1, lam=0.75), Mix(partner=0, lam=0.5), Mix()]
        >>> blend_batch(torch.tensor([[0.0, 8.0], [4.0, 0.0], [1.0, 1.0]]), plan)
        tensor([[1., 6.],
                [2., 4.],
                [1., 1.]])
    """
    check_plan(plan, len(images), len(images if pool is None else pool))
    return blend_by_plan(images, plan, pool=pool, fill=fill, inplace=inplace, out=out)


def blend_by_plan(
    images: Tensor,
    plan: Sequence[Mix],
    *,
    pool: Tensor | Sequence[Tensor] | None = None,
    fill: float | Sequence[float] = 0.0,
    inplace: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Blend a batch as `blend_batch` does, by a plan that is checked already."""
    batch = plain(images)
    seconds = batch if pool is None else plain(pool) if isinstance(pool, Tensor) else pool
    _check_partners(batch, plan, seconds)
    if out is not None:
        if inplace:
            raise ValueError("out must be None if the blends are written into images, inplace=True.")
        check_out(out, batch, batch.shape)
        check_is_apart([out], [batch, *([pool] if isinstance(pool, Tensor) else pool or [])])
    levels = _check_levels(fill, batch[0]) if batch.ndim == 4 and len(batch) else (0.0,)
    if not inplace and isinstance(seconds, Tensor) and _are_small(batch, seconds):
        blended = _blend_at_once(batch, plan, seconds)
        return like(blended, images) if out is None else out.copy_(blended)
    target = batch if inplace else make_canvas(batch, batch.shape) if out is None else plain(out)
    mixed = [(i, False) for i, mix in enumerate(plan) if mix.partner >= 0]
    order = _order([mix.partner for mix in plan]) if inplace and pool is None else mixed
    if isinstance(seconds, Tensor):
        if inplace and pool is not None:
            seconds = copy_if_written(seconds, batch)
        steps = [Step(i, plan[i].partner, plan[i].lam, is_read) for i, is_read in order]
        write_batch(target, batch, seconds, steps, levels)
    else:
        others = [plain(seconds[plan[i].partner]) for i, _ in order]
        if inplace:
            others = [copy_if_written(other, batch) for other in others]
        write(
            [Blend(target[i], batch[i], other, plan[i].lam) for (i, _), other in zip(order, others, strict=True)],
            levels,
        )
    if not inplace:
        for i, mix in enumerate(plan):
            if mix.partner < 0:
                target[i].copy_(batch[i])
    return images if inplace else like(target, images) if out is None else out


def blend_pairs(
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor | None],
    plan: Sequence[Mix],
    *,
    fill: float | Sequence[float] = 0.0,
    outs: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Blend images of any sizes, pair by pair, as `blend_images` does. Copy an image without a second.

    On a CUDA device all are blended in one launch.

    Args:
        firsts: Images ``(C, H_i, W_i)``.
        seconds: The partner of each, or ``None``.
        plan: One mix for each pair, checked already. Its ``lam`` is the share of the first image.
        fill: See `blend_images`.
        outs: Tensors to write each blend into; see `blend_images`.

    Returns:
        The blends, each ``(C, max(H1, H2), max(W1, W2))``.

    Raises:
        ValueError: As `blend_images`. Nothing is written then.

    Example:
        >>> small, wide = torch.ones(1, 1, 1), torch.zeros(1, 1, 2)
        >>> blend_pairs([small, wide], [wide, None], [Mix(partner=1, lam=0.75), Mix()])
        [tensor([[[0.7500, 0.0000]]]), tensor([[[0., 0.]]])]
    """
    prepared = [
        _prepare(first, first if second is None else second, mix.lam, fill, None if outs is None else outs[i])
        for i, (first, second, mix) in enumerate(zip(firsts, seconds, plan, strict=True))
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


def _prepare(
    first: Tensor, second: Tensor, lam: float, fill: float | Sequence[float], out: Tensor | None
) -> tuple[Blend, tuple[float, ...]]:
    """Check a pair, find a canvas to write it on, and the levels of pixels that are not covered."""
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


def _check_partners(batch: Tensor, plan: Sequence[Mix], seconds: Tensor | Sequence[Tensor]) -> None:
    """Check that the partners which are used can be blended with the images of a batch."""
    used = sorted({mix.partner for mix in plan if mix.partner >= 0})
    for j in used[:1] if isinstance(seconds, Tensor) else used:  # those of a tensor are all alike
        first, second = batch[0], seconds[j]
        if first.ndim == 3 and second.ndim == 3:
            if second.shape[-2] > first.shape[-2] or second.shape[-1] > first.shape[-1]:
                raise ValueError(
                    f"image {j} of the pool must be no larger than those of the batch tensor, {tuple(first.shape)}, "
                    f"but is {tuple(second.shape)}: resize it, or give the batch as a list of images."
                )
            _check_pair(first, second, f"the images of the batch and their partner {j}")
        elif first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
            raise ValueError(
                f"the images of the batch and their partner {j} must agree in shape, dtype and device, but are "
                f"{tuple(first.shape)} {first.dtype} {first.device} and {tuple(second.shape)} {second.dtype} "
                f"{second.device}."
            )


def _are_small(batch: Tensor, seconds: Tensor) -> bool:
    # Small entries, such as rows of a table, are faster in one operation, although that copies the partners. It takes
    # the shares as a tensor of the batch's dtype, which half precision would round.
    is_float = batch.dtype in (torch.float32, torch.float64) and batch.device.type == "cpu"
    return is_float and batch.shape[1:] == seconds.shape[1:] and 0 < batch[:1].numel() <= 2**14


def _blend_at_once(batch: Tensor, plan: Sequence[Mix], seconds: Tensor) -> Tensor:
    rows = torch.tensor([max(mix.partner, 0) for mix in plan])
    shares = torch.tensor([0.0 if mix.partner < 0 else 1 - mix.lam for mix in plan], dtype=batch.dtype)
    shares, others = shares.reshape(-1, *[1] * (batch.ndim - 1)), plain(seconds)[rows]
    # The arithmetic of `detmix.mixing.blend_cpu`.
    return torch.where(shares == 0.5, (batch + others) * 0.5, torch.lerp(batch, others, shares))


def _order(partners: Sequence[int]) -> list[tuple[int, bool]]:
    """Order images so that each is read before it is overwritten. In a circle of partners, mark the one to copy."""
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
