"""Join the targets of two images: what belongs to each box is kept, and weighted by the share of its image."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

from detmix.mixing.join import BOX_KEYS, is_list, keys_per_box, size_of
from detmix.mixing.merge import Target, merge_batch


def merge_targets(
    first: Target,
    second: Target,
    lam: float,
    canvas_size: tuple[int, int],
    *,
    shares: tuple[float, float] | None = None,
    min_weight: float = 0.0,
    box_keys: Collection[str] = BOX_KEYS,
) -> Target:
    """Join what belongs to each box of two targets and scale the boxes' weights by their image's share.

    ``weights`` of the first are multiplied by ``lam``, those of the second by ``1 - lam``; a target without weights
    weighs every box 1. ``source`` says which image a box came from: 0 for the first, 1 for the second. Boxes and
    keypoints keep their pixel coordinates, the second's boxes are converted to the first's format, masks are padded to
    the canvas. Keys outside ``box_keys`` are the first's, by identity, and so is a value without entries, such as a
    number, whatever its key. A target with no boxes need not have the other's keys.

    Args:
        first: Target with ``boxes`` ``(N1, 4)`` in pixels (or any `tv_tensors.BoundingBoxes`, rotated ones included)
            and per-box keys: tensors, arrays or lists.
        second: Target with the same per-box keys; ``weights`` and ``source`` may be missing on either side.
        lam: The share of ``first``, in [0, 1].
        canvas_size: ``(height, width)`` of the blended image.
        shares: What the weights of the first's and the second's boxes are multiplied by; ``(lam, 1 - lam)`` if
            ``None``.
        min_weight: Boxes that would weigh less are dropped. On CUDA that waits for the device if a target comes with
            weights of its own, or with lists.
        box_keys: The names of the keys that have one entry per box.

    Returns:
        A new target, first's boxes before second's, with float32 ``weights`` ``(N1 + N2,)``, int64 ``source``,
        and ``lam``, ``shares`` and ``canvas``.

    Raises:
        ValueError: if a per-box key is missing on one side, its length is not the number of boxes, or its values cannot
            be one.

    Example:
        >>> first = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([1])}
        >>> second = {"boxes": torch.tensor([[2.0, 1.0, 6.0, 3.0]]), "labels": torch.tensor([2])}
        >>> merged = merge_targets(first, second, 0.75, (8, 8))
        >>> merged["labels"], merged["weights"], merged["source"]
        (tensor([1, 2]), tensor([0.7500, 0.2500]), tensor([0, 1]))
    """
    shares = (lam, 1 - lam) if shares is None else shares
    options: dict[str, Any] = {"min_weight": min_weight, "box_keys": box_keys}
    return merge_batch([first, second], [[0, 1]], [lam], [shares], [canvas_size], **options)[0]


def unmixed_target(
    target: Target, canvas_size: tuple[int, int], *, min_weight: float = 0.0, box_keys: Collection[str] = BOX_KEYS
) -> Target:
    """A copy of a target with the keys that `merge_targets` writes."""
    options: dict[str, Any] = {"min_weight": min_weight, "box_keys": box_keys}
    return merge_batch([target], [[0]], [1.0], [(1.0, 0.0)], [canvas_size], **options)[0]


def annotated(image: Tensor, target: Target) -> Target:
    """A target with boxes: one that holds no entries at all is that of an image without any."""
    if not isinstance(target, Mapping) or "boxes" in target or any(map(_has_content, target.values())):
        return target
    boxes = torch.zeros(0, 4, device=image.device)
    labels = torch.zeros(0, dtype=torch.int64, device=image.device)
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size_of(image))
    return {**target, "boxes": boxes, "labels": labels}


def box_fields(sample: Any, *, box_keys: Collection[str] = BOX_KEYS) -> tuple[Tensor, ...]:
    """What must go when a box goes: the ``labels_getter`` of torchvision's ``SanitizeBoundingBoxes`` after a mix.

    By itself that transform drops rows of ``boxes``, ``labels`` and masks and leaves weights and all else too long.
    Let it be the last one: `tv_tensors.KeyPoints` come out of it as plain tensors. torchvision's transforms do not move
    plain keypoints ``(num_boxes, K, 3)``, nor polygons.

    Args:
        sample: ``(image, target)``, or a target.
        box_keys: The names of the keys that have one entry per box.

    Returns:
        Every per-box tensor but the boxes and the `tv_tensors.Mask` that torchvision finds by itself.

    Raises:
        ValueError: if a per-box value is no tensor, which torchvision could not filter.

    Example:
        >>> from torchvision.transforms import v2
        >>> boxes = tv_tensors.BoundingBoxes([[0, 0, 4, 4], [5, 5, 5, 9]], format="XYXY", canvas_size=(9, 9))
        >>> target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "weights": torch.tensor([0.75, 0.25])}
        >>> _, target = v2.SanitizeBoundingBoxes(labels_getter=box_fields)(torch.zeros(3, 9, 9), target)
        >>> target["labels"], target["weights"]
        (tensor([1]), tensor([0.7500]))
    """
    target = sample if isinstance(sample, Mapping) else sample[1]
    fields = {key: target[key] for key in sorted(keys_per_box(target, box_keys) - {"boxes"})}
    for key, value in fields.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{key!r} must be a tensor to follow its boxes through torchvision's transforms, but it is a "
                f"{type(value).__name__}."
            )
    return tuple(value for value in fields.values() if not isinstance(value, tv_tensors.Mask))


def _has_content(value: Any) -> bool:
    return is_list(value) or isinstance(value, Mapping)  # such as the annotation of an unwrapped VOCDetection
