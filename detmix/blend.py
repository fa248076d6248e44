"""Blend images: ``lam * first + (1 - lam) * second``, pairs on a shared canvas or a whole batch."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from detmix.fields import like


def blend_images(first: Tensor, second: Tensor, lam: float, *, fill: float | Sequence[float] = 0.0) -> Tensor:
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

    Returns:
        The blend, ``(C, max(H1, H2), max(W1, W2))``, in the dtype of the inputs, which are left alone.

    Raises:
        ValueError: if shapes, dtypes or devices do not go together, ``lam`` is outside [0, 1] or ``fill`` does not fit.

    Example:
        >>> first = torch.full((1, 1, 2), 10, dtype=torch.uint8)
        >>> second = torch.full((1, 2, 1), 15, dtype=torch.uint8)
        >>> blend_images(first, second, 0.5)
        tensor([[[12,  5],
                 [ 8,  0]]], dtype=torch.uint8)
    """
    check_lam(lam)
    for name, image in (("first", first), ("second", second)):
        if image.ndim != 3:
            raise ValueError(f"{name} must be an image of shape (C, H, W), but its shape is {tuple(image.shape)}.")
    _check_pair(first, second)
    level = _level(fill, first)
    canvas = _on_canvas(first.as_subclass(Tensor), canvas_size(first, second), level)
    _blend_onto(canvas, second.as_subclass(Tensor), lam, level)
    return like(canvas, first)


def blend_batch(
    images: Tensor,
    partners: Sequence[int],
    lams: Sequence[float],
    *,
    pool: Tensor | Sequence[Tensor] | None = None,
    fill: float | Sequence[float] = 0.0,
    inplace: bool = False,
) -> Tensor:
    """Blend each entry of a batch with another one: ``lams[i] * images[i] + (1 - lams[i]) * images[partners[i]]``.

    Args:
        images: A batch ``(B, ...)`` of any modality, integer or floating point.
        partners: For each entry the index of the other one; -1 leaves the entry as it is.
        lams: The share of each entry in its blend, in [0, 1].
        pool: Where the partners come from, if not from the batch: a tensor ``(M, ...)``, or a sequence of M images that
            are no larger than the batch's.
        fill: The value of a pixel that a smaller image of the pool does not cover; see `blend_images`.
        inplace: Write into ``images``. Beside it, one entry is copied at a time.

    Returns:
        ``(B, ...)`` in the dtype and the memory layout of ``images``: ``images`` itself if ``inplace``, else new.

    Raises:
        ValueError: if lengths, shapes, dtypes or devices do not go together, before anything is written.

    Example:
        >>> blend_batch(torch.tensor([[0.0, 8.0], [4.0, 0.0], [1.0, 1.0]]), [1, 0, -1], [0.75, 0.5, 1.0])
        tensor([[1., 6.],
                [2., 4.],
                [1., 1.]])
    """
    entries = images.as_subclass(Tensor)
    seconds = entries if pool is None else pool
    _check_batch(entries, partners, lams, seconds)
    if not inplace and isinstance(seconds, Tensor) and _are_small(entries, seconds):
        return like(_blend_at_once(entries, partners, lams, seconds), images)
    out = entries if inplace else entries.clone()
    level = _level(fill, entries[0]) if entries.ndim == 4 and len(entries) else entries.new_zeros(())
    aliased = inplace and pool is None
    copied, copy = -1, entries
    for i, is_read_later in _order(partners) if aliased else [(i, False) for i, j in enumerate(partners) if j >= 0]:
        j = partners[i]
        second = copy if j == copied else seconds[j]
        if is_read_later:
            copied, copy = i, entries[i].clone()
        _blend_onto(out[i], second.as_subclass(Tensor), lams[i], level)
    return images if inplace else like(out, images)


def canvas_size(first: Tensor, second: Tensor) -> tuple[int, int]:
    """The (height, width) in pixels of the smallest canvas that holds both images at its top left.

    Example:
        >>> canvas_size(torch.zeros(3, 4, 9), torch.zeros(3, 6, 2))
        (6, 9)
    """
    return max(first.shape[-2], second.shape[-2]), max(first.shape[-1], second.shape[-1])


