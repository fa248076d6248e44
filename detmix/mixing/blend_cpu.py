"""Write blends: every pixel once, with the fastest routine for its dtype, memory layout and device."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detmix.mixing.memory import Blend, Layout, Step

Window = tuple[slice, slice]
Routine = Callable[[Sequence[Any], Sequence[Layout], Sequence[float]], None]
"""Write blends of the given layouts, with levels as `write` takes them."""
BLOCK_BYTES = 2**18
"""Block size for each image of a batch. Three blocks fit into the second-level cache of most processors."""


def write(blends: Sequence[Blend], levels: Sequence[float]) -> None:
    """Write blends. None may read what another writes.

    Args:
        blends: Images ``(C, H, W)`` of one dtype on one device, or tensors of any other shape that all three share.
        levels: Value of pixels that an image does not cover: one, or one per channel.
    """
    if not blends:
        return
    out = blends[0].out
    routine = _find_routine(out)
    if routine is not None and not any(_is_tracked(*blend[:3]) for blend in blends):
        found = [(blend, _layout(blend, levels)) for blend in blends]
        if planar := [(blend, layout) for blend, layout in found if layout]:
            routine([blend for blend, _ in planar], [layout for _, layout in planar], levels)
        odd = [blend for blend, layout in found if not layout]
        canvases: dict[Any, Tensor] = {}
        blends = [blend for blend in odd if not _write_reordered(blend, levels, routine, canvases)]
        if not blends:
            return
    # Made on the device, so that nothing is copied from the host.
    level = torch.cat([out.new_full((1, 1, 1), value) for value in levels])
    for blend in blends:
        _write_by_torch(blend, level)


def copy_pixels(image: Tensor, out: Tensor) -> None:
    """Copy an image ``(C, H, W)`` into memory of any layout.

    From uint8 pixels (decoders) to planes (models), OpenCV takes a fifth of torch's time.
    """
    is_split = image.is_cpu and out.is_cpu and image.dtype == out.dtype == torch.uint8 and image.numel()
    if is_split and image.stride()[::2] == (1, image.shape[0]) and out.stride(2) == 1:
        import cv2

        cv2.split(image.permute(1, 2, 0).numpy(), [*out.numpy()])
    else:
        out.copy_(image)


def write_batch(out: Tensor, first: Tensor, second: Tensor, steps: Sequence[Step], levels: Sequence[float]) -> None:
    """Write blends of the images of batches, one after the other. ``out`` may be ``first``, which is then overwritten.

    On the CPU, images of one memory layout are rows of a matrix. Floats are written block by block, each block for all
    images: what one step has just written, the next often reads, and it is still in the cache.

    Args:
        out: Batch ``(B, ...)``.
        first: Batch ``(B, ...)``.
        second: Batch ``(M, ...)``. Its images may be smaller, and it may be ``out``.
        steps: The blends, in order.
        levels: See `write`.
    """
    matrices = _as_rows(out, first, second)
    if matrices and out.dtype == torch.uint8:
        _write_steps([matrix.numpy()[:, None] for matrix in matrices], steps, np.copy, _add_weighted)
    elif matrices:
        for block in zip(*[torch.split(matrix, BLOCK_BYTES // out.itemsize, 1) for matrix in matrices], strict=True):
            _write_steps([rows.unbind() for rows in block], steps, Tensor.clone, _lerp_into)
    elif out is second:
        # Indexed one by one: autograd does not allow writing into the results of one unbind.
        _write_steps([out, first, second], steps, Tensor.clone, lambda *blend: write([Blend(*blend)], levels))
    else:
        write([Blend(out[step.place], first[step.place], second[step.partner], step.lam) for step in steps], levels)


def _write_steps(
    batches: Sequence[Any], steps: Sequence[Step], copy: Callable[..., Any], blend: Callable[..., None]
) -> None:
    out, first, second = batches
    copied, was = -1, None
    for i, j, lam, is_read_later in steps:
        partner = was if j == copied else second[j]
        if is_read_later:
            copied, was = i, copy(first[i])
        blend(out[i], first[i], partner, lam)


def _as_rows(*batches: Tensor) -> list[Tensor] | None:
    """View batches on the CPU as matrices, one row per image; None if images differ in layout or have gaps."""
    out = batches[0]
    is_known = out.is_cpu and (out.is_floating_point() or out.dtype == torch.uint8) and out.ndim > 1
    if not is_known or _is_tracked(*batches) or any(batch.shape[1:] != out.shape[1:] for batch in batches):
        return None
    for moved in (batches, [batch.movedim(1, -1) for batch in batches]):
        if all(batch.is_contiguous() for batch in moved):
            return [batch.flatten(1) for batch in moved]
    return None


def _find_routine(out: Tensor) -> Routine | None:
    """Find a routine that is faster than torch's operations."""
    if out.is_cuda:
        return _find_fused(out.device).get(out.dtype)
    return _write_by_opencv if out.is_cpu and out.dtype == torch.uint8 else None


