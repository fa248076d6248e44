"""Who is mixed with whom: ways to choose a partner for each sample of a batch."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Pairing = Callable[[Any, Any, random.Random], Sequence[int]]
"""``pairing(targets, pool, rng)``: for each target the index of its partner in the pool, or -1 for none.

The pool is ``targets`` itself where the partners come from the batch."""


def rotation(targets: Sequence[Any], pool: Sequence[Any], rng: random.Random) -> list[int]:
    """Everyone with the one a random number of places further on: each is a partner once, none its own."""
    if not len(pool) or (pool is targets and len(pool) == 1):
        return [-1] * len(targets)
    shift = rng.randrange(1 if pool is targets else 0, len(pool))
    return [(i + shift) % len(pool) for i in range(len(targets))]


def permutation(targets: Sequence[Any], pool: Sequence[Any], rng: random.Random) -> list[int]:
    """A random permutation without fixed points, each of them as likely: each is a partner once, none its own."""
    if not len(pool) or (pool is targets and len(pool) == 1):
        return [-1] * len(targets)
    while True:
        # A shuffle has no fixed point with probability 1/e, so this takes 2.7 of them.
        order = [j for _ in range(-(-len(targets) // len(pool))) for j in rng.sample(range(len(pool)), len(pool))]
        if pool is not targets or all(i != j for i, j in enumerate(order)):
            return order[: len(targets)]


def reversal(targets: Sequence[Any], pool: Sequence[Any], rng: random.Random) -> list[int]:
    """The first with the last, as timm's: the middle one of an odd batch has no partner."""
    size = len(pool)
    partners = [size - 1 - i % size for i in range(len(targets))] if size else [-1] * len(targets)
    return [-1 if pool is targets and i == j else j for i, j in enumerate(partners)]


def classes_of(target: Any) -> set[int]:
    """The classes in a detection target, or of a class label: a number, or a row of shares. Waits for a CUDA device."""
    if isinstance(target, dict):
        return set(torch.as_tensor(target.get("labels", ())).tolist())
    label = torch.as_tensor(target)
    return set(label.nonzero()[:, 0].tolist()) if label.ndim else {int(label)}


def has_boxes(target: Any) -> bool:
    """Whether a detection target has any box."""
    return len(target.get("boxes", ())) > 0


CONDITIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], bool]]] = {
    "random": (lambda target: None, lambda first, second: True),
    "with_boxes": (has_boxes, lambda first, second: second),
    "same_class": (classes_of, lambda first, second: bool(first & second)),
    "different_class": (classes_of, lambda first, second: not first & second),
}
"""What a partner must be: what is looked at in each target, and whether two of them go together."""


def conditional(name: str, targets: Sequence[Any], pool: Sequence[Any], rng: random.Random) -> list[int]:
    """For each sample one of those that meet a condition, each as likely; none if there are none."""
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
"""The ways to pair a batch, by name."""


def pair(
    pairing: str | Pairing, targets: Sequence[Any] | Tensor, pool: Sequence[Any] | Tensor | None, rng: random.Random
) -> list[int]:
    """Choose a partner for each target and check the choice.

    Args:
        pairing: One of `PAIRINGS`, or a function of the same signature.
        targets: Detection targets, or class labels.
        pool: Those of the partners, if they do not come from ``targets``.
        rng: Where the draws come from.

    Returns:
        For each target the index of its partner, -1 for none.

    Raises:
        ValueError: if a function gives anything else, or a sample itself.

    Example:
        >>> pair("reversal", [{}, {}, {}], None, random.Random(0))
        [2, -1, 0]
    """
    choose = PAIRINGS[pairing] if isinstance(pairing, str) else pairing
    candidates = targets if pool is None else pool
    partners = choose(targets, candidates, rng)
    partners = partners.tolist() if isinstance(partners, Tensor) else [int(j) for j in partners]
    if len(partners) != len(targets):
        raise ValueError(f"pairing must give a partner for each of {len(targets)} samples, but gave {len(partners)}.")
    for i, j in enumerate(partners):
        if not -1 <= j < len(candidates) or (pool is None and i == j):
            raise ValueError(
                f"pairing must give -1 or the index of another of the {len(candidates)} samples, but gave {j} for "
                f"sample {i}."
            )
    return partners
