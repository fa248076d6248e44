"""Choose how weights count: the options of `detmix.weight_losses`."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NORMALIZERS = ("count", "weights")
OBJECTNESS = ("loss", "target")


@dataclass(frozen=True)
class Weighting:
    """Choose how weights count. By default the whole loss of a row is multiplied by the weight of its box.

    Args:
        terms: Names of the losses that use weights, such as ``{"bbox_regression"}``. The others stay as they are. Use
            the names of a criterion's ``get_loss``, without the suffix of a layer. ``None`` means all.
        normalizer: Divisor of a loss: ``"count"``, the stock number of rows, boxes or entries; or ``"weights"``, which
            counts each of them by its weight. Neither is below 1.
        per_image: Use one weight for a whole image, background included: the mean weight of its boxes. GluonCV's Faster
            R-CNN does so, with 0.5 for every mixed image.
        objectness: ``"loss"`` multiplies the objectness loss of an RPN's anchor by the weight of its box. ``"target"``
            uses the weight as the objectness target instead, as GluonCV's YOLOv3 does.

    Raises:
        TypeError: If ``terms`` is a single string.
        ValueError: If ``normalizer`` or ``objectness`` has another value.
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

    def uses(self, term: str) -> bool:
        """Tell whether a loss uses weights."""
        return self.terms is None or term in self.terms

    def pick(self, weighted: dict[str, Tensor], stock: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Combine the weighted losses with the stock ones of other terms. These are computed only if there are any."""
        if all(map(self.uses, weighted)):
            return weighted
        return weighted | {term: loss for term, loss in stock().items() if not self.uses(term)}

    def normalized(self, rows: Tensor, counted: Tensor, dim: Any = None) -> Tensor:
        """Scale the weights of rows so that a loss divided by a count is divided by the sum of weights instead.

        Args:
            rows: Weights of rows, of any shape.
            counted: bool, of that shape: the rows that the stock normaliser counts.
            dim: Dimensions that it counts over; ``None`` for all.
        """
        if self.normalizer == "count":
            return rows
        count, total = (x.sum(dim, keepdim=True) for x in (counted.to(rows.dtype), torch.where(counted, rows, 0)))
        return rows * (count.clamp(min=1) / total.clamp(min=1))


DEFAULT = Weighting()
