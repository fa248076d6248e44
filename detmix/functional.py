"""Blend two images and their targets on a shared canvas: pure functions of (first, second, lam).

Mixup for object detection as in the Bag of Freebies [arXiv:1902.04103, sec. 3.1]: the images are not resized but laid
on one canvas, both at its top left, so every box keeps its pixel coordinates, and every box is kept with a weight.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from detmix.checks import check_target

Target = dict[str, Any]
Sample = tuple[Tensor, Target]

BOX_KEYS = frozenset(
    (
        *("boxes", "labels", "weights", "masks", "keypoints", "area", "iscrowd", "source"),  # torchvision's and our own
        *(
            "bbox",
            "category_id",
            "id",
            "segmentation",
            "num_keypoints",
        ),  # COCO's, as torchvision's wrapper hands them on
        *("difficult", "truncated", "occluded"),  # VOC's and KITTI's
    )
)
"""Target keys that hold one entry per box: joined by a mix. Every other key is the first sample's."""


def blend_images(first: Tensor, second: Tensor, lam: float, *, fill: float | Sequence[float] = 0.0) -> Tensor:
    """Blend two images on a canvas that holds both: ``lam * first + (1 - lam) * second``.

    The canvas has the larger height and the larger width of the two; both lie at its top left. Where only one image
    covers the canvas, the other's share is ``fill``. Integer images are rounded to the nearest level, not truncated.

    Args:
        first: Image ``(C, H1, W1)``, integer or floating point. Its type (`tv_tensors.Image`, say) is the result's.
        second: Image ``(C, H2, W2)`` of the same dtype and device.
        lam: The share of ``first``, in [0, 1].
        fill: The value of a pixel that an image does not cover, in the image's own units: one number, or one a channel.
            0 is black before normalisation, and the mean colour after it.

    Returns:
        The blend, ``(C, max(H1, H2), max(W1, W2))``, in the dtype of the inputs, which are left alone.

    Raises:
        ValueError: if shapes, dtypes or devices do not go together or ``lam`` is outside [0, 1].

    Example:
        >>> first = torch.full((1, 1, 2), 10, dtype=torch.uint8)
        >>> second = torch.full((1, 2, 1), 15, dtype=torch.uint8)
        >>> blend_images(first, second, 0.5)
        tensor([[[12,  5],
                 [ 8,  0]]], dtype=torch.uint8)
    """
    _check_lam(lam)
    for name, image in (("first", first), ("second", second)):
        if image.ndim != 3:
            raise ValueError(f"{name} must be an image of shape (C, H, W), but its shape is {tuple(image.shape)}.")
    for what, one, other in (
        ("channels", first.shape[0], second.shape[0]),
        ("dtype", first.dtype, second.dtype),
        ("device", first.device, second.device),
    ):
        if one != other:
            raise ValueError(f"first and second must agree in {what}, but first has {one} and second has {other}.")
    size = canvas_size(first, second)
    # Half precision and integers are blended in float32, so that the only rounding is the last one.
    dtype = torch.promote_types(first.dtype, torch.float32)
    level = torch.tensor(fill, dtype=dtype).reshape(-1, 1, 1).to(first.device, non_blocking=True)
    canvas = level.expand(first.shape[0], *size).clone()
    for image, share in ((first, lam), (second, 1 - lam)):
        covered = canvas[:, : image.shape[1], : image.shape[2]]
        covered.add_(image.as_subclass(Tensor) if fill == 0 else image.as_subclass(Tensor) - level, alpha=share)
    if not first.is_floating_point():
        canvas.round_()
    return _like(canvas.to(first.dtype), first)


def merge_targets(
    first: Target, second: Target, lam: float, canvas_size: tuple[int, int], *, box_keys: Iterable[str] = BOX_KEYS
) -> Target:
    """Join what belongs to each box of two targets and scale the boxes' weights by their image's share.

    ``weights`` of the first are multiplied by ``lam``, those of the second by ``1 - lam``; a target without weights
    weighs every box 1. ``source`` says which image a box came from: 0 for the first, 1 for the second. Boxes and
    keypoints keep their pixel coordinates, the second's boxes are converted to the first's format, masks are padded to
    the canvas. Keys outside ``box_keys`` are the first's, by identity.

    Args:
        first: Target with ``boxes`` ``(N1, 4)`` in pixels (or any `tv_tensors.BoundingBoxes`) and per-box keys.
        second: Target with the same per-box keys; ``weights`` and ``source`` may be missing on either side.
        lam: The share of ``first``, in [0, 1].
        canvas_size: ``(height, width)`` of the blended image.
        box_keys: The names of the keys that have one entry per box.

    Returns:
        A new target, first's boxes before second's, with float32 ``weights`` ``(N1 + N2,)`` and ``lam``.

    Raises:
        ValueError: if a per-box key is missing on one side or its length is not the number of boxes.

    Example:
        >>> first = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([1])}
        >>> second = {"boxes": torch.tensor([[2.0, 1.0, 6.0, 3.0]]), "labels": torch.tensor([2])}
        >>> merged = merge_targets(first, second, 0.75, (8, 8))
        >>> merged["labels"], merged["weights"], merged["source"]
        (tensor([1, 2]), tensor([0.7500, 0.2500]), tensor([0, 1]))
    """
    _check_lam(lam)
    box_keys = frozenset(box_keys)
    pair = [
        _with_weights(target, share, source) for source, (target, share) in enumerate(((first, lam), (second, 1 - lam)))
    ]
    lengths = [len(target["boxes"]) for target in pair]
    merged = dict(pair[0])
    for key in sorted(box_keys & (pair[0].keys() | pair[1].keys())):
        for name, target, length in zip(("first", "second"), pair, lengths, strict=True):
            if key not in target:
                raise ValueError(
                    f"{key!r} has one entry per box, but the {name} target has none; it has {sorted(target)}."
                )
            if len(target[key]) != length:
                raise ValueError(f"{key!r} of the {name} target has {len(target[key])} entries for {length} boxes.")
        merged[key] = _join(key, pair[0][key], pair[1][key], canvas_size)
    for key in pair[0].keys() & pair[1].keys() - box_keys:
        _check_is_per_image(key, pair, lengths)
    return merged | {"lam": lam}


