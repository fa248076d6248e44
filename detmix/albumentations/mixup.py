"""Mixup as a transform of an Albumentations pipeline."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import albumentations as A
import numpy as np
import torch
from torch import Tensor

from detmix.albumentations.arrays import IMAGE_DTYPES, Array, writable
from detmix.mixing.blend import blend_images
from detmix.mixing.plan import Law, Range, check_law, draw_lam


class MixUp(A.DualTransform):  # type: ignore[misc]  # Albumentations ships no types
    """Mix samples in `A.Compose`: blend with a partner and keep the boxes of both, weighted by image.

    Both images are placed at the top left of a shared canvas and are not resized [arXiv:1902.04103, sec. 3.1]. The
    label field ``weights`` of ``bbox_params`` is multiplied by the share of the box's image.

    Pass the partner as to `A.Mosaic`: ``pipeline(image=..., bboxes=..., weights=..., mixup_metadata=partner)``. It is a
    dict, or a list of dicts from which one is drawn. A dict holds ``image`` and those of ``bboxes``, ``masks``,
    ``keypoints`` and their label fields that the sample has; ``weights`` are 1 if missing. An empty list leaves the
    sample unmixed. A missing ``mixup_metadata`` is an error. Transforms before this one do not change the partner: make
    this one the first, or pass partners that are already transformed.

    Boxes, ``masks`` and keypoints are concatenated, the sample's first. Albumentations drops boxes but not their masks.
    To know which masks are left, number the boxes in a label field, the partner's after the sample's.

    Random numbers come from the random state of `A.Compose`, which is the same in all `DataLoader` workers unless its
    ``set_random_seed`` is called in each. With ``save_applied_params=True`` it returns the ``lam`` that was drawn.

    Args:
        alpha: Parameter of the Beta distribution that the sample's share is drawn from: Beta(alpha, alpha), or
            Beta(a, b) for a pair. The Bag of Freebies uses 1.5.
        lam: Distribution of the share instead of Beta: a constant, ``(low, high)`` for a uniform distribution, or a
            function of a `random.Random`. Shares are rounded to multiples of 2**-24, so that both are exact in float32.
        metadata_key: Name of the argument that passes the partner to the pipeline.
        fill: Value of the canvas outside both images; see `detmix.functional.blend_images`.
        p: Probability that a sample is mixed.

    Raises:
        ValueError: if an argument is out of range. When called: if ``weights`` is not a label field, if sample and
            partner do not fit, or if the sample has a semantic ``mask``, which has one class per pixel and cannot be
            mixed.
        TypeError: if the partner is no dict, or its image no array.

    Example:
        >>> box_params = A.BboxParams("pascal_voc", label_fields=["names", "weights"])
        >>> pipeline = A.Compose([MixUp(lam=0.75, p=1.0), A.HorizontalFlip(p=1.0)], bbox_params=box_params)
        >>> sample = {"image": np.zeros((4, 10, 3), np.uint8), "bboxes": [[2, 1, 6, 3]], "names": ["cat"]}
        >>> partner = {"image": np.zeros((8, 6, 3), np.uint8), "bboxes": [[0, 0, 4, 4]], "names": ["dog"]}
        >>> mixed = pipeline(**sample, weights=[1.0], mixup_metadata=partner)
        >>> mixed["image"].shape, mixed["names"], mixed["weights"]
        ((8, 10, 3), ['cat', 'dog'], [0.75, 0.25])
    """

    def __init__(
        self,
        alpha: float | Range = 1.5,
        *,
        lam: Law = None,
        metadata_key: str = "mixup_metadata",
        fill: float | Sequence[float] = 0.0,
        p: float = 0.5,
    ) -> None:
        check_law(alpha, lam)
        if not 0 <= p <= 1:
            raise ValueError(f"p must be a probability in [0, 1], but it is {p}.")
        super().__init__(p=p)
        self.alpha, self.lam, self.metadata_key, self.fill = alpha, lam, metadata_key, fill

    @property
    def targets_as_params(self) -> list[str]:
        """Return the arguments of the pipeline besides the sample."""
        return [self.metadata_key]

    def draw_lam(self) -> float:
        """Draw the share of a sample's own image."""
        return draw_lam(self.py_random, self.alpha, self.lam)

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the partner and ``lam``, and convert the partner's boxes and keypoints to Albumentations' own form."""
        self._check_sample(data)
        where, metadata = self.metadata_key, data[self.metadata_key]
        if isinstance(metadata, Mapping):
            partner = self._read_partner(metadata, data, where)
        elif not isinstance(metadata, Sequence):
            raise TypeError(f"{where} must be a dict or a list of dicts, but is a {type(metadata).__name__}.")
        elif not metadata:
            return {"lam": 1.0, "partner": None}
        else:
            row = self.py_random.randrange(len(metadata))
            partner = self._read_partner(metadata[row], data, f"{where}[{row}]")
        height, width = np.maximum(data["image"].shape[:2], partner["image"].shape[:2]).tolist()
        return {"lam": self.draw_lam(), "partner": partner, "canvas": (height, width)}

    def apply_with_params(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Mix all targets."""
        if params["partner"] is None:
            return kwargs
        masks = kwargs.get("masks")
        if isinstance(masks, Sequence) and not masks and len(params["partner"]["masks"]):
            # Albumentations skips an empty list, which would lose the partner's masks.
            kwargs["masks"] = params["partner"]["masks"][:0]
        mixed: dict[str, Any] = super().apply_with_params(params, *args, **kwargs)
        return mixed

    def apply(self, img: Array, lam: float, partner: dict[str, Array], **params: Any) -> Array:
        """Blend the images."""
        mixed = blend_images(_channels_first(img), _channels_first(partner["image"]), lam, fill=self.fill)
        return (mixed.permute(1, 2, 0) if img.ndim == 3 else mixed[0]).numpy()

    def apply_to_bboxes(self, bboxes: Array, lam: float, partner: dict[str, Array], **params: Any) -> Array:
        """Concatenate the boxes, make them relative to the canvas instead of their image, and scale their weights."""
        fields = self.processors["bboxes"].params.label_fields
        weights = fields.index("weights") - len(fields)  # counted from the end, because boxes can have more columns
        sizes = params["shape"], partner["image"].shape
        pair = []
        for rows, size, share in zip((bboxes, partner["bboxes"]), sizes, (lam, 1 - lam), strict=True):
            rows = rows.astype(np.float64)
            if len(rows):
                rows[:, :4] *= np.tile([size[1] / params["canvas"][1], size[0] / params["canvas"][0]], 2)
                rows[:, weights] *= share
            pair.append(rows)
        return _join(*pair)

    def apply_to_keypoints(self, keypoints: Array, partner: dict[str, Array], **params: Any) -> Array:
        """Concatenate the keypoints, which keep their pixel coordinates."""
        return _join(keypoints, partner["keypoints"])

    def apply_to_masks(self, masks: Array, partner: dict[str, Array], **params: Any) -> Array:
        """Pad the masks to the canvas and concatenate them."""
        return _join(_pad(masks, params["canvas"]), _pad(partner["masks"], params["canvas"]))

    def _check_sample(self, data: dict[str, Any]) -> None:
        boxes = self.get_processor("bboxes")
        fields = (boxes and boxes.params.label_fields) or []
        if "weights" not in fields:
            raise ValueError(
                "MixUp weights boxes by the shares of their images, so 'weights' must be a label field in "
                f"A.Compose(..., bbox_params=A.BboxParams(..., label_fields=[...])), but they are {list(fields)}."
            )
        given = {key for key, value in data.items() if value is not None}
        unknown = {"mask", "images", "volume", "volumes", "mask3d", "masks3d", *self._additional_targets} & given
        if unknown:
            raise ValueError(
                f"MixUp mixes image, bboxes, masks (one per box) and keypoints, but the sample has {sorted(unknown)}. "
                "A semantic mask has one class per pixel, but a mixed pixel shows two."
            )
        if "bboxes" not in given:
            raise ValueError(f"MixUp needs 'bboxes', which may be empty, but was called with {sorted(given)}.")
        if "keypoints" in given and "keypoints" not in self.processors:
            raise ValueError("MixUp was called with keypoints, but A.Compose has no keypoint_params.")
        if str(data["image"].dtype) not in IMAGE_DTYPES:
            raise ValueError(f"image must be {' or '.join(IMAGE_DTYPES)}, but is {data['image'].dtype}.")
        weights = boxes.label_manager.metadata["bboxes"].get("weights")
        if weights is not None:
            if not _is_numeric(weights):
                raise ValueError("weights of the boxes must be numbers, but Albumentations treats them as categories.")
            weights.is_numerical = True  # else Albumentations returns a list of numpy's floats as integers,
            _widen(weights, np.float32)  # and the product in an integer array too

    def _read_partner(self, partner: Any, data: dict[str, Any], where: str) -> dict[str, Array]:
        if not isinstance(partner, Mapping):
            raise TypeError(f"{where} must be a dict, but is a {type(partner).__name__}.")
        needed = ["image", *(key for key in ("bboxes", "masks", "keypoints") if data.get(key) is not None)]
        missing = [key for key in needed if partner.get(key) is None]
        if missing:
            raise ValueError(f"{where} must have {needed} like the sample, which may be empty, but has no {missing}.")
        if not isinstance(partner["image"], np.ndarray):
            raise TypeError(f"image of {where} must be a numpy array, but is a {type(partner['image']).__name__}.")
        _check_alike(f"image of {where}", partner["image"], data["image"])
        read = {"image": partner["image"]}
        for key in needed[1:]:
            read[key] = self._read_masks(partner, data, where) if key == "masks" else self._encode(key, partner, where)
        return read

    def _read_masks(self, partner: Mapping[str, Any], data: dict[str, Any], where: str) -> Array:
        masks, size = [np.asarray(mask) for mask in partner["masks"]], partner["image"].shape[:2]
        if len(masks) != len(partner["bboxes"]):
            raise ValueError(
                f"{where} has {len(masks)} masks for {len(partner['bboxes'])} bboxes, but must have one each."
            )
        for row, mask in enumerate(masks):
            if mask.shape[:2] != size:
                raise ValueError(
                    f"mask {row} of {where} must be as large as its image, {size}, but is {mask.shape[:2]}."
                )
        if masks and len(data["masks"]):
            _check_alike(f"masks of {where}", masks[0], data["masks"][0])
        return np.stack(masks) if masks else np.zeros((0, *size), np.uint8)

    def _encode(self, key: str, partner: Mapping[str, Any], where: str) -> Array:
        """Convert the partner's boxes or keypoints to Albumentations' own form, with label fields as columns."""
        processor = self.processors[key]
        rows = np.asarray(partner[key])
        if not len(rows):
            return rows
        labels = {field: partner.get(field) for field in processor.params.label_fields or ()}
        if key == "bboxes":
            weights = np.ones(len(rows)) if labels["weights"] is None else labels["weights"]
            labels["weights"] = np.asarray(weights, dtype=np.float32)
        for field, values in labels.items():
            if values is None:
                raise ValueError(
                    f"{where} must have the label field {field!r} of its {key}, but has {sorted(partner)}."
                )
            if len(values) != len(rows):
                raise ValueError(
                    f"{field!r} of {where} must have one entry for each of {len(rows)} {key}, but is {values}."
                )
            self._admit(key, field, np.asarray(values), where)
        encoded = {"image": partner["image"], key: rows, **labels}
        given_as = dict(processor.is_sequence_input)
        try:
            processor.preprocess(encoded)
        except ValueError as error:
            raise ValueError(f"{key} of {where}: {error}") from error
        finally:
            processor.is_sequence_input = given_as  # else the sample's list is returned as an array, like the partner's
        joined: Array = encoded[key]
        return joined

    def _admit(self, key: str, field: str, values: Array, where: str) -> None:
        """Make Albumentations decode a label field for the partner's values too; it has seen only the sample's."""
        known = self.processors[key].label_manager.metadata[key].get(field)
        if known is None:
            return
        if _is_numeric(known) != all(isinstance(value, Real) for value in values.ravel().tolist()):
            kind = "numbers" if _is_numeric(known) else "categories"
            raise ValueError(f"{field!r} of {where} must be {kind}, like the sample's, but is {values.tolist()}.")
        _widen(known, values.dtype)


