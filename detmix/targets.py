"""Say what a target is: its keys, its types and how it is checked.

A target is a dict of what is annotated in one image, as torchvision's detectors take it, or any other mapping, such as
the ``BatchFeature`` of transformers. Some keys hold one entry per box. ``target["weights"]`` is one of them: float32
``(num_boxes,)``, how much the loss of each box counts. Mixing writes it and the losses read it. This module is all that
the two share.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

Target = dict[str, Any]
"""What is annotated in one image, by key."""
Sample = tuple[Tensor, Target]
"""An image ``(C, H, W)`` and its target."""
Batch = tuple[Tensor | Sequence[Tensor], Sequence[Target]]
"""Images, ``(B, C, H, W)`` or a sequence of ``(C, H_i, W_i)``, and as many targets."""

BOX_KEYS = frozenset(
    (
        *("boxes", "labels", "class_labels", "weights", "source"),  # class_labels: those of transformers
        *("masks", "keypoints", "area", "iscrowd"),  # what torchvision's detectors and COCO evaluation read
        *("bbox", "category_id", "id", "segmentation", "num_keypoints"),  # COCO's own, by torchvision's CocoDetection
        *("difficult", "truncated", "occluded"),  # VOC's and KITTI's
        *("type", "alpha", "dimensions", "location", "rotation_y"),  # KITTI's
        *("blur", "expression", "illumination", "occlusion", "pose", "invalid"),  # WIDER FACE's
    )
)
"""Target keys that hold one entry per box. A mix joins them and takes every other key from the first sample."""


def check_target(
    target: Mapping[str, Any],
    *,
    where: str,
    image: Tensor | None = None,
    num_classes: int | None = None,
    first_class: int | None = 1,
) -> None:
    """Check that a target can be mixed and trained on.

    On a CUDA device this checks shapes and devices only. Reading values there would make Python wait for the GPU.

    Args:
        target: Target with ``boxes`` ``(num_boxes, 4)`` and, optionally, ``labels`` ``(num_boxes,)``.
        where: Name of the target in error messages, such as ``"target 3"``.
        image: Image ``(C, H, W)`` of the target. Masks and `tv_tensors` must have its size; boxes and labels must be on
            its device. With ``None``, boxes and labels must be on one device.
        num_classes: Number of classes. Labels must lie in first_class..num_classes - 1. ``None`` accepts any labels.
        first_class: Lowest label: 1 where class 0 is the background; ``None`` if any lower label is accepted.

    Raises:
        ValueError: If a value does not fit. The message names the target, the key, the value and what was expected.
        TypeError: If the target is not a mapping or its boxes are not a tensor.

    Example:
        >>> import torch
        >>> check_target({"boxes": torch.tensor([[0.0, 0.0, 4.0, float("nan")]])}, where="target 0")
        Traceback (most recent call last):
        ValueError: box 0 of target 0 must be finite, but it is [0.0, 0.0, 4.0, nan].
    """
    readable = _check_form(target, where, image)
    _check_values({} if readable is None else {where: readable}, num_classes, first_class)


def check_batch(
    images: Tensor | Sequence[Tensor],
    targets: Sequence[Mapping[str, Any]],
    num_classes: int | None = None,
    *,
    where: str = "target",
) -> None:
    """Check a whole batch, target by target, with `check_target`.

    Args:
        images: Images ``(B, C, H, W)``, or a sequence of B images ``(C, H_i, W_i)``.
        targets: B targets.
        num_classes: See `check_target`.
        where: Name of a target in error messages. Its index follows.

    Raises:
        ValueError: If there are not as many targets as images, an image is not ``(C, H, W)``, or as `check_target`.
        TypeError: If an image is not a tensor, or as `check_target`.

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
        images = [images[0]] * len(images)  # all alike, and slow to take apart
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


def _check_form(target: Mapping[str, Any], where: str, image: Tensor | None) -> tuple[Tensor, Any] | None:
    """Check everything but values. Return the boxes and labels whose values can be read without waiting for a GPU."""
    if not isinstance(target, Mapping):
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
    for key in ("labels", "class_labels"):
        given = target.get(key)
        if given is not None and count_entries(given) != shape[0]:
            raise ValueError(
                f"{key} of {where} must have one entry for each of the {shape[0]} boxes, but have "
                f"{count_entries(given)}."
            )
    owner, device = ("its boxes", boxes.device) if image is None else ("its image", image.device)
    if boxes.device != device:
        raise ValueError(f"boxes of {where} must be on the device of {owner}, {device}, but are on {boxes.device}.")
    if isinstance(labels, Tensor) and labels.device != device:
        raise ValueError(f"labels of {where} must be on the device of {owner}, {device}, but are on {labels.device}.")
    if image is not None:
        _check_sizes(target, image, where)
    return (boxes, labels) if boxes.is_cpu and shape[0] else None


def _check_sizes(target: Mapping[str, Any], image: Tensor, where: str) -> None:
    for key, value in target.items():
        if type(value) is Tensor and key != "masks":
            continue
        canvas = getattr(value, "canvas_size", None)
        if (key == "masks" or isinstance(value, tv_tensors.Mask)) and len(value):
            canvas = size_of(value)
        if canvas is not None and tuple(canvas) != size_of(image):
            raise ValueError(f"{key} of {where} are on a canvas of {tuple(canvas)}, but its image is {size_of(image)}.")


