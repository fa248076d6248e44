"""Run an Albumentations pipeline on an (image, target) pair."""

import random
import warnings
from collections.abc import Iterable, Sequence

import albumentations as A
import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from detmix.albumentations.arrays import IMAGE_DTYPES, Array, writable
from detmix.targets import BOX_KEYS, Sample, Target, check_target, keys_per_box, like, scaled_areas, size_of, take


class AlbumentationsTransform:
    """Run an Albumentations pipeline on detection samples, and keep weights and all other fields with their boxes.

    When the pipeline drops a box, its label, weight, mask, keypoints and all other values per box are dropped too.
    Random numbers come from torch's generator, so ``torch.manual_seed`` and the seeds of `DataLoader` workers determine
    them. Albumentations alone repeats the same random numbers in every worker.

    Keypoints that leave the image are kept, with visibility 0 if they have a visibility, so each box keeps its K.
    Albumentations does not swap left and right keypoints when it flips.

    Args:
        transforms: Albumentations transforms, run one after the other.
        min_area: Smallest area of a box after the pipeline, in square pixels; smaller boxes are dropped.
        min_visibility: Smallest share of a box, 0 to 1, that must stay inside the image; other boxes are dropped.
        box_keys: Names of more target keys with one value per box, besides `detmix.functional.BOX_KEYS`.

    Example:
        >>> import albumentations as A
        >>> flip = AlbumentationsTransform([A.HorizontalFlip(p=1.0)])
        >>> target = {
        ...     "boxes": torch.tensor([[0.0, 0.0, 2.0, 4.0]]),
        ...     "labels": torch.tensor([3]),
        ...     "weights": torch.tensor([0.25]),
        ... }
        >>> image, target = flip(torch.zeros(3, 8, 10, dtype=torch.uint8), target)
        >>> target["boxes"], target["weights"]
        (tensor([[ 8.,  0., 10.,  4.]]), tensor([0.2500]))
    """

    def __init__(
        self,
        transforms: Sequence[A.BasicTransform | A.BaseCompose],
        *,
        min_area: float = 1.0,
        min_visibility: float = 0.0,
        box_keys: Iterable[str] = (),
    ) -> None:
        self.box_keys = BOX_KEYS | frozenset(box_keys)
        with warnings.catch_warnings():
            # Albumentations warns of pipelines that only change pixels.
            warnings.filterwarnings("ignore", "Got processor for")
            self.pipeline = A.Compose(
                list(transforms),
                bbox_params=A.BboxParams(
                    format="pascal_voc",
                    label_fields=["rows"],
                    min_area=min_area,
                    min_visibility=min_visibility,
                    clip=True,
                ),
                keypoint_params=A.KeypointParams(format="xy", remove_invisible=False),
            )

    def __call__(self, image: Tensor | PIL.Image.Image | Array, target: Target) -> Sample:
        """Transform a sample.

        Args:
            image: Image ``(C, H, W)`` on the CPU, PIL image, or array ``(H, W, C)`` or ``(H, W)``; uint8, or float32
                in [0, 1].
            target: Target with ``boxes`` ``(num_boxes, 4)``; optionally ``masks`` ``(num_boxes, H, W)`` and
                ``keypoints`` ``(num_boxes, K, 3)`` or `tv_tensors.KeyPoints` ``(num_boxes, K, 2)``, which are
                transformed, and other values per box, which are filtered.

        Returns:
            A new image, `tv_tensors.Image` unless a plain tensor was given, and a new target. The inputs do not
            change.

        Raises:
            ValueError: if Albumentations cannot take the image or the boxes, or the target is inconsistent.
            TypeError: if the target is no dict, or its boxes, masks or keypoints are no tensors.
        """
        if isinstance(image, np.ndarray):
            image = writable(image)
        image = image if isinstance(image, Tensor) else TF.to_image(image)
        self._check(image, target)
        seed = int(torch.randint(2**63 - 1, ()))
        self.pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        boxes = _xyxy(target["boxes"])
        arrays = {"image": image.permute(1, 2, 0).numpy(), "bboxes": boxes.numpy(), "rows": np.arange(len(boxes))}
        masks, keypoints = target.get("masks"), target.get("keypoints")
        if masks is not None and len(masks):
            arrays["masks"] = (masks.to(torch.uint8) if masks.dtype == torch.bool else masks).numpy()
        arrays["keypoints"] = np.zeros((0, 2)) if keypoints is None else keypoints[..., :2].reshape(-1, 2).numpy()
        out = self.pipeline(**arrays)

        image = like(torch.from_numpy(np.array(out["image"], order="C")).permute(2, 0, 1).contiguous(), image)
        size = size_of(image)
        rows = torch.as_tensor(np.asarray(out["rows"], dtype=np.int64))
        per_box = keys_per_box(target, self.box_keys)
        new = {key: take(value, rows) if key in per_box else value for key, value in target.items()}
        left = torch.as_tensor(np.asarray(out["bboxes"], dtype=np.float32)).reshape(-1, 4).to(boxes.dtype)
        new["boxes"] = _from_xyxy(left, target["boxes"], size)
        if masks is not None:
            moved = torch.from_numpy(np.ascontiguousarray(out["masks"])) if len(masks) else masks.new_zeros(0, *size)
            new["masks"] = like(moved[rows].to(masks.dtype), masks)
        if keypoints is not None:
            moved = _moved_keypoints(keypoints, np.asarray(out["keypoints"]), size)[rows]
            new["keypoints"] = like(moved, keypoints, size)
        if "area" in target:
            new["area"] = scaled_areas(new["area"], _areas(left) / _areas(boxes[rows]).clamp(min=1e-6))
        return image, new

    def _check(self, image: Tensor, target: Target) -> None:
        if image.device.type != "cpu":
            raise ValueError(f"image must be on the CPU for Albumentations, but is on {image.device}.")
        if str(image.dtype).removeprefix("torch.") not in IMAGE_DTYPES:
            raise ValueError(f"image must be {' or '.join(IMAGE_DTYPES)} for Albumentations, but is {image.dtype}.")
        check_target(target, where="the target", image=image)
        boxes = target["boxes"]
        if isinstance(boxes, tv_tensors.BoundingBoxes) and tv_tensors.is_rotated_bounding_format(boxes.format):
            raise ValueError(f"boxes must not be rotated for Albumentations, but they have format {boxes.format.name}.")
        if len(boxes) and boxes.shape[1] != 4:
            raise ValueError(f"boxes must have shape (num_boxes, 4), but have {tuple(boxes.shape)}.")
        for key in sorted(keys_per_box(target, self.box_keys)):
            value = target[key]
            if len(value) != len(boxes):
                raise ValueError(f"{key!r} must have one entry for each of {len(boxes)} boxes, but has {len(value)}.")
            if key in ("masks", "keypoints") and not isinstance(value, Tensor):
                raise TypeError(f"{key!r} must be a tensor, but is a {type(value).__name__}.")


def _xyxy(boxes: Tensor) -> Tensor:
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        boxes = TF.convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat.XYXY)
    return boxes.as_subclass(Tensor).reshape(-1, 4)


def _from_xyxy(boxes: Tensor, like: Tensor, size: tuple[int, int]) -> Tensor:
    if not isinstance(like, tv_tensors.BoundingBoxes):
        return boxes
    wrapped = tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size)
    converted: Tensor = TF.convert_bounding_box_format(wrapped, new_format=like.format)
    return converted


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def _moved_keypoints(keypoints: Tensor, points: Array, size: tuple[int, int]) -> Tensor:
    xy = torch.as_tensor(points[:, :2].astype(np.float32)).reshape(*keypoints.shape[:-1], 2).to(keypoints.dtype)
    if keypoints.shape[-1] == 2:
        return xy
    inside = (xy >= 0).all(-1) & (xy < torch.tensor([size[1], size[0]])).all(-1)
    return torch.cat([xy, torch.where(inside, keypoints[..., 2], 0)[..., None]], -1)
