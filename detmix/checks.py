"""Checks of samples and batches: an error names the target, the key, what came and what was expected."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_sample(image: Tensor, target: dict[str, Any], *, where: str, num_classes: int | None = None) -> None:
    """Check that a target fits its image and can be trained on.

    Values are looked at only where that costs no wait: on a CUDA device the checks stop at shapes and devices.

    Args:
        image: Image ``(C, H, W)``.
        target: Target with ``boxes`` and, optionally, ``labels`` and ``weights``.
        where: How the error calls the sample, such as ``"target 3"``.
        num_classes: With background as class 0, so labels must lie in 1..num_classes - 1. ``None`` leaves them alone.

    Raises:
        ValueError: naming the sample, the key, its value and what was expected.
        TypeError: if the target is no dict or its boxes are no tensor.

    Example:
        >>> target = {"boxes": torch.tensor([[0.0, 0.0, 4.0, float("nan")]])}
        >>> check_sample(torch.zeros(3, 8, 8), target, where="target 0")
        Traceback (most recent call last):
        ValueError: box 0 of target 0 must be finite, but it is [0.0, 0.0, 4.0, nan].
    """
    if not isinstance(target, dict):
        raise TypeError(f"{where} must be a dict with 'boxes', but it is a {type(target).__name__}.")
    if "boxes" not in target:
        raise ValueError(f"{where} must hold 'boxes', but it holds {sorted(target)}.")
    boxes = target["boxes"]
    if not isinstance(boxes, Tensor):
        raise TypeError(f"boxes of {where} must be a tensor, but they are a {type(boxes).__name__}.")
    for key in ("boxes", "labels", "weights"):
        value = target.get(key)
        if isinstance(value, Tensor) and value.device != image.device:
            raise ValueError(
                f"{key} of {where} must be on the device of its image, {image.device}, but are on {value.device}."
            )
        if value is not None and len(value) != len(boxes):
            raise ValueError(
                f"{key} of {where} must have one entry for each of the {len(boxes)} boxes, but have {len(value)}."
            )
    if len(boxes) and boxes.ndim != 2:
        raise ValueError(f"boxes of {where} must have shape (num_boxes, 4), but have {tuple(boxes.shape)}.")
    if boxes.device.type != "cpu":
        return
    for key, good, expected in (
        ("boxes", boxes.isfinite().all(-1), "finite"),
        *(() if num_classes is None else _label_check(target["labels"], num_classes)),
        *(() if "weights" not in target else _weight_check(target["weights"])),
    ):
        if not good.all():
            row = int((~good).nonzero()[0])
            name = {"boxes": "box", "labels": "label", "weights": "weight"}[key]
            raise ValueError(f"{name} {row} of {where} must be {expected}, but it is {target[key][row].tolist()}.")


def check_batch(
    images: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Any]], num_classes: int | None = None
) -> None:
    """Check a whole batch, sample by sample, with `check_sample`.

    Args:
        images: Images ``(B, C, H, W)``, or a sequence of B images ``(C, H_i, W_i)``.
        targets: B targets.
        num_classes: See `check_sample`.

    Raises:
        ValueError: if there are not as many targets as images, and as `check_sample`.

    Example:
        >>> check_batch([torch.zeros(3, 8, 8)], [])
        Traceback (most recent call last):
        ValueError: images and targets must be of one length, but there are 1 images and 0 targets.
    """
    if len(images) != len(targets):
        raise ValueError(
            f"images and targets must be of one length, but there are {len(images)} images and {len(targets)} targets."
        )
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        check_sample(image, target, where=f"target {i}", num_classes=num_classes)


def _label_check(labels: Tensor, num_classes: int) -> tuple[tuple[str, Tensor, str]]:
    expected = f"a class from 1 to {num_classes - 1} (0 is background)"
    return (("labels", (labels >= 1) & (labels < num_classes), expected),)


def _weight_check(weights: Tensor) -> tuple[tuple[str, Tensor, str]]:
    return (("weights", torch.isfinite(weights) & (weights >= 0), "finite and not negative"),)
