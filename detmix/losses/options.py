"""How weights count: the choices that :func:`detmix.weight_losses` offers."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NORMALIZERS = ("count", "weights")
OBJECTNESS = ("loss", "target")


@dataclass(frozen=True)
class Weighting:
    """How weights count; as it stands, a row's whole loss is multiplied by the weight of its box, and nothing else.

    Args:
        terms: Names of the losses that heed weights, such as ``{"bbox_regression"}``; the others are the stock ones.
            A criterion's are named as its ``get_loss`` names them, without the suffix of a layer. ``None`` for all.
        normalizer: What a loss is divided by: ``"count"``, the stock number of rows, boxes or entries; or
            ``"weights"``, where the rows or boxes that this number counts count by their weights. Neither is below 1.
        per_image: Whether one number weighs a whole image, rows matched to no box included: the mean weight of its
            boxes. GluonCV's Faster R-CNN does so, with 0.5 for every mixed image.
        objectness: Of a region proposal network: ``"loss"`` multiplies the loss of an anchor by the weight of its
            box, ``"target"`` makes the weight what the anchor is to predict, as GluonCV's YOLOv3 does.

    Raises:
        TypeError: If ``terms`` is a single string.
        ValueError: If ``normalizer`` or ``objectness`` is none of these words.
    """

    terms: Collection[str] | None = None
    normalizer: str = "count"
    per_image: bool = False
    objectness: str = "loss"

    def __post_init__(self) -> None:
        if isinstance(self.terms, str):
            raise TypeError(f"terms must be a collection of names, but is the string {self.terms!r}.")
        if self.terms is not None:
            object.__setattr__(self, "terms", frozenset(self.terms))  # hashable, as criteria are cached by it
        for name, known in (("normalizer", NORMALIZERS), ("objectness", OBJECTNESS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, but is {getattr(self, name)!r}.")

    def heeds(self, term: str) -> bool:
        """Whether a loss heeds weights."""
        return self.terms is None or term in self.terms

    def pick(self, weighted: dict[str, Tensor], stock: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The losses that heed weights, and the stock ones of the others, which are computed only if there are any."""
        if all(map(self.heeds, weighted)):
            return weighted
        return weighted | {term: loss for term, loss in stock().items() if not self.heeds(term)}

    def normalized(self, rows: Tensor, counted: Tensor, dim: Any = None) -> Tensor:
        """Row weights that make losses divided by a count be divided by the sum of the weights that it counts.

        Args:
            rows: Weights of rows, of any shape.
            counted: bool, of that shape: the rows that the stock normaliser counts.
            dim: The dimensions it counts over; ``None`` for all.
        """
        if self.normalizer == "count":
            return rows
        count, total = (x.sum(dim, keepdim=True) for x in (counted.to(rows.dtype), torch.where(counted, rows, 0)))
        return rows * (count.clamp(min=1) / total.clamp(min=1))


DEFAULT = Weighting()
