"""What the loss functions of ``torch.nn.functional`` do to the weights of a `WeightedTensor`.

They divide by what they always divide by: the number of entries, or their own ``weight=``.
"""

import sys
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from detmix.losses.rules import agreed_rows, elementwise, scaled
from detmix.losses.weighted_tensor import Function, WeightedTensor, carry, lost, rule


def _reduction(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """Return the reduction that the older arguments mean, which torch prefers."""
    if size_average is None and reduce is None:
        return reduction
    return legacy_get_string(size_average, reduce)


def _weight_of_l1_loss() -> Tensor | None:
    """Return the ``weight=`` of the ``l1_loss`` that is under way. No other argument of a loss is kept from rules."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_NEAR):
        if frame is None:
            break
        if frame.f_code is F.l1_loss.__code__ and (weight := frame.f_locals["weight"]) is not None:
            return weight  # type: ignore[no-any-return]
        frame = frame.f_back
    return None


_NEAR = 12  # frames between a loss and its rule, at most, with a few modes of torch between them


@rule(
    *(F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.mse_loss, F.kl_div, F.hinge_embedding_loss, F.soft_margin_loss),
    *(F.poisson_nll_loss, F.gaussian_nll_loss, F.margin_ranking_loss),
)
def _loss(
    func: Function,
    input: Tensor,
    *targets: Any,
    reduction: str = "mean",
    size_average: bool | None = None,
    reduce: bool | None = None,
    weight: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    reduction = _reduction(reduction, size_average, reduce)
    if func is F.l1_loss and weight is None:
        weight = _weight_of_l1_loss()
    if weight is not None:
        kwargs["weight"] = weight
    if reduction not in ("none", "sum", "mean") and not (reduction == "batchmean" and func is F.kl_div):
        return func(input, *targets, reduction=reduction, **kwargs)  # raises
    loss = elementwise(func, input, *targets, reduction="none", **kwargs)
    # A dense gradient, as the stock loss has: its kernel rounds differently on an expanded one.
    if reduction == "none":
        return loss
    if reduction == "batchmean":
        return scaled(loss, loss.weights).sum() / loss.size(0)
    if weight is not None and reduction == "mean" and func in (F.mse_loss, F.l1_loss):
        return scaled(loss, loss.weights).sum() / torch.sum(weight)
    return getattr(Tensor, reduction)(scaled(loss, loss.weights))


@rule(F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
def _binary_cross_entropy(
    func: Function,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    size_average: bool | None = None,
    reduce: bool | None = None,
    pos_weight: Tensor | None = None,
) -> Any:
    reduction = _reduction(reduction, size_average, reduce)
    if isinstance(pos_weight, WeightedTensor):
        raise lost(func, input, target, weight, pos_weight, why="with pos_weight that has weights")
    options = {} if pos_weight is None else {"pos_weight": pos_weight}
    parts = [part for part in (input, target, weight) if isinstance(part, WeightedTensor)]
    if reduction == "none":
        return elementwise(func, input, target, weight=weight, reduction="none", **options)
    ndim = max(part.ndim for part in parts)
    weights = agreed_rows(func, [part.rows.pad(ndim) for part in parts], input, target, weight).weights
    if weights.requires_grad:  # torch has no gradient of the function's own factor
        loss = func(input, target, weight, reduction="none", **options)
        return getattr(Tensor, reduction)(scaled(loss, weights))
    # As the function's own factor, weights keep the order in which it divides its gradient by the mean's count.
    return func(input, target, weights if weight is None else weights * weight, reduction=reduction, **options)


@rule(F.cross_entropy, F.nll_loss)
def _cross_entropy(
    func: Function,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    size_average: bool | None = None,
    reduce: bool | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Any:
    reduction = _reduction(reduction, size_average, reduce)
    x, y = input, target
    if isinstance(weight, WeightedTensor):
        raise lost(func, x, y, weight, why="with a weight of classes that has weights")
    classes = 1 if x.ndim > 1 else 0
    shares = func is F.cross_entropy and y.shape == x.shape
    carried = [x.rows] if isinstance(x, WeightedTensor) else []
    if isinstance(y, WeightedTensor):
        carried.append(y.rows if shares else y.rows.insert(classes))
    rows = agreed_rows(func, carried, x, y)
    own = rows.remove((classes,))
    if own is None:
        raise lost(func, x, y, why="with classes of different weights")
    options: dict[str, Any] = {"ignore_index": ignore_index}
    if reduction == "none":
        if label_smoothing:
            options["label_smoothing"] = label_smoothing
        return carry(func(x, y, weight, reduction="none", **options), own)
    if label_smoothing and not shares:
        raise lost(
            func, x, y, why=f"with label_smoothing and reduction {reduction!r}; average the losses of reduction='none'"
        )
    if func is F.cross_entropy:
        x = x.float() if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64 else x
        x = F.log_softmax(x, classes)
    # Scaling the log-probabilities keeps nll_loss's own summation order and so its bits; scaling its output would not.
    x = scaled(x, rows.weights)
    if not shares:
        return F.nll_loss(x, y, weight, reduction=reduction, **options)
    size = x.size(classes)  # as torch computes it
    y = y * (1 - label_smoothing) + label_smoothing / size if label_smoothing else y
    terms = x * y if weight is None else x * y * weight.view([-1 if d == classes else 1 for d in range(x.ndim)])
    return -terms.sum() if reduction == "sum" else -terms.sum() / (x.numel() / size)
