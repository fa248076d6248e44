"""Time blending two images on a shared canvas, beside a copy of as many bytes, OpenCV's blend and plain numpy."""

import functools

import cv2
import numpy as np
import numpy.typing as npt
import torch

from detmix import functional
from sections import Case, Section
from sections.inputs import Size, blend_plainly, copying, draw_pixels, in_words

Array = npt.NDArray[np.generic]

LAM = 0.4


def blend(
    device: torch.device,
    *,
    dtype: torch.dtype,
    is_hwc: bool = False,
    sizes: tuple[Size, Size] = ((480, 640), (640, 480)),
    channels: int = 3,
) -> Case:
    """Blend two images ``(C, H, W)``; with ``is_hwc`` their memory is that of arrays ``(H, W, C)``.

    The copy moves as many bytes as a blend needs at least: it reads both images and writes the canvas.
    """
    images = [
        draw_pixels(*size, channels, dtype=dtype, device=device).permute(2, 0, 1)
        if is_hwc
        else draw_pixels(channels, *size, dtype=dtype, device=device)
        for size in sizes
    ]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    moved = sum(image.numel() for image in images) + channels * height * width
    runs = {"detmix": functools.partial(functional.blend_images, *images, LAM)}
    runs["copy"] = copying(moved // 2, dtype, device)
    if device.type != "cpu":
        runs["plain float32"] = functools.partial(blend_plainly, *images, LAM)
    else:
        arrays = [image.numpy() for image in images]
        if dtype == torch.uint8:
            first, second = (as_rows(on_canvas(array, (height, width)), is_hwc) for array in arrays)
            runs["addWeighted"] = functools.partial(cv2.addWeighted, first, LAM, second, 1 - LAM, 0)
        runs["numpy float32"] = functools.partial(blend_by_numpy, *arrays)
    pixels = " and ".join(map(in_words, sizes))
    return Case(f"{pixels} on {height} x {width} pixels, {channels} channels; copied {moved // 2:,} values", runs)


def on_canvas(image: Array, size: Size) -> Array:
    """Place an image at the top left of zeros, in its own memory layout."""
    canvas = np.zeros_like(image, shape=(len(image), *size))
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas


def as_rows(image: Array, is_hwc: bool) -> Array:
    """View an array ``(C, H, W)`` as OpenCV takes it without a copy: ``(H, W, C)``, or all channels' rows."""
    return image.transpose(1, 2, 0) if is_hwc else image.reshape(-1, image.shape[2])


def blend_by_numpy(first: Array, second: Array) -> Array:
    """Blend as GluonCV does, in numpy: a float32 canvas of zeros, one image in, the other added, truncated."""
    size = [max(sides) for sides in zip(first.shape, second.shape, strict=True)]
    canvas = np.zeros_like(first, shape=size, dtype=np.float32)
    canvas[:, : first.shape[1], : first.shape[2]] = first.astype(np.float32) * LAM
    canvas[:, : second.shape[1], : second.shape[2]] += second.astype(np.float32) * (1 - LAM)
    return canvas.astype(first.dtype, copy=False)


SECTION = Section(
    {
        "uint8 CHW": functools.partial(blend, dtype=torch.uint8),
        "uint8 HWC": functools.partial(blend, dtype=torch.uint8, is_hwc=True),
        "float32 CHW": functools.partial(blend, dtype=torch.float32),
        "float16 CHW": functools.partial(blend, dtype=torch.float16),
        "same size": functools.partial(blend, dtype=torch.uint8, sizes=((640, 640), (640, 640))),
    }
)
