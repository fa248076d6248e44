"""Choose a partner for each sample of a batch."""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Pairing = Callable[[Any, Any, random.Random], Sequence[int]]
"""``pairing(targets, pool, rng)`` returns, for each target, the index of its partner in the pool, or -1 for none.

The pool is ``targets`` itself if the partners come from the batch."""


def rotation(targets: Sequence[Any], pool: Sequence[Any], rng: random.Random) -> list[int]:
    """Rotate the batch by a random offset. Each sample is a partner once, and none its own."""
    if not len(pool) or (pool is targets and len(pool) == 1):
        return [-1] * len(targets)
    shift = rng.randrange(1 if pool is targets else 0, len(pool))
    return [(i + shift) % len(pool) for i in range(len(targets))]


def permutation(targets: Sequence[Any], pool: Sequence[Any], rng: random.Random) -> list[int]:
    """Permute the batch at random, without fixed points. Each sample is a partner once, and none its own."""
    if not len(pool) or (pool is targets and len(pool) == 1):
        return [-1] * len(targets)
    while True:
        # A shuffle has no fixed point with probability 1/e, so this takes 2.7 tries on average.
        order = [j for _ in range(-(-len(targets) // len(pool))) for j in rng.sample(range(len(pool)), len(pool))]
        if pool is not targets or all(i != j for i, j in enumerate(order)):
            return order[: len(targets)]


def reversal(targets: Sequence[Any], pool: Sequence[Any], rng: random.Random) -> list[int]:
    """Pair the first with the last, as timm does. The middle sample of an odd batch has no partner."""
    size = len(pool)
    partners = [size - 1 - i % size for i in range(len(targets))] if size else [-1] * len(targets)
    return [-1 if pool is targets and i == j else j for i, j in enumerate(partners)]


def classes_of(target: Any) -> set[int]:
    """Return the classes of a detection target, or of a class label: a number, or a row of shares. Waits for a GPU."""
    if isinstance(target, Mapping):
        return set(torch.as_tensor(target.get("labels", target.get("class_labels", ()))).tolist())
    label = torch.as_tensor(target)
    return set(label.nonzero()[:, 0].tolist()) if label.ndim else {int(label)}


def has_boxes(target: Any) -> bool:
    """Tell whether a detection target has a box."""
    return len(target.get("boxes", ())) > 0


CONDITIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], bool]]] = {
    "random": (lambda target: None, lambda first, second: True),
    "with_boxes": (has_boxes, lambda first, second: second),
    "same_class": (classes_of, lambda first, second: bool(first & second)),
    "different_class": (classes_of, lambda first, second: not first & second),
}
"""Conditions for a partner: what to read from each target, and a function that tells whether two of them fit."""


def conditional(name: str, targets: Sequence[Any], pool: Sequence[Any], rng: random.Random) -> list[int]:
    """Choose, for each sample, one of those that meet a condition, all with the same probability; -1 if none does."""
    look, fits = CONDITIONS[name]
    seen = [look(target) for target in pool]
    mine = seen if pool is targets else [look(target) for target in targets]
    allowed = [
        [j for j, second in enumerate(seen) if fits(first, second) and not (pool is targets and i == j)]
        for i, first in enumerate(mine)
    ]
    return [rng.choice(choice) if choice else -1 for choice in allowed]


PAIRINGS: dict[str, Pairing] = {
    "rotation": rotation,
    "permutation": permutation,
    "reversal": reversal,
    **{name: partial(conditional, name) for name in CONDITIONS},
}
"""Pairings by name."""


def pair(
    pairing: str | Pairing, targets: Sequence[Any] | Tensor, pool: Sequence[Any] | Tensor | None, rng: random.Random
) -> list[int]:
    """Choose a partner for each target. Check the choice of a pairing that is not ours.

    Args:
        pairing: One of `PAIRINGS`, or a function of the same signature.
        targets: Detection targets, or class labels.
        pool: Targets of the partners, if they do not come from ``targets``.
        rng: Source of randomness.

    Returns:
        The index of each target's partner, -1 for none.

    Raises:
        ValueError: If a function returns anything else, or a sample itself.

    Example:
        >>> pair("reversal", [{}, {}, {}], None, random.Random(0))
        [2, -1, 0]
    """
    candidates = targets if pool is None else pool
    if isinstance(pairing, str):
        return [*PAIRINGS[pairing](targets, candidates, rng)]
    chosen = pairing(targets, candidates, rng)
    partners = chosen.tolist() if isinstance(chosen, Tensor) else [int(j) for j in chosen]
    if len(partners) != len(targets):
        raise ValueError(f"pairing must give a partner for each of {len(targets)} samples, but gave {len(partners)}.")
    for i, j in enumerate(partners):
        if not -1 <= j < len(candidates) or (pool is None and i == j):
            raise ValueError(
                f"pairing must give -1 or the index of another of the {len(candidates)} samples, but gave {j} for "
                f"sample {i}."
            )
    return partners
