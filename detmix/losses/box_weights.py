"""Read the weights of boxes, and give them to the rows of a loss that are matched to the boxes."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from detmix.losses.options import DEFAULT, Weighting
from detmix.losses.rows import Rows
from detmix.targets import Target, check_target

Method = TypeVar("Method", bound=Callable[..., Any])

eager: Callable[[Method], Method] = torch.compiler.disable
"""Decorate methods that handle weighted tensors: a compiled graph cannot hold tensors with an attribute."""


def match_weights(target: Target, matched_idxs: Tensor) -> Tensor:
    """Return the weight of the box that each row is matched to.

    Args:
        target: Target with ``boxes`` ``(num_boxes, 4)`` and, optionally, ``weights`` ``(num_boxes,)``.
        matched_idxs: int64 of any shape: the index of a box, or a negative number for a row without a box.

    Returns:
        float32 of the shape of ``matched_idxs``; 1 for a row without a box.

    Raises:
        TypeError: If the weights are not a floating point tensor.
        ValueError: If they are not one finite number, 0 or more, for each box, on the device of the boxes.

    Example:
        >>> target = {"boxes": torch.rand(2, 4), "weights": torch.tensor([0.25, 0.75])}
        >>> match_weights(target, torch.tensor([1, -1, 0, -2]))
        tensor([0.7500, 1.0000, 0.2500, 1.0000])
    """
    return weigh_rows(with_background(check_weights(target)), matched_idxs)


def check_weights(target: Target, index: int | None = None) -> Tensor:
    """Check ``target["weights"]`` and return it as float32 ``(num_boxes,)``; ones for a target without weights.

    Args:
        target: Target with ``boxes`` ``(num_boxes, 4)``.
        index: Index of the target in its batch, for error messages.

    Raises:
        TypeError: If the weights are not a floating point tensor.
        ValueError: If they are not one finite number, 0 or more, for each box, on the device of the boxes.
    """
    boxes = target["boxes"]
    if "weights" not in target:
        return torch.ones(len(boxes), device=boxes.device)
    weights = target["weights"]
    name = "target['weights']" if index is None else f"targets[{index}]['weights']"
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = f"a {weights.dtype} tensor" if isinstance(weights, Tensor) else f"a {type(weights).__name__}"
        raise TypeError(f"{name} must be a floating point tensor, but it is {got}.")
    if weights.shape != (len(boxes),):
        raise ValueError(f"{name} must hold one weight for each of {len(boxes)} boxes, but is {tuple(weights.shape)}.")
    if weights.device != boxes.device:
        raise ValueError(f"{name} must be on {boxes.device} as the boxes are, but is on {weights.device}.")
    # Values on a GPU are not checked: reading them would make Python wait for it at every step.
    if weights.device.type == "cpu" and len(weights):
        lowest, highest = weights.detach().aminmax()  # both NaN if any is
        if not 0 <= float(lowest) <= float(highest) < math.inf:
            raise ValueError(f"{name} must be finite and not negative, but holds {weights.tolist()}.")
    return weights.float()


def with_background(weights: Tensor, per_image: bool = False) -> Tensor:
    """Put the weight of a row without a box before the weights of the boxes: ``(1 + num_boxes,)``."""
    if per_image:
        return (weights.mean() if len(weights) else weights.new_ones(())).expand(1 + len(weights))
    return F.pad(weights, (1, 0), value=1.0)


def weigh_rows(weights: Tensor, matched_idxs: Tensor) -> Tensor:
    """Return the weight of each row, from the weights that `with_background` returns."""
    places = matched_idxs.clamp(min=-1) + 1
    return weights.index_select(0, places.flatten()).view(places.shape)


class CheckedTargets(list[Target]):
    """Targets of one step with their weights, checked once. A criterion needs them for each loss of each layer."""

    def __init__(self, targets: list[Target], weights: list[Tensor]) -> None:
        super().__init__(targets)
        self.weights = weights
        self.matched: tuple[Any, Rows] | None = None  # the last indices, and the weights of the rows
        self.outputs: tuple[Any, dict[str, Any]] | None = None  # the last indices and outputs, and what carries weights


def weigh_targets(
    targets: list[Target],
    weighting: Weighting = DEFAULT,
    num_classes: int | None = None,
    first_class: tuple[int | None, int] = (None, 1),
) -> list[Tensor] | None:
    """Check the targets and return `with_background` of each; None if no target has weights, so stock code runs.

    Args:
        targets: Targets of a batch.
        weighting: How weights count.
        num_classes: Number of classes, for the check of the labels; ``None`` accepts any labels.
        first_class: Lowest label in a target without weights, and in one with. ``None`` accepts any lower one.
    """
    if isinstance(targets, CheckedTargets):
        return targets.weights
    for i, target in enumerate(targets):  # otherwise NaN boxes train silently, and high labels fail in torch
        lowest = first_class["weights" in target]
        check_target(target, where=f"targets[{i}]", num_classes=num_classes, first_class=lowest)
    if not any("weights" in target for target in targets):
        return None
    return [with_background(check_weights(target, i), weighting.per_image) for i, target in enumerate(targets)]
