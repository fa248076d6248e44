"""Checks of targets and batches: an error names the target, the key, what came and what was expected."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

from detmix.mixing.join import entries, plain, size_of


def check_target(
    target: dict[str, Any],
    *,
    where: str,
    image: Tensor | None = None,
    num_classes: int | None = None,
) -> None:
    """Check that a target is one that can be mixed and trained on.

    Values are looked at only where that costs no wait: on a CUDA device the checks stop at shapes and devices.

    Args:
        target: Target with ``boxes`` ``(num_boxes, 4)`` and, optionally, ``labels`` ``(num_boxes,)``.
        where: How the error calls the target, such as ``"target 3"``.
        image: Its image ``(C, H, W)``, whose size masks and `tv_tensors` must have and on whose device boxes and labels
            must be; ``None`` asks for one device for both, whichever it is.
        num_classes: With background as class 0, so labels must lie in 1..num_classes - 1. ``None`` leaves them alone.

    Raises:
        ValueError: naming the target, the key, its value and what was expected.
        TypeError: if the target is no dict or its boxes are no tensor.

    Example:
        >>> import torch
        >>> check_target({"boxes": torch.tensor([[0.0, 0.0, 4.0, float("nan")]])}, where="target 0")
        Traceback (most recent call last):
        ValueError: box 0 of target 0 must be finite, but it is [0.0, 0.0, 4.0, nan].
    """
    readable = _check_form(target, where, image)
    _check_values({} if readable is None else {where: readable}, num_classes)


def check_batch(
    images: Tensor | Sequence[Tensor],
    targets: Sequence[dict[str, Any]],
    num_classes: int | None = None,
    *,
    where: str = "target",
) -> None:
    """Check a whole batch, target by target, with `check_target`.

    Args:
        images: Images ``(B, C, H, W)``, or a sequence of B images ``(C, H_i, W_i)``.
        targets: B targets.
        num_classes: See `check_target`.
        where: How the error calls a target, before its index.

    Raises:
        ValueError: if there are not as many targets as images, an image is not ``(C, H, W)``, and as `check_target`.
        TypeError: if an image is no tensor, and as `check_target`.

    Example:
        >>> import torch
        >>> check_batch([torch.zeros(3, 8, 8)], [])
        Traceback (most recent call last):
        ValueError: images and targets must be of one length, but there are 1 images and 0 targets.
    """
    if len(images) != len(targets):
        raise ValueError(
            f"images and targets must be of one length, but there are {len(images)} images and {len(targets)} targets."
        )
    if isinstance(images, Tensor) and len(images):
        images = [images[0]] * len(images)  # which are all alike, and slow to take apart
    readable = {}
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        name = f"{where} {i}"
        if not isinstance(image, Tensor):
            raise TypeError(f"image of {name} must be a tensor (C, H, W), but it is a {type(image).__name__}.")
        if image.ndim != 3:
            raise ValueError(f"image of {name} must have shape (C, H, W), but has {tuple(image.shape)}.")
        if (values := _check_form(target, name, image)) is not None:
            readable[name] = values
    _check_values(readable, num_classes)


def _check_form(target: dict[str, Any], where: str, image: Tensor | None) -> tuple[Tensor, Any] | None:
    """Check all but values, and give the boxes and labels whose values can be looked at without a wait."""
    if not isinstance(target, dict):
        raise TypeError(f"{where} must be a dict with 'boxes', but it is a {type(target).__name__}.")
    if "boxes" not in target:
        raise ValueError(f"{where} must hold 'boxes', but it holds {sorted(target)}.")
    boxes, labels = target["boxes"], target.get("labels")
    if not isinstance(boxes, Tensor):
        raise TypeError(f"boxes of {where} must be a tensor, but they are a {type(boxes).__name__}.")
    boxes = plain(boxes)
    shape = boxes.shape
    if len(shape) != 2 and shape[:1] != (0,):
        raise ValueError(f"boxes of {where} must have shape (num_boxes, 4), but have {tuple(shape)}.")
    if labels is not None and entries(labels) != shape[0]:
        raise ValueError(
            f"labels of {where} must have one entry for each of the {shape[0]} boxes, but have {entries(labels)}."
        )
    owner, device = ("its boxes", boxes.device) if image is None else ("its image", image.device)
    if boxes.device != device:
        raise ValueError(f"boxes of {where} must be on the device of {owner}, {device}, but are on {boxes.device}.")
    if isinstance(labels, Tensor) and labels.device != device:
        raise ValueError(f"labels of {where} must be on the device of {owner}, {device}, but are on {labels.device}.")
    if image is not None:
        _check_sizes(target, image, where)
    return (boxes, labels) if boxes.is_cpu and shape[0] else None


def _check_sizes(target: dict[str, Any], image: Tensor, where: str) -> None:
    for key, value in target.items():
        if type(value) is Tensor and key != "masks":
            continue
        canvas = getattr(value, "canvas_size", None)
        if (key == "masks" or isinstance(value, tv_tensors.Mask)) and len(value):
            canvas = size_of(value)
        if canvas is not None and tuple(canvas) != size_of(image):
            raise ValueError(f"{key} of {where} are on a canvas of {tuple(canvas)}, but its image is {size_of(image)}.")


def _check_values(readable: Mapping[str, tuple[Tensor, Any]], num_classes: int | None) -> None:
    if not _are_finite([boxes for boxes, _ in readable.values()]):
        for name, (boxes, _) in readable.items():
            for row in (~boxes.isfinite().all(-1)).nonzero()[:1, 0].tolist():
                raise ValueError(f"box {row} of {name} must be finite, but it is {boxes[row].tolist()}.")
    for name, (_, labels) in readable.items():
        if num_classes is None or labels is None or 1 <= labels.amin() <= labels.amax() < num_classes:
            continue
        for row in ((labels < 1) | (labels >= num_classes)).nonzero()[:1, 0].tolist():
            raise ValueError(
                f"label {row} of {name} must be a class from 1 to {num_classes - 1} (0 is background), "
                f"but it is {labels[row].item()}."
            )


def _are_finite(boxes: list[Tensor]) -> bool:
    # What is not finite makes the sum so, and one sum is all that most batches cost; a finite one may overflow.
    if len({rows.shape[1] for rows in boxes}) > 1:  # rotated boxes and upright ones
        return all(_are_finite([rows]) for rows in boxes)
    return not boxes or math.isfinite(torch.cat(boxes).sum().item())