@cache
def _find_fused(device: torch.device) -> dict[torch.dtype, Routine]:
    """Find the kernel that writes all blends in one launch, for each dtype it knows; none if Triton does not run."""
    if find_spec("triton") is None:
        return {}
    image = torch.zeros(1, 1, 16, dtype=torch.uint8, device=device)
    try:
        from detmix.mixing import blend_triton  # needs Triton, and takes time to import

        blend_triton.write([Blend(image, image, image, 1.0)], ["flat"], [0])
    except Exception as error:  # such as a missing C compiler; torch can blend all the same
        warnings.warn(f"Triton cannot run on {device}, so images are blended by torch, slower: {error}", stacklevel=2)
        return {}
    return dict.fromkeys(blend_triton.DTYPES, blend_triton.write)


def _is_tracked(*tensors: Tensor) -> bool:
    """Tell whether autograd records operations on the tensors."""
    return tensors[0].is_floating_point() and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _layout(blend: Blend, levels: Sequence[float]) -> Layout | None:
    """Find the layout that all three tensors share, rows without gaps; None if they share none."""
    out, first, second, _ = blend
    is_alike = out.shape == first.shape == second.shape and out.stride() == first.stride() == second.stride()
    if is_alike and (out.is_contiguous() or out.movedim(0, -1).is_contiguous()):
        return "flat"
    if out.ndim != 3:
        return None
    strides = {tensor.stride()[::2] for tensor in (out, first, second)}
    if all(column == 1 for _, column in strides):
        return "channels first"
    # A row of pixels has one level only if all channels have the same.
    return "channels last" if len(levels) == 1 and strides == {(1, out.shape[0])} else None


def _write_reordered(blend: Blend, levels: Sequence[float], routine: Routine, canvases: dict[Any, Tensor]) -> bool:
    """Write a blend in the layout of its first image and copy it to that of out. Return False if that cannot help."""
    out, first, second, lam = blend
    like: dict[str, Any] = {"dtype": out.dtype, "device": out.device}
    order = sorted(range(out.ndim), key=first.stride, reverse=True)
    if order not in ([0, 1, 2], [1, 2, 0]):
        return False
    if second.shape != first.shape or second.stride() != first.stride():
        second = torch.empty_permuted(second.shape, order, **like).copy_(second)
    canvas = canvases.get((out.shape, *order))  # shared by all blends that are alike, so that it stays in the cache
    if canvas is None:
        canvas = canvases[out.shape, *order] = torch.empty_permuted(out.shape, order, **like)
    ordered = Blend(canvas, first, second, lam)
    layout = _layout(ordered, levels)
    if layout is None:
        return False
    routine([ordered], [layout], levels)
    copy_pixels(canvas, out)
    return True


def _windows(out: Sequence[int], first: Sequence[int], second: Sequence[int]) -> list[tuple[Window, list[bool]]]:
    """Split a canvas into windows and say which of two images cover each; sizes are (height, width)."""
    rows, columns = sorted({0, out[0], first[0], second[0]}), sorted({0, out[1], first[1], second[1]})
    return [
        ((slice(top, bottom), slice(left, right)), [bottom <= size[0] and right <= size[1] for size in (first, second)])
        for top, bottom in pairwise(rows)
        for left, right in pairwise(columns)
    ]