def mixup(
    first: Sample,
    second: Sample,
    lam: float,
    *,
    fill: float | Sequence[float] = 0.0,
    box_keys: Iterable[str] = BOX_KEYS,
) -> Sample:
    """Mix two samples: `blend_images` of the images and `merge_targets` of the targets.

    Args:
        first: ``(image, target)``.
        second: ``(image, target)``.
        lam: The share of ``first``, in [0, 1].
        fill: See `blend_images`.
        box_keys: See `merge_targets`.

    Returns:
        The mixed ``(image, target)``; the inputs are left alone.

    Raises:
        ValueError: as its two parts, and where a target does not fit its image.

    Example:
        >>> target = {"boxes": torch.tensor([[0.0, 0.0, 2.0, 2.0]]), "labels": torch.tensor([1])}
        >>> image, mixed = mixup((torch.ones(3, 4, 4), target), (torch.zeros(3, 2, 6), target), 0.75)
        >>> image.shape, mixed["weights"]
        (torch.Size([3, 4, 6]), tensor([0.7500, 0.2500]))
    """
    for name, (image, target) in (("the first sample", first), ("the second sample", second)):
        check_target(target, where=name, device=image.device)
    mixed = blend_images(first[0], second[0], lam, fill=fill)
    return mixed, merge_targets(first[1], second[1], lam, canvas_size(first[0], second[0]), box_keys=box_keys)


def unmixed(sample: Sample, *, box_keys: Iterable[str] = BOX_KEYS) -> Sample:
    """A copy of a sample with the keys a mixed one has: its weights or 1, source 0, lam 1.

    Args:
        sample: ``(image, target)``.
        box_keys: See `merge_targets`.

    Example:
        >>> _, target = unmixed((torch.zeros(3, 4, 4), {"boxes": torch.zeros(1, 4)}))
        >>> target["weights"], target["source"], target["lam"]
        (tensor([1.]), tensor([0]), 1.0)
    """
    image, target = sample
    joined = frozenset(box_keys)
    target = {k: v.clone() if k in joined and isinstance(v, Tensor) else v for k, v in target.items()}
    return image.clone(), _with_weights(target, 1.0, 0) | {"lam": 1.0}


def canvas_size(first: Tensor, second: Tensor) -> tuple[int, int]:
    """The (height, width) of the smallest canvas that holds both images at its top left."""
    return max(first.shape[-2], second.shape[-2]), max(first.shape[-1], second.shape[-1])


def _check_lam(lam: float) -> None:
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is the share of the first image and must lie in [0, 1], but it is {lam}.")


def _with_weights(target: Target, share: float, source: int) -> Target:
    boxes = target["boxes"]
    weights = target.get("weights")
    if weights is None:
        weights = torch.ones(len(boxes), device=boxes.device)
    return {
        **target,
        "weights": weights.to(torch.float32) * share,
        "source": torch.full((len(boxes),), source, device=boxes.device),
    }


def _join(key: str, first: Any, second: Any, canvas: tuple[int, int]) -> Any:
    if not isinstance(first, Tensor):
        return [*first, *second]
    if isinstance(first, tv_tensors.BoundingBoxes) != isinstance(second, tv_tensors.BoundingBoxes):
        types = f"{type(first).__name__} in the first target and {type(second).__name__} in the second"
        raise ValueError(
            f"{key!r} must be of one type, since a plain tensor does not say its box format, but is {types}."
        )
    if isinstance(first, tv_tensors.BoundingBoxes) and first.format != second.format:
        second = TF.convert_bounding_box_format(second, new_format=first.format)
    is_mask = key == "masks" or isinstance(first, tv_tensors.Mask)
    pair = [(_pad(part, canvas) if is_mask else part).as_subclass(Tensor) for part in (first, second)]
    # An empty tensor is often made without thought, torch.tensor([]): it must not decide dtype or shape.
    parts = [part for part in pair if len(part)] or pair[:1]
    return _like(torch.cat(parts), first, canvas)


def _pad(masks: Tensor, canvas: tuple[int, int]) -> Tensor:
    height, width = masks.shape[-2:]
    return F.pad(masks, (0, canvas[1] - width, 0, canvas[0] - height))


def _like(value: Tensor, like: Tensor, canvas: tuple[int, int] | None = None) -> Tensor:
    if not isinstance(like, tv_tensors.TVTensor):
        return value
    update = {"canvas_size": canvas} if hasattr(like, "canvas_size") and canvas else {}
    wrapped: Tensor = tv_tensors.wrap(value, like=like, **update)
    return wrapped


def _check_is_per_image(key: str, pair: Sequence[Target], lengths: Sequence[int]) -> None:
    # A field of one entry an image has one length; one that follows two different box counts belongs to the boxes.
    values = [target[key] for target in pair]
    if lengths[0] != lengths[1] and all(
        isinstance(value, (Tensor, list)) and getattr(value, "ndim", 1) and len(value) == length
        for value, length in zip(values, lengths, strict=True)
    ):
        raise ValueError(
            f"{key!r} has one entry per box in both targets ({lengths[0]} and {lengths[1]}), but it is not among the "
            f"keys that are joined, so it would go stale: add it to box_keys."
        )
