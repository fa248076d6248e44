"""Merge the targets of two images: keep the boxes of both, each weighted by the share of its image."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detmix.mixing.join import as_alike, copied, join, join_alike, split
from detmix.mixing.plan import Mix, check_lam
from detmix.targets import BOX_KEYS, Target, count_entries, like, plain, take


def merge_targets(
    first: Target,
    second: Target,
    lam: float,
    canvas_size: tuple[int, int],
    *,
    shares: tuple[float, float] | None = None,
    min_weight: float = 0.0,
    box_keys: Collection[str] = BOX_KEYS,
) -> Target:
    """Merge two targets: concatenate what belongs to each box and scale the weights by the shares of the images.

    ``weights`` of the first are multiplied by ``lam``, those of the second by ``1 - lam``. A target without weights
    weighs every box 1. ``source`` says which image a box comes from: 0 for the first, 1 for the second. Boxes and
    keypoints keep their pixel coordinates. Boxes of the second are converted to the format of the first. Masks are
    padded to the canvas. Keys outside ``box_keys``, and values without entries such as a number, come from the first,
    by identity. A target without boxes need not have the other's keys.

    Args:
        first: Target with ``boxes`` ``(N1, 4)`` in pixels, or `tv_tensors.BoundingBoxes` of any format, and per-box
            keys: tensors, arrays or lists.
        second: Target with the same per-box keys. ``weights`` and ``source`` may be missing on either side.
        lam: Share of ``first``, in [0, 1].
        canvas_size: ``(height, width)`` of the blended image.
        shares: Factors of the weights of the first and of the second; ``(lam, 1 - lam)`` if ``None``.
        min_weight: Drop boxes whose weight would be below this. On CUDA this waits for the GPU if a target has weights
            of its own, or lists.
        box_keys: Keys that hold one entry per box.

    Returns:
        A new target with the first's boxes before the second's, float32 ``weights`` ``(N1 + N2,)``, int64 ``source``,
        ``lam``, ``shares`` and ``canvas``.

    Raises:
        ValueError: If a per-box key is missing on one side, its length is not the number of boxes, or its values cannot
            be concatenated.

    Example:
        >>> first = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([1])}
        >>> second = {"boxes": torch.tensor([[2.0, 1.0, 6.0, 3.0]]), "labels": torch.tensor([2])}
        >>> merged = merge_targets(first, second, 0.75, (8, 8))
        >>> merged["labels"], merged["weights"], merged["source"]
        (tensor([1, 2]), tensor([0.7500, 0.2500]), tensor([0, 1]))
    """
    check_lam(lam)
    mix = Mix(0, lam, (lam, 1 - lam) if shares is None else shares)
    return merge_by_plan([first], [mix], [canvas_size], pool=[second], min_weight=min_weight, box_keys=box_keys)[0]


def merge_by_plan(
    targets: Sequence[Target],
    plan: Sequence[Mix],
    canvases: Sequence[tuple[int, int]],
    *,
    pool: Sequence[Target] | None = None,
    min_weight: float = 0.0,
    box_keys: Collection[str] = BOX_KEYS,
) -> list[Target]:
    """Merge each target of a batch with its partner's, as `merge_targets` does, all in a few operations.

    Args:
        targets: B targets.
        plan: B mixes, checked already. An unmixed target is copied and gets the same keys, with weights of 1.
        canvases: For each sample ``(height, width)`` of the blended image.
        pool: Targets that the partners come from, if not from the batch.
        min_weight: See `merge_targets`.
        box_keys: See `merge_targets`.

    Returns:
        B new targets. Their values of one key can be parts of one tensor; see `detmix.mixing.join.join_alike`.

    Raises:
        ValueError: As `merge_targets`.

    Example:
        >>> target = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([1])}
        >>> merged = merge_by_plan([target] * 2, [Mix(1, 0.75, (0.75, 0.25)), Mix()], [(8, 8)] * 2)
        >>> [target["weights"] for target in merged]
        [tensor([0.7500, 0.2500]), tensor([1.])]
    """
    if not plan:
        return []
    box_keys = frozenset(box_keys)
    batch = _Batch(targets, plan, canvases, pool, min_weight)
    if len(plan) > 1 and not batch.is_uniform():
        others: Sequence[Target] = targets if pool is None else pool
        options: dict[str, Any] = {"min_weight": min_weight, "box_keys": box_keys}
        singles = []
        for target, mix, canvas in zip(targets, plan, canvases, strict=True):
            alone = [mix._replace(partner=min(mix.partner, 0))]
            singles += merge_by_plan([target], alone, [canvas], pool=[others[mix.partner]], **options)
        return singles
    weights, source = batch.weigh()
    merged = [dict(target) for target in targets]
    for key in dict.fromkeys([key for target in batch.targets for key in target]):
        if key in ("weights", "source"):
            continue
        values = [target.get(key) for target in batch.targets]
        if key not in box_keys:
            batch.check_is_per_image(key, values)
            continue
        for target, value in zip(merged, batch.join(key, values), strict=True):
            if value is not None:
                target[key] = value
            elif count_entries(target.get(key)) is not None:  # of a first without boxes, and unknown to the second
                del target[key]
    for i, (target, mix) in enumerate(zip(merged, batch.plan, strict=True)):
        target["weights"], target["source"] = weights[i], source[i]
        target["lam"], target["shares"], target["canvas"] = mix.lam, mix.shares, canvases[i]
    return merged


class _Batch:
    """Targets, which of them make up each sample, and how many boxes each side of a sample keeps."""

    def __init__(
        self,
        targets: Sequence[Target],
        plan: Sequence[Mix],
        canvases: Sequence[tuple[int, int]],
        pool: Sequence[Target] | None,
        min_weight: float,
    ) -> None:
        self.plan = [mix if mix.partner >= 0 else Mix() for mix in plan]
        self.canvases = canvases
        self.targets = list(targets)
        # For each sample the places of first and second among the targets, or of a first that is only copied.
        self.samples: list[list[int]] = []
        for i, mix in enumerate(self.plan):
            if mix.partner < 0:
                self.samples.append([i])
            elif pool is None:
                self.samples.append([i, mix.partner])
            else:
                self.samples.append([i, len(self.targets)])
                self.targets.append(pool[mix.partner])
        boxes = [plain(target["boxes"]) for target in self.targets]
        self.numbers = [rows.shape[0] for rows in boxes]
        self.devices = [rows.device for rows in boxes]
        self.own = [_own_weights(target) for target in self.targets]
        self.given = [weights for weights in self.own if weights is not None]
        self.kept = self._heavy_rows(min_weight) if min_weight > 0 else {}
        self.counts = [[self.numbers[place] for place in sides] for sides in self.samples]
        for (i, side), rows in self.kept.items():
            self.counts[i][side] = len(rows)
        self.sizes = [sum(counts) for counts in self.counts]

    def is_uniform(self) -> bool:
        """Tell whether samples can hold parts of one tensor: all on one device, and no weights that are learnt."""
        return len({*self.devices}) == 1 and not any(own.requires_grad for own in self.given)

    def weigh(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the weights and the source of each sample."""
        counts = np.array([count for counts in self.counts for count in counts])
        shares = [
            share for sides, mix in zip(self.samples, self.plan, strict=True) for share in mix.shares[: len(sides)]
        ]
        sources = [side for sides in self.samples for side in range(len(sides))]
        # Made on the CPU: a CUDA device gets one small copy of each, whatever the size of the batch.
        weights, source = (
            torch.from_numpy(np.repeat(np.array(values, dtype), counts)).to(self.devices[0], non_blocking=True)
            for values, dtype in ((shares, np.float32), (sources, np.int64))
        )
        if self.given:
            ones = weights.new_ones(max(self.numbers))
            own = [ones[:number] if own is None else own for own, number in zip(self.own, self.numbers, strict=True)]
            weights = torch.cat([*self.join("weights", own)]) * weights
        return split(weights, self.sizes), split(source, self.sizes)

    def join(self, key: str, values: Sequence[Any]) -> Sequence[Any]:
        """Join the values of a key for each sample; ``None`` for a sample that has nothing to join."""
        tensors = None if self.kept else as_alike(key, values, self.numbers)
        if tensors is None:
            return [self._join_one(key, i, [values[place] for place in sides]) for i, sides in enumerate(self.samples)]
        joined = join_alike(tensors, self.samples, self.sizes)
        if type(values[0]) is Tensor:
            return joined
        return [
            like(tensor, values[first], canvas if second else None)
            for tensor, (first, *second), canvas in zip(joined, self.samples, self.canvases, strict=True)
        ]

    def check_is_per_image(self, key: str, values: Sequence[Any]) -> None:
        """Check that a key that is not joined does not hold one entry per box."""
        # A value of the image has one length. A value that follows two different box counts belongs to the boxes.
        follows = [
            isinstance(value, (Tensor, list)) and count_entries(value) == number
            for value, number in zip(values, self.numbers, strict=True)
        ]
        for sides in self.samples if any(follows) else ():
            one, other = self.numbers[sides[0]], self.numbers[sides[-1]]
            if one != other and follows[sides[0]] and follows[sides[-1]]:
                raise ValueError(
                    f"{key!r} has one entry per box in both targets ({one} and {other}), but it is not among the keys "
                    f"that are joined, so it would go stale: add it to box_keys."
                )

    def _heavy_rows(self, min_weight: float) -> dict[tuple[int, int], Tensor]:
        """Find the rows that weigh enough, by sample and side. A side that is missing here keeps all."""
        kept = {}
        for i, (sides, mix) in enumerate(zip(self.samples, self.plan, strict=True)):
            for side, (place, share) in enumerate(zip(sides, mix.shares, strict=False)):
                own = self.own[place]
                if own is not None:
                    kept[i, side] = (own * share >= min_weight).nonzero()[:, 0]
                elif share < min_weight:  # without weights of their own, all boxes weigh the share
                    kept[i, side] = torch.zeros(0, dtype=torch.int64, device=self.devices[place])
        return kept

    def _join_one(self, key: str, i: int, values: list[Any]) -> Any:
        """Join the values of a key for one sample, whatever they are; ``None`` if there is nothing to join."""
        sides, counts = self.samples[i], [count_entries(value) for value in values]
        numbers = [self.numbers[place] for place in sides]
        having = [side for side, count in enumerate(counts) if count is not None]
        lacking = [side for side, count in enumerate(counts) if count is None]
        # A target without boxes may lack a key, or have one that the other lacks.
        if not having or (lacking and numbers[lacking[0]] and not numbers[having[0]] and not counts[having[0]]):
            return None
        for name, place, count, number in zip(("first", "second"), sides, counts, numbers, strict=False):
            if count is None and number:
                raise ValueError(
                    f"{key!r} has one entry per box, but the {name} target has none; it has "
                    f"{sorted(self.targets[place])}."
                )
            if count not in (None, number):
                raise ValueError(f"{key!r} of the {name} target has {count} entries for {number} boxes.")
        if lacking:
            values[lacking[0]] = values[having[0]][:0]
        for side in range(len(values)):
            if (i, side) in self.kept:
                values[side] = take(values[side], self.kept[i, side])
        first, *second = values
        return join(key, first, second[0], self.canvases[i]) if second else copied(first)


def _own_weights(target: Target) -> Tensor | None:
    given = target.get("weights")
    if given is None:
        return None
    weights = torch.as_tensor(given).to(target["boxes"].device, torch.float32, non_blocking=True)
    if weights.ndim != 1:
        raise ValueError(f"'weights' must have shape (num_boxes,), but have {tuple(weights.shape)}.")
    return weights
