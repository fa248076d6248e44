"""Make DETR-style criteria use ``target["weights"]``.

The whole loss of a query matched to box *k*, every term, is multiplied by ``weights[k]``. A query without a box weighs
1. Normalisers do not change. The predictions carry the weights through the criterion's own code. They get them in the
one method that every descendant of DETR [arXiv:2005.12872] has: ``get_loss(loss, outputs, targets, indices,
num_boxes)``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detmix.losses.box_weights import CheckedTargets, eager, weigh_targets
from detmix.losses.options import DEFAULT
from detmix.losses.rows import Rows
from detmix.losses.weighted_tensor import WeightedTensor, carry
from detmix.targets import Target

Indices = Sequence[tuple[Tensor, Tensor]]

PREDICTIONS = ("pred_logits", "logits", "pred_boxes", "pred_corners", "pred_masks", "teacher_logits")
"""Keys of ``outputs`` with one entry per query, ``(B, num_queries, ...)``: DETR's names and later ones."""


class WeightedCriterion:
    """Weight a DETR-style criterion: ``class MyCriterion(WeightedCriterion, SetCriterion): ...``.

    Attributes:
        weighting: How weights count. Set a `detmix.losses.options.Weighting` to change it.

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

    @eager
    def get_loss(
        self,
        loss: str,
        outputs: dict[str, Any],
        targets: list[Target],
        indices: Indices,
        num_boxes: Any,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Compute the parent's loss, the loss of each query multiplied by the weight of its box."""
        stock = super().get_loss  # type: ignore[misc]
        weights = weigh_targets(targets, self.weighting)
        if weights is None:
            return stock(loss, outputs, targets, indices, num_boxes, *args, **kwargs)  # type: ignore[no-any-return]
        found = {name: outputs[name] for name in PREDICTIONS if isinstance(outputs.get(name), Tensor)}
        rows = weigh_queries(targets, weights, indices, next(iter(found.values())))
        carrying = {name: carry(x.as_subclass(WeightedTensor), rows.append(x.ndim)) for name, x in found.items()}
        total = num_boxes
        if self.weighting.normalizer == "weights" and (matched := sum(len(queries) for queries, _ in indices)):
            # From the matched pairs: num_boxes may count query groups and denoising queries too.
            share = weigh_pairs(weights, indices).sum() / matched
            total = (num_boxes * share).clamp(min=1)
        losses = stock(loss, {**outputs, **carrying}, targets, indices, total, *args, **kwargs)
        return self.weighting.pick(losses, lambda: stock(loss, outputs, targets, indices, num_boxes, *args, **kwargs))


def weigh_pairs(weights: Sequence[Tensor], indices: Indices) -> Tensor:
    """Return the weights of the boxes of all pairs, image by image: ``(num_pairs,)``."""
    return torch.cat([own[boxes + 1] for own, (_, boxes) in zip(weights, indices, strict=True)])


def weigh_queries(targets: list[Target], weights: Sequence[Tensor], indices: Indices, like: Tensor) -> Rows:
    """Return the weight of each query's box, or of the background of its image: ``(B, num_queries)``."""
    checked = targets if isinstance(targets, CheckedTargets) else None
    if checked and checked.matched:  # one matching serves all losses of a layer
        known, rows = checked.matched
        if known is indices and rows.base.shape == like.shape[:2]:
            return rows
    each = torch.stack([own[0] for own in weights])[:, None].repeat(1, like.shape[1])
    places = torch.cat([queries + i * like.shape[1] for i, (queries, _) in enumerate(indices)])
    each.view(-1)[places] = weigh_pairs(weights, indices)
    rows = Rows.of(each)
    if checked is not None:
        checked.matched = indices, rows
    return rows