def _channels_first(image: Array) -> Tensor:
    tensor = torch.from_numpy(writable(image))
    return tensor.permute(2, 0, 1) if image.ndim == 3 else tensor[None]


def _join(first: Array, second: Array) -> Array:
    # Empty rows have no columns of label fields and no dtype of their own.
    parts = [part for part in (first, second) if len(part)]
    if len(parts) < 2:
        return parts[0] if parts else first
    if parts[0].shape[1:] != parts[1].shape[1:]:
        raise ValueError(
            f"Rows of the sample and its partner must have as many columns, but have {first.shape} and {second.shape}."
        )
    return np.concatenate(parts)


def _check_alike(name: str, partner: Array, sample: Array) -> None:
    for what, ours, theirs in (
        ("dtype", sample.dtype, partner.dtype),
        ("channels", sample.shape[2:], partner.shape[2:]),
    ):
        if ours != theirs:
            raise ValueError(f"{name} must have the {what} of the sample, {ours}, but has {theirs}.")


def _is_numeric(known: Any) -> bool:
    return bool(known.is_numerical or known.encoder.is_numerical)


def _widen(known: Any, dtype: Any) -> None:
    # Albumentations casts the joined values to the dtype of the sample's: "giraffe" to "gir" beside "cat", 0.5 to 0.
    if known.dtype is not None:
        known.dtype = np.promote_types(known.dtype, dtype)


def _pad(masks: Array, canvas: tuple[int, int]) -> Array:
    spare = [(0, canvas[0] - masks.shape[1]), (0, canvas[1] - masks.shape[2])]
    return np.pad(masks, [(0, 0), *spare, *[(0, 0)] * (masks.ndim - 3)])
