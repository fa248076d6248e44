"""Draw samples with their boxes: coloured by the image they came from, labelled with class and weight."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, make_grid

from detmix.targets import Target

SOURCE_COLORS = ("#00c8ff", "#ff8c00")
"""Colours of boxes from the first and the second image."""


def draw_sample(
    image: Tensor,
    target: Target,
    class_names: Sequence[str] | None = None,
    *,
    size: int = 480,
    colors: Sequence[str] = SOURCE_COLORS,
) -> Tensor:
    """Draw the boxes of a target, or of a prediction, into its image.

    Each box has the colour of its ``target["source"]`` and a label: its class, and its weight or score if there is one.

    Args:
        image: Image ``(3, H, W)`` or ``(1, H, W)``, uint8 or floating point in [0, 1].
        target: Dict with ``boxes`` ``(num_boxes, 4)``, XYXY in pixels, or `tv_tensors.BoundingBoxes` of any format;
            optionally ``labels``, ``weights``, ``scores``, ``source``.
        class_names: The names of classes 1, 2, ...; numbers if ``None``.
        size: Longer side of the picture, in pixels.
        colors: One colour per source.

    Returns:
        The picture, uint8 ``(3, H', W')``, on the CPU.

    Example:
        >>> target = {"boxes": torch.tensor([[2.0, 2.0, 9.0, 9.0]]), "labels": torch.tensor([1])}
        >>> draw_sample(torch.zeros(3, 10, 20), target, ["cat"], size=100).shape
        torch.Size([3, 50, 100])
    """
    image = image.as_subclass(Tensor).detach().cpu()
    scale = size / max(image.shape[-2:])
    canvas = (round(image.shape[-2] * scale), round(image.shape[-1] * scale))
    pixels = TF.to_dtype(image, torch.uint8, scale=True).expand(3, -1, -1)
    picture: Tensor = TF.resize(pixels, list(canvas), antialias=True)
    boxes = _corners(target["boxes"]).detach().cpu() * scale
    if not len(boxes):
        return picture
    sources = target["source"].tolist() if "source" in target else [0] * len(boxes)
    drawn: Tensor = draw_bounding_boxes(
        picture,
        boxes,
        labels=_labels(target, class_names),
        colors=[colors[source] for source in sources],
        label_colors="black",
        fill_labels=True,  # on the colour of the box, so that the text can be read
        width=max(1, size // 200),
    )
    return drawn


def draw_grid(pictures: Sequence[Tensor], columns: int = 3) -> Tensor:
    """Lay pictures of any sizes out in a grid. Every cell has the size of the largest.

    Args:
        pictures: uint8 ``(3, H_i, W_i)``.
        columns: Pictures per row.

    Returns:
        One picture, uint8 ``(3, H, W)``.

    Example:
        >>> draw_grid([torch.zeros(3, 10, 20, dtype=torch.uint8)] * 4, columns=2).shape
        torch.Size([3, 26, 46])
    """
    height, width = (max(picture.shape[i] for picture in pictures) for i in (1, 2))
    cells = [F.pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1])) for picture in pictures]
    grid: Tensor = make_grid(cells, nrow=min(columns, len(cells)), padding=2, pad_value=64)
    return grid


def _corners(boxes: Tensor) -> Tensor:
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        rotated = tv_tensors.is_rotated_bounding_format(boxes.format)
        boxes = TF.convert_bounding_box_format(boxes, new_format="XYXYXYXY" if rotated else "XYXY")
    return boxes.as_subclass(Tensor)


def _labels(target: Target, class_names: Sequence[str] | None) -> list[str]:
    texts = [""] * len(target["boxes"])
    if "labels" in target:
        texts = [str(k) if class_names is None else class_names[k - 1] for k in target["labels"].tolist()]
    share = target.get("scores", target.get("weights"))
    return (
        texts if share is None else [f"{text} {value:.2f}" for text, value in zip(texts, share.tolist(), strict=True)]
    )
