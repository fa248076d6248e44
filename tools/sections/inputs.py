"""Make the inputs of several sections: random images and targets, and copies to compare with."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Size = tuple[int, int]
Target = dict[str, Any]

CLASSES = 91


def draw_pixels(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw random values: in [0, 1) if floating point, else of all levels."""
    if dtype.is_floating_point:
        return torch.rand(shape, device=device).to(dtype)
    return torch.randint(torch.iinfo(dtype).max + 1, shape, dtype=dtype, device=device)


def draw_targets(sizes: Sequence[Size], boxes: int, device: torch.device) -> list[Target]:
    """Draw a target with torchvision's keys for each image size, height and width."""
    targets = []
    for size in sizes:
        corners = draw_boxes(boxes, size, device)
        width, height = (corners[:, 2:] - corners[:, :2]).unbind(1)
        labels = torch.randint(1, CLASSES, (boxes,), device=device)
        targets.append({"boxes": corners, "labels": labels, "area": width * height})
    return targets


def draw_boxes(count: int, size: Size, device: torch.device) -> Tensor:
    """Draw boxes in an image of a height and a width; each side is 5 to 30 % of the image's."""
    height, width = size
    corners = torch.rand(count, 2, device=device) * 0.7
    sides = torch.rand(count, 2, device=device) * 0.25 + 0.05
    return torch.cat([corners, corners + sides], 1) * torch.tensor([width, height] * 2, device=device)


def copying(count: int, dtype: torch.dtype, device: torch.device) -> functools.partial[Tensor]:
    """Return a function that copies a number of values into allocated memory, so it reads and writes as many bytes.

    A pass that reads two images and writes one canvas moves as many bytes as the copy of half their sum.
    """
    source, out = (torch.ones(count, dtype=dtype, device=device) for _ in range(2))
    return functools.partial(Tensor.copy_, out, source)


def blend_plainly(first: Tensor, second: Tensor, lam: float) -> Tensor:
    """Blend in four plain lines of float32, as most code does: zeros, one image in, the other added, rounded."""
    size = [max(sides) for sides in zip(first.shape, second.shape, strict=True)]
    canvas = torch.zeros(size, device=first.device)
    for image, share in ((first, lam), (second, 1 - lam)):
        canvas[:, : image.shape[1], : image.shape[2]] += image.float() * share
    return (canvas if first.is_floating_point() else canvas.round_()).to(first.dtype)


def in_words(size: Sequence[int]) -> str:
    """Return the sides in words, as in 480 x 640."""
    return " x ".join(map(str, size))