def check_lam(lam: float) -> None:
    """Raise a ValueError unless lam is a share."""
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is the share of the first image and must lie in [0, 1], but it is {lam}.")


def _check_pair(first: Tensor, second: Tensor, where: str = "first and second") -> None:
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
    for i, (j, lam) in enumerate(zip(partners, lams, strict=True)):
        check_lam(lam)
        if not -1 <= j < len(seconds):
            raise ValueError(f"partner {i} must be -1 or below the {len(seconds)} there are, but it is {j}.")
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
    # One kernel for all costs a copy of the partners, one for each entry its launch: rows of a table want the former.
    # It takes the shares as a tensor of the entries' dtype, which half precision would round.
    dtypes = (torch.float32, torch.float64)
    return entries.shape[1:] == seconds.shape[1:] and 0 < entries[:1].numel() <= 2**14 and entries.dtype in dtypes


def _blend_at_once(entries: Tensor, partners: Sequence[int], lams: Sequence[float], seconds: Tensor) -> Tensor:
    rows = torch.tensor([max(j, 0) for j in partners])
    shares = torch.tensor(
        [0.0 if j < 0 else 1 - lam for j, lam in zip(partners, lams, strict=True)], dtype=entries.dtype
    )
    rows, shares = (values.to(entries.device, non_blocking=True) for values in (rows, shares))
    shares, others = shares.reshape(-1, *[1] * (entries.ndim - 1)), seconds.as_subclass(Tensor)[rows]
    return torch.where(shares == 0.5, (entries + others) * 0.5, torch.lerp(entries, others, shares))  # as _lerp does


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


def _level(fill: float | Sequence[float], image: Tensor) -> Tensor:
    if image.dtype == torch.bool or image.is_complex():
        raise ValueError(f"images must be integer or floating point to be blended, but are {image.dtype}.")
    values = list(fill) if isinstance(fill, Sequence) else [fill]
    if len(values) not in (1, image.shape[0]):
        raise ValueError(f"fill must be one number or one for each of {image.shape[0]} channels, but it is {fill}.")
    if not image.is_floating_point():
        info = torch.iinfo(image.dtype)
        if any(not float(value).is_integer() or not info.min <= value <= info.max for value in values):
            raise ValueError(
                f"fill must be a whole number from {info.min} to {info.max} for images of {image.dtype}, but it is "
                f"{fill}."
            )
    # Made on the device: a tensor of the host's would have to be copied there.
    return torch.cat([image.new_full((1, 1, 1), value) for value in values]).as_subclass(Tensor)


def _on_canvas(image: Tensor, size: tuple[int, int], level: Tensor) -> Tensor:
    if image.shape[-2:] == size:
        return image.clone()
    # The layout of the image: channels last stays so.
    layout = sorted(range(3), key=image.stride, reverse=True)
    canvas = torch.empty_permuted((image.shape[0], *size), layout, dtype=image.dtype, device=image.device)
    for part, value in zip(_parts(canvas, image), (image, level, level), strict=True):
        part.copy_(value)
    return canvas


def _parts(canvas: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What an image at the top left of a canvas covers, what is right of it and what is below both."""
    height, width = image.shape[-2:]
    return canvas[..., :height, :width], canvas[..., :height, width:], canvas[..., height:, :]


def _blend_onto(canvas: Tensor, second: Tensor, lam: float, level: Tensor) -> None:
    if canvas.shape == second.shape:
        return _lerp(canvas, second, 1 - lam)
    for part, value in zip(_parts(canvas, second), (second, level, level), strict=True):
        if part.numel():
            _lerp(part, value, 1 - lam)
    return None


def _lerp(first: Tensor, second: Tensor, share: float) -> None:
    # torch's lerp is exact at 0 and 1, rounds half precision once, and is symmetric in its ends but in their middle.
    if first.is_floating_point() and (share != 0.5 or first.dtype.itemsize == 2):
        first.lerp_(second, share)
    elif first.is_floating_point():
        first.add_(second).mul_(0.5)
    else:
        # float32 holds every level of 8 and 16 bits exactly.
        dtype = torch.float64 if torch.iinfo(first.dtype).bits > 16 else torch.float32
        first.copy_(torch.lerp(first.to(dtype), second.to(dtype), share).round_())