def _write_by_torch(blend: Blend, level: Tensor) -> None:
    out, first, second, lam = blend
    if out.shape == first.shape == second.shape:
        _lerp(out, first, second, lam)
        return
    for window, (in_first, in_second) in _windows(out.shape[1:], first.shape[1:], second.shape[1:]):
        part = (slice(None), *window)
        if in_first and in_second:
            _lerp(out[part], first[part], second[part], lam)
        elif in_first:
            _lerp(out[part], first[part], level, lam)
        elif in_second:
            _lerp(out[part], second[part], level, 1 - lam)
        else:
            out[part].copy_(level)


def _lerp(out: Tensor, first: Tensor, second: Tensor, share: float) -> None:
    if not out.is_floating_point():
        # float32 holds every level of 8 and 16 bits exactly.
        dtype = torch.float64 if torch.iinfo(out.dtype).bits > 16 else torch.float32
        out.copy_(torch.lerp(first.to(dtype), second.to(dtype), 1 - share).round_())
    elif _is_tracked(out, first, second):
        out.copy_((first + second) * 0.5 if _is_mean(share, out) else torch.lerp(first, second, 1 - share))
    else:
        _lerp_into(out, first, second, share)


def _lerp_into(out: Tensor, first: Tensor, second: Tensor, share: float) -> None:
    if _is_mean(share, out):
        torch.add(first, second, out=out).mul_(0.5)
    else:
        torch.lerp(first, second, 1 - share, out=out)


def _is_mean(share: float, out: Tensor) -> bool:
    # torch's lerp is exact at 0 and 1 and rounds half precision once. Only at 0.5 is it not symmetric.
    return share == 0.5 and out.dtype.itemsize > 2


def _write_by_opencv(blends: Sequence[Blend], layouts: Sequence[Layout], levels: Sequence[float]) -> None:
    """Blend uint8 images on the CPU in one pass, without floats in memory."""
    import cv2

    for blend, layout in zip(blends, layouts, strict=True):
        target, *images, lam = _larger_first(*blend)
        planes = [_planes(tensor, layout) for tensor in (target, *images)]
        if layout == "flat":
            ((out,), (first,), (second,)) = planes
            _add_weighted(out, first, second, lam)
            continue
        windows = _windows(*(plane[0].shape for plane in planes))
        for channel, (out, first, second) in enumerate(zip(*planes, strict=True)):
            level = levels[channel % len(levels)]
            for window, (in_first, in_second) in windows:
                if in_first and in_second:
                    _add_weighted(out[window], first[window], second[window], lam)
                elif in_first:
                    cv2.convertScaleAbs(first[window], out[window], lam, (1 - lam) * level)
                elif in_second:
                    cv2.convertScaleAbs(second[window], out[window], 1 - lam, lam * level)
                else:
                    out[window] = level


def _add_weighted(*blend: Any) -> None:
    import cv2

    out, first, second, lam = _larger_first(*blend)
    cv2.addWeighted(first, lam, second, 1 - lam, 0, dst=out)


def _larger_first(out: Any, first: Any, second: Any, lam: float) -> tuple[Any, Any, Any, float]:
    """Put the larger share first, so that both orders of two images give the same result."""
    return (out, first, second, lam) if lam >= 0.5 else (out, second, first, 1 - lam)


def _planes(tensor: Tensor, layout: Layout) -> list[npt.NDArray[np.uint8]]:
    """View the memory of a tensor as planes of rows."""
    array = tensor.numpy()
    if layout == "channels first":
        return [*array]
    if layout == "channels last":
        channels, height, width = array.shape
        return [array.transpose(1, 2, 0).reshape(height, width * channels)]
    return [(array if tensor.is_contiguous() else array.transpose(*range(1, array.ndim), 0)).reshape(1, -1)]
