"""Scale the second image and lay it anywhere on the first's canvas. Boxes, masks and keypoints follow.

YOLOX [arXiv:2107.08430, sec. 2.1] and RTMDet [arXiv:2212.07784] mix so. All geometry is torchvision's.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from detmix.mixing.plan import Placement
from detmix.targets import BOX_KEYS, keys_per_box, like, scaled_areas, size_of, take


def place(
    image: Tensor,
    target: dict[str, Any],
    canvas: tuple[int, int],
    placement: Placement,
    *,
    fill: float | Sequence[float] = 0.0,
    box_keys: Collection[str] = BOX_KEYS,
) -> tuple[Tensor, dict[str, Any]]:
    """Resize a sample, lay it on a canvas and crop it there, with everything that belongs to its boxes.

    Boxes are clamped to the canvas. A box with less than a pixel left is dropped with all that belongs to it; on CUDA
    this waits for the GPU. Keypoints ``(num_boxes, K, 3)`` outside the canvas stay, with visibility 0. ``area`` is
    scaled as its box is.

    Args:
        image: Image ``(C, H, W)``.
        target: Target of the image: `tv_tensors` of any kind, plain ``boxes`` ``(num_boxes, 4)`` in XYXY, ``masks``
            ``(num_boxes, H, W)`` and ``keypoints`` ``(num_boxes, K, 2 or 3)``, and further per-box keys.
        canvas: ``(height, width)`` in pixels.
        placement: Where to lay the image.
        fill: Value of pixels that the image does not cover: one number, or one per channel.
        box_keys: Keys that hold one entry per box.

    Returns:
        A new image ``(C, *canvas)`` and a new target.

    Raises:
        ValueError: If the target holds coordinates that cannot follow, such as polygons.

    Example:
        >>> target = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]])}
        >>> image, target = place(torch.ones(1, 4, 4), target, (8, 8), Placement(scale=0.5, x=1.0, y=0.0))
        >>> image[0, 0], target["boxes"]
        (tensor([0., 0., 0., 0., 1., 1., 1., 1.]), tensor([[4., 0., 8., 4.]]))
    """
    size = size_of(image)
    fit = placement.scale * min(canvas[0] / size[0], canvas[1] / size[1])
    scaled = [max(1, round(side * fit)) for side in size]
    top, left = (
        round(share * (room - side))
        for share, room, side in zip((placement.y, placement.x), canvas, scaled, strict=True)
    )

    def move(value: Tensor) -> Tensor:
        moved: Tensor = TF.crop(TF.resize(value, scaled), -top, -left, *canvas)
        return moved

    moved = _move_image(image, scaled, (top, left), canvas, fill)
    if "boxes" not in target:
        return moved, target
    new = {key: _move_field(key, value, size, move) for key, value in target.items()}
    boxes = _as_boxes(target["boxes"], size)
    left_over, keep = TF.sanitize_bounding_boxes(move(boxes))
    rows = keep.nonzero()[:, 0]
    new |= {key: take(new[key], rows) for key in keys_per_box(target, box_keys)}
    if "area" in new:
        ratio = _areas(left_over) / _areas(take(boxes, rows))
        new["area"] = scaled_areas(new["area"], ratio)
    return moved, new


def _move_image(
    image: Tensor, scaled: list[int], corner: tuple[int, int], canvas: tuple[int, int], fill: float | Sequence[float]
) -> Tensor:
    pixels = image.as_subclass(Tensor)
    (top, left), (height, width) = corner, scaled
    below, right = canvas[0] - top - height, canvas[1] - left - width
    margins = [max(0, side) for side in (left, top, right, below)]
    level = list(fill) if isinstance(fill, Sequence) else fill
    padded = TF.pad(TF.resize(pixels, scaled), margins, fill=level)
    return like(TF.crop(padded, max(0, -top), max(0, -left), *canvas), image)


def _as_boxes(boxes: Tensor, size: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        # A target whose boxes may reach outside sets its own clamping mode; boxes without one are clamped softly.
        return boxes if boxes.clamping_mode else tv_tensors.wrap(boxes, like=boxes, clamping_mode="soft")
    return tv_tensors.BoundingBoxes(boxes.reshape(-1, 4), format="XYXY", canvas_size=size)


def _move_field(key: str, value: Any, size: tuple[int, int], move: Any) -> Any:
    if key == "boxes" or isinstance(value, tv_tensors.BoundingBoxes):
        return _unwrapped(move(_as_boxes(value, size)), value)
    if key == "masks" or isinstance(value, tv_tensors.Mask):
        return _unwrapped(move(tv_tensors.Mask(value)), value)
    if key == "keypoints" or isinstance(value, tv_tensors.KeyPoints):
        points = move(tv_tensors.KeyPoints(value[..., :2].as_subclass(Tensor), canvas_size=size))
        if value.shape[-1] == 2:
            return _unwrapped(points, value)
        height, width = points.canvas_size
        points = points.as_subclass(Tensor)
        inside = (points >= 0).all(-1) & (points[..., 0] < width) & (points[..., 1] < height)
        return torch.cat([points, (value[..., 2] * inside)[..., None]], -1)
    if key in ("bbox", "segmentation"):
        raise ValueError(
            f"{key!r} holds coordinates of a {type(value).__name__}, which cannot follow its image: remove it before a "
            f"mix with scale, or keep 'boxes' and 'masks' instead."
        )
    return value


def _unwrapped(moved: Tensor, value: Tensor) -> Tensor:
    return moved if isinstance(value, tv_tensors.TVTensor) else moved.as_subclass(Tensor)


def _areas(boxes: tv_tensors.BoundingBoxes) -> Tensor:
    rotated = tv_tensors.is_rotated_bounding_format(boxes.format)
    sides = TF.convert_bounding_box_format(boxes, new_format="XYWHR" if rotated else "XYWH")
    areas: Tensor = sides.as_subclass(Tensor)[:, 2:4].prod(1)
    return areas
