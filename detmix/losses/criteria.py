"""Make DETR-style criteria use ``target["weights"]``.

The whole loss of a query matched to box *k*, every term, is multiplied by ``weights[k]``. A query without a box weighs
1. Normalisers do not change. The predictions carry the weights through the criterion's own code. They get them in the
one method that every descendant of DETR [arXiv:2005.12872] has: ``get_loss(loss, outputs, targets, indices,
num_boxes)``.
"""

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from detmix.losses.box_weights import CheckedTargets, eager, weigh_targets
from detmix.losses.options import DEFAULT
from detmix.losses.outputs import CONSTANTS, count_queries, replace_fields, values_of, weigh_outputs
from detmix.losses.rows import Rows
from detmix.targets import Target

Indices = Sequence[tuple[Tensor, Tensor]]


class WeightedCriterion:
    """Weight a DETR-style criterion: ``class MyCriterion(WeightedCriterion, SetCriterion): ...``.

    Every floating point output with one row for each query, ``(B, num_queries, ...)``, is weighted, whatever its name.
    That holds inside a mapping too, if it is part of one prediction. Any other floating point output raises when the
    loss uses its values, unless ``constants`` names it. The outputs are a mapping, a dataclass or a named tuple.

    Attributes:
        weighting: How weights count. Set a `detmix.losses.options.Weighting` to change it.
        constants: Names of outputs that are no predictions. They carry no weights and stay as they are.

    Example:
        >>> class Criterion(torch.nn.Module):
        ...     def get_loss(self, loss, outputs, targets, indices, num_boxes):
        ...         queries = torch.cat([q for q, _ in indices])
        ...         wanted = torch.cat([t["boxes"][k] for t, (_, k) in zip(targets, indices)])
        ...         return {"l1": (outputs["pred_boxes"][0][queries] - wanted).abs().sum() / num_boxes}
        >>> class Weighted(WeightedCriterion, Criterion): ...
        >>> outputs = {"pred_boxes": torch.zeros(1, 3, 4)}
        >>> targets = [{"boxes": torch.ones(2, 4), "weights": torch.tensor([0.25, 0.5])}]
        >>> Weighted().get_loss("boxes", outputs, targets, [(torch.tensor([2, 0]), torch.tensor([0, 1]))], 2)
        {'l1': tensor(1.5000)}
    """

    weighting = DEFAULT
    constants: ClassVar[Collection[str]] = CONSTANTS

    @eager
    def get_loss(
        self,
        loss: str,
        outputs: Any,
        targets: list[Target],
        indices: Indices,
        num_boxes: Any,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Compute the parent's loss, the loss of each query multiplied by the weight of its box.

        Raises:
            ValueError: If the indices do not fit the targets or the outputs, or a query has boxes of two weights.
            NotImplementedError: If the loss uses an output that carries no weights.
        """
        stock = super().get_loss  # type: ignore[misc]
        weights = weigh_targets(targets, self.weighting)
        if weights is None:
            return stock(loss, outputs, targets, indices, num_boxes, *args, **kwargs)  # type: ignore[no-any-return]
        carrying = weigh_predictions(outputs, targets, weights, indices, self.constants)
        total = num_boxes
        if self.weighting.normalizer == "weights":
            # From the matched pairs: num_boxes may count query groups and denoising queries too.
            matched = weigh_pairs(weights, as_pairs(indices, len(weights)))
            total = (num_boxes * matched.sum() / len(matched)).clamp(min=1) if len(matched) else num_boxes
        losses = stock(loss, replace_fields(outputs, carrying), targets, indices, total, *args, **kwargs)
        return self.weighting.pick(losses, lambda: stock(loss, outputs, targets, indices, num_boxes, *args, **kwargs))


def weigh_predictions(
    outputs: Any, targets: list[Target], weights: Sequence[Tensor], indices: Indices, constants: Collection[str]
) -> dict[str, Any]:
    """Return what replaces outputs by name, as `weigh_outputs` does, once for all losses of a layer."""
    checked = targets if isinstance(targets, CheckedTargets) else None
    key = (indices, constants, *values_of(outputs))
    if checked and checked.outputs:
        known, carrying = checked.outputs
        if len(known) == len(key) and all(a is b for a, b in zip(known, key, strict=True)):
            return carrying
    queries = count_queries(outputs, len(weights), constants)
    rows = None if queries is None else weigh_queries(targets, weights, indices, queries)
    carrying = weigh_outputs(outputs, len(weights), queries, rows, constants)
    if checked is not None:
        checked.outputs = key, carrying
    return carrying


def as_pairs(indices: Indices, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Return the matched queries and boxes of each image as tensors.

    Raises:
        ValueError: If there is not one pair of equally long rows of numbers for each image.
    """
    if len(indices) != batch:
        raise ValueError(
            f"indices must hold one pair of queries and boxes for each of {batch} targets, not {len(indices)}."
        )
    pairs = []
    for i, pair in enumerate(indices):
        if type(pair[0]) is Tensor is type(pair[1]):
            queries, boxes = pair
        else:
            queries, boxes = (torch.as_tensor(part, dtype=torch.int64) for part in pair)
        if len(pair) != 2 or queries.ndim != 1 or queries.shape != boxes.shape:
            raise ValueError(
                f"indices[{i}] must be a pair of matched queries and boxes, as many of both, but their shapes are "
                f"{tuple(queries.shape)} and {tuple(boxes.shape)}."
            )
        pairs.append((queries, boxes))
    return pairs


def weigh_pairs(weights: Sequence[Tensor], pairs: Indices) -> Tensor:
    """Return the weights of the boxes of all pairs, image by image: ``(num_pairs,)``."""
    return torch.cat([own[1:][boxes] for own, (_, boxes) in zip(weights, pairs, strict=True)])


def weigh_queries(targets: list[Target], weights: Sequence[Tensor], indices: Indices, num_queries: int) -> Rows:
    """Return the weight of each query's box, or of the background of its image: ``(B, num_queries)``."""
    checked = targets if isinstance(targets, CheckedTargets) else None
    if checked and checked.matched:  # a matching may serve several layers
        known, rows = checked.matched
        if known is indices and rows.base.shape == (len(weights), num_queries):
            return rows
    pairs = as_pairs(indices, len(weights))
    each = torch.stack([own[0] for own in weights])[:, None].repeat(1, num_queries)
    images = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(pairs)])
    queries, own = torch.cat([queries for queries, _ in pairs]), weigh_pairs(weights, pairs)
    try:
        each[images, queries] = own
    except IndexError:
        raise ValueError(
            f"indices must number queries below {num_queries}, the number that the outputs have, but go up to "
            f"{int(queries.max())}."
        ) from None
    # Values are compared on the CPU only. On a GPU, Python would wait for it.
    if each.device.type == "cpu" and not torch.equal(each[images, queries], own):
        k = int((each[images, queries] != own).nonzero()[0])
        raise ValueError(
            f"indices match query {int(queries[k])} of image {int(images[k])} to boxes of different weights, "
            f"{float(own[k])} and {float(each[images[k], queries[k]])}, but a query has one."
        )
    rows = Rows.of(each)
    if checked is not None:
        checked.matched = indices, rows
    return rows