def _check_values(
    readable: Mapping[str, tuple[Tensor, Any]], num_classes: int | None, first_class: int | None = 1
) -> None:
    if not _are_finite([boxes for boxes, _ in readable.values()]):
        for name, (boxes, _) in readable.items():
            for row in (~boxes.isfinite().all(-1)).nonzero()[:1, 0].tolist():
                raise ValueError(f"box {row} of {name} must be finite, but it is {boxes[row].tolist()}.")
    lowest = -math.inf if first_class is None else first_class
    for name, (_, labels) in readable.items():
        if (
            num_classes is None
            or not isinstance(labels, Tensor)
            or lowest <= labels.amin() <= labels.amax() < num_classes
        ):
            continue
        for row in ((labels < lowest) | (labels >= num_classes)).nonzero()[:1, 0].tolist():
            first = "" if first_class is None else f"from {first_class} "
            raise ValueError(
                f"label {row} of {name} must be a class {first}to {num_classes - 1}"
                f"{' (0 is background)' if first_class == 1 else ''}, but it is {labels[row].item()}."
            )


def _are_finite(boxes: list[Tensor]) -> bool:
    # A sum with NaN or infinity is not finite, so most batches take one sum. The sum of finite numbers may overflow.
    if len({rows.shape[1] for rows in boxes}) > 1:  # rotated boxes and upright ones
        return all(_are_finite([rows]) for rows in boxes)
    return not boxes or math.isfinite(torch.cat(boxes).sum().item())


def annotated(image: Tensor, target: Any) -> Any:
    """Add empty boxes and labels to a target without annotations, and return any other target as it is."""
    if not isinstance(target, Mapping) or "boxes" in target or any(map(_has_content, target.values())):
        return target
    boxes = torch.zeros(0, 4, device=image.device)
    labels = torch.zeros(0, dtype=torch.int64, device=image.device)
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size_of(image))
    return {**target, "boxes": boxes, "labels": labels}


def _has_content(value: Any) -> bool:
    return is_list(value) or isinstance(value, Mapping)  # such as the annotation of an unwrapped VOCDetection


def box_fields(sample: Any, *, box_keys: Collection[str] = BOX_KEYS) -> tuple[Tensor, ...]:
    """List what must be dropped with a box: use it as ``labels_getter`` of torchvision's ``SanitizeBoundingBoxes``.

    Without it that transform drops rows of ``boxes``, ``labels`` and masks only, and leaves weights too long. Put it
    last: it turns `tv_tensors.KeyPoints` into plain tensors. torchvision's transforms do not move plain keypoints
    ``(num_boxes, K, 3)`` or polygons.

    Args:
        sample: ``(image, target)``, or a target.
        box_keys: Keys that hold one entry per box.

    Returns:
        Every per-box tensor except the boxes and any `tv_tensors.Mask`, which torchvision finds itself.

    Raises:
        ValueError: If a per-box value is not a tensor. torchvision cannot filter it.

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
    """Return the keys of a target that hold one entry per box: those of ``box_keys`` whose value has entries.

    Example:
        >>> sorted(keys_per_box({"boxes": torch.zeros(1, 4), "labels": torch.ones(1), "id": 17, "size": [8, 8]}))
        ['boxes', 'labels']
    """
    return {key for key, value in target.items() if key in box_keys and is_list(value)}


def count_entries(value: Any) -> int | None:
    """Count the entries of a value. Return ``None`` for a number, a string or a tensor without dimensions."""
    if isinstance(value, (Tensor, np.ndarray)):
        shape = value.shape
        return shape[0] if shape else None
    return len(value) if isinstance(value, (list, tuple)) else None


def is_list(value: Any) -> bool:
    """Tell whether a value has entries. One without belongs to the image, not to its boxes."""
    return count_entries(value) is not None


def take(value: Any, rows: Tensor) -> Any:
    """Take the entries of a per-box value at ``rows`` (int64), as the same type.

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
    """Multiply areas, a tensor or a list, by one ratio each. Return the same type and dtype.

    Example:
        >>> scaled_areas([8, 6], torch.tensor([0.5, 2.0]))
        [4, 12]
    """
    values = torch.as_tensor(areas)
    scaled = (values * ratios).to(values.dtype)
    return scaled if isinstance(areas, Tensor) else scaled.tolist()


def like(value: Tensor, template: Tensor, canvas: tuple[int, int] | None = None) -> Tensor:
    """Wrap a plain tensor as the type of ``template``, such as a `tv_tensors` class, with a new canvas if given."""
    if not isinstance(template, tv_tensors.TVTensor):
        return value
    update = {"canvas_size": canvas} if hasattr(template, "canvas_size") and canvas else {}
    wrapped: Tensor = tv_tensors.wrap(value, like=template, **update)
    return wrapped


def plain(value: Tensor) -> Tensor:
    """View a tensor of any class as a plain one. Reading its attributes is then several times as fast."""
    return value if type(value) is Tensor else value.as_subclass(Tensor)


def size_of(image: Tensor) -> tuple[int, int]:
    """Return ``(height, width)`` of an image or a batch, in pixels."""
    return image.shape[-2], image.shape[-1]
