"""Mix class labels by a plan."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detmix.mixing.plan import Mix


def mix_labels(
    labels: Tensor, plan: Sequence[Mix], *, num_classes: int | None = None, pool: Tensor | None = None
) -> Tensor:
    """Mix class labels by a plan: the soft labels of classification [arXiv:1710.09412, sec. 2].

    Args:
        labels: Classes ``(B,)``, integers from 0, or one-hot or soft labels ``(B, num_classes)``.
        plan: For each entry what is done to it.
        num_classes: Needed for integer labels.
        pool: The labels that the partners come from, if they do not come from the batch.

    Returns:
        Soft labels ``(B, num_classes)``, floating point: float32 for integers.

    Raises:
        ValueError: if labels are neither, or a class lies outside 0..num_classes - 1.

    Example:
        >>> mix_labels(torch.tensor([0, 2]), [Mix(1, 0.75, (0.75, 0.25)), Mix()], num_classes=3)
        tensor([[0.7500, 0.0000, 0.2500],
                [0.0000, 0.0000, 1.0000]])
    """
    first = _one_hot(labels, num_classes, "labels")
    others = first if pool is None else _one_hot(pool, num_classes, "labels of the pool")
    if not len(first) == len(plan):
        raise ValueError(f"plan must say what is done to each of {len(first)} labels, but has {len(plan)} entries.")
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
