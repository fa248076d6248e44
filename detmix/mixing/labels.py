"""Mix class labels by a plan, for classification."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detmix.mixing.plan import Mix, check_plan


def mix_labels(
    labels: Tensor, plan: Sequence[Mix], *, num_classes: int | None = None, pool: Tensor | None = None
) -> Tensor:
    """Mix class labels by a plan and return soft labels [arXiv:1710.09412, sec. 2].

    Args:
        labels: Classes ``(B,)``, integers from 0, or one-hot or soft labels ``(B, num_classes)``.
        plan: B mixes.
        num_classes: Number of classes. Required for integer labels.
        pool: Labels that the partners come from, if not from the batch.

    Returns:
        Soft labels ``(B, num_classes)``, floating point; float32 for integer labels.

    Raises:
        ValueError: If labels have another form, a class lies outside 0..num_classes - 1, or the plan does not fit.

    Example:
        >>> mix_labels(torch.tensor([0, 2]), [Mix(1, 0.75, (0.75, 0.25)), Mix()], num_classes=3)
        tensor([[0.7500, 0.0000, 0.2500],
                [0.0000, 0.0000, 1.0000]])
    """
    check_plan(plan, len(labels), len(labels if pool is None else pool))
    return mix_labels_by_plan(labels, plan, num_classes=num_classes, pool=pool)


def mix_labels_by_plan(
    labels: Tensor, plan: Sequence[Mix], *, num_classes: int | None = None, pool: Tensor | None = None
) -> Tensor:
    """Mix class labels as `mix_labels` does, by a plan that is checked already."""
    first = _one_hot(labels, num_classes, "labels")
    others = first if pool is None else _one_hot(pool, num_classes, "labels of the pool")
    if first.shape[1:] != others.shape[1:]:
        raise ValueError(
            f"labels and those of the pool must have the same classes, but have {first.shape[1]} and {others.shape[1]}."
        )
    shares = torch.tensor([mix.shares for mix in plan], dtype=first.dtype).reshape(-1, 2)
    rows = torch.tensor([mix.partner for mix in plan], dtype=torch.int64)
    shares, rows = shares.to(first.device, non_blocking=True), rows.to(first.device, non_blocking=True)
    return shares[:, :1] * first + (shares[:, 1:] * others[rows] if len(plan) else 0)


def _one_hot(labels: Tensor, num_classes: int | None, name: str) -> Tensor:
    if labels.ndim == 2:
        return labels if labels.is_floating_point() else labels.float()
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"{name} must be classes (B,), integers, or soft labels (B, num_classes), but are "
            f"{tuple(labels.shape)} {labels.dtype}."
        )
    if num_classes is None:
        raise ValueError(f"num_classes must be given to mix integer {name}.")
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"{name} must lie in 0..{num_classes - 1}, but go from {int(labels.min())} to {int(labels.max())}."
        )
    return F.one_hot(labels.long(), num_classes).float()
