"""Join the targets of two images: what belongs to each box is kept, and weighted by the share of its image."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

Target = dict[str, Any]


Sample = tuple[Tensor, Target]


Batch = tuple[Tensor | Sequence[Tensor], Sequence[Target]]


BOX_KEYS = frozenset(
    (
        *("boxes", "labels", "weights", "source"),
        *("masks", "keypoints", "area", "iscrowd"),  # what torchvision's detectors and COCO evaluation read
        *("bbox", "category_id", "id", "segmentation", "num_keypoints"),  # COCO's own, by torchvision's CocoDetection
        *("difficult", "truncated", "occluded"),  # VOC's and KITTI's
        *("type", "alpha", "dimensions", "location", "rotation_y"),  # KITTI's
        *("blur", "expression", "illumination", "occlusion", "pose", "invalid"),  # WIDER FACE's
    )
)
"""Target keys that hold one entry per box: joined by a mix. Every other key is the first sample's."""


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
    if labels is not None and count_entries(labels) != shape[0]:
        raise ValueError(
            f"labels of {where} must have one entry for each of the {shape[0]} boxes, but have {count_entries(labels)}."
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


def annotated(image: Tensor, target: Target) -> Target:
    """A target with boxes: one that holds no entries at all is that of an image without any."""
    if not isinstance(target, Mapping) or "boxes" in target or any(map(_has_content, target.values())):
        return target
    boxes = torch.zeros(0, 4, device=image.device)
    labels = torch.zeros(0, dtype=torch.int64, device=image.device)
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size_of(image))
    return {**target, "boxes": boxes, "labels": labels}


def _has_content(value: Any) -> bool:
    return is_list(value) or isinstance(value, Mapping)  # such as the annotation of an unwrapped VOCDetection


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


def keys_per_box(target: Mapping[str, Any], box_keys: Collection[str] = BOX_KEYS) -> set[str]:
    """The keys of a target that have one entry per box: those with entries among ``box_keys``.

    Example:
        >>> sorted(keys_per_box({"boxes": torch.zeros(1, 4), "labels": torch.ones(1), "id": 17, "size": [8, 8]}))
        ['boxes', 'labels']
    """
    return {key for key, value in target.items() if key in box_keys and is_list(value)}


def count_entries(value: Any) -> int | None:
    """How many entries a value has; ``None`` for a number, a string or a tensor without dimensions."""
    if isinstance(value, (Tensor, np.ndarray)):
        shape = value.shape
        return shape[0] if shape else None
    return len(value) if isinstance(value, (list, tuple)) else None


def is_list(value: Any) -> bool:
    """Whether a value has entries at all; what has none belongs to the image."""
    return count_entries(value) is not None


def take(value: Any, rows: Tensor) -> Any:
    """The entries of a per-box value at ``rows`` (int64), as the same type.

    Example:
        >>> take(["a", "b", "c"], torch.tensor([2, 0]))
        ['c', 'a']
    """
    if isinstance(value, Tensor):
        return like(plain(value)[rows], value)
    if isinstance(value, np.ndarray):
        return value[rows.numpy()]
    return [value[row] for row in rows.tolist()]


def scaled_areas(areas: Any, ratios: Tensor) -> Any:
    """Areas, a tensor or a list, times a ratio for each, as the same type and dtype.

    Example:
        >>> scaled_areas([8, 6], torch.tensor([0.5, 2.0]))
        [4, 12]
    """
    values = torch.as_tensor(areas)
    scaled = (values * ratios).to(values.dtype)
    return scaled if isinstance(areas, Tensor) else scaled.tolist()


def like(value: Tensor, template: Tensor, canvas: tuple[int, int] | None = None) -> Tensor:
    """A plain tensor as the type of another, `tv_tensors` included, on a new canvas if there is one."""
    if not isinstance(template, tv_tensors.TVTensor):
        return value
    update = {"canvas_size": canvas} if hasattr(template, "canvas_size") and canvas else {}
    wrapped: Tensor = tv_tensors.wrap(value, like=template, **update)
    return wrapped


def plain(value: Tensor) -> Tensor:
    """A tensor of whatever type as a plain one, which tells its attributes several times as fast as `tv_tensors`."""
    return value if type(value) is Tensor else value.as_subclass(Tensor)


def size_of(image: Tensor) -> tuple[int, int]:
    """``(height, width)`` of an image, or of those of a batch, in pixels."""
    return image.shape[-2], image.shape[-1]
