"""Join the targets of a whole batch at once: the work behind `detmix.targets`."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detmix.mixing.join import as_alike, copied, join, join_alike, split
from detmix.mixing.plan import check_lam
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
    """Join what belongs to each box of two targets and scale the boxes' weights by their image's share.

    ``weights`` of the first are multiplied by ``lam``, those of the second by ``1 - lam``; a target without weights
    weighs every box 1. ``source`` says which image a box came from: 0 for the first, 1 for the second. Boxes and
    keypoints keep their pixel coordinates, the second's boxes are converted to the first's format, masks are padded to
    the canvas. Keys outside ``box_keys`` are the first's, by identity, and so is a value without count_entries, such as a
    number, whatever its key. A target with no boxes need not have the other's keys.

    Args:
        first: Target with ``boxes`` ``(N1, 4)`` in pixels (or any `tv_tensors.BoundingBoxes`, rotated ones included)
            and per-box keys: tensors, arrays or lists.
        second: Target with the same per-box keys; ``weights`` and ``source`` may be missing on either side.
        lam: The share of ``first``, in [0, 1].
        canvas_size: ``(height, width)`` of the blended image.
        shares: What the weights of the first's and the second's boxes are multiplied by; ``(lam, 1 - lam)`` if
            ``None``.
        min_weight: Boxes that would weigh less are dropped. On CUDA that waits for the device if a target comes with
            weights of its own, or with lists.
        box_keys: The names of the keys that have one entry per box.

    Returns:
        A new target, first's boxes before second's, with float32 ``weights`` ``(N1 + N2,)``, int64 ``source``,
        and ``lam``, ``shares`` and ``canvas``.

    Raises:
        ValueError: if a per-box key is missing on one side, its length is not the number of boxes, or its values cannot
            be one.

    Example:
        >>> first = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([1])}
        >>> second = {"boxes": torch.tensor([[2.0, 1.0, 6.0, 3.0]]), "labels": torch.tensor([2])}
        >>> merged = merge_targets(first, second, 0.75, (8, 8))
        >>> merged["labels"], merged["weights"], merged["source"]
        (tensor([1, 2]), tensor([0.7500, 0.2500]), tensor([0, 1]))
    """
    shares = (lam, 1 - lam) if shares is None else shares
    options: dict[str, Any] = {"min_weight": min_weight, "box_keys": box_keys}
    return merge_batch([first, second], [[0, 1]], [lam], [shares], [canvas_size], **options)[0]


def unmixed_target(
    target: Target, canvas_size: tuple[int, int], *, min_weight: float = 0.0, box_keys: Collection[str] = BOX_KEYS
) -> Target:
    """A copy of a target with the keys that `merge_targets` writes."""
    options: dict[str, Any] = {"min_weight": min_weight, "box_keys": box_keys}
    return merge_batch([target], [[0]], [1.0], [(1.0, 0.0)], [canvas_size], **options)[0]


def merge_batch(
    targets: Sequence[Target],
    samples: Sequence[Sequence[int]],
    lams: Sequence[float],
    shares: Sequence[tuple[float, float]],
    canvases: Sequence[tuple[int, int]],
    *,
    min_weight: float = 0.0,
    box_keys: Collection[str] = BOX_KEYS,
) -> list[Target]:
    """Do for each sample of a batch what `detmix.mixing.merge.merge_targets` does for one, in no more operations.

    Args:
        targets: All that take part.
        samples: For each sample the places of first and second among the targets, or of a first that is only copied.
        lams: For each sample the share of first, in [0, 1].
        shares: For each sample what the weights of the boxes of first and second are multiplied by.
        canvases: For each sample ``(height, width)`` of the blended image.
        min_weight: See `detmix.mixing.merge.merge_targets`.
        box_keys: See `detmix.mixing.merge.merge_targets`.

    Returns:
        A new target for each sample. What they hold of a key can be parts of one tensor; see
        `detmix.mixing.join.join_alike`.

    Raises:
        ValueError: as `detmix.mixing.merge.merge_targets`.

    Example:
        >>> target = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([1])}
        >>> merged = merge_batch([target], [[0, 0], [0]], [0.75, 1.0], [(0.75, 0.25), (1.0, 0.0)], [(8, 8)] * 2)
        >>> [target["weights"] for target in merged]
        [tensor([0.7500, 0.2500]), tensor([1.])]
    """
    if not samples:
        return []
    box_keys = frozenset(box_keys)
    for lam in lams:
        check_lam(lam)
    batch = _Batch(targets, samples, shares, canvases, min_weight)
    if len(samples) > 1 and not batch.is_uniform():
        options: dict[str, Any] = {"min_weight": min_weight, "box_keys": box_keys}
        return [
            merge_batch([targets[j] for j in sides], [range(len(sides))], [lam], [both], [canvas], **options)[0]
            for sides, lam, both, canvas in zip(samples, lams, shares, canvases, strict=True)
        ]
    weights, source = batch.weigh()
    merged = [{**targets[sides[0]]} for sides in samples]
    for key in dict.fromkeys([key for target in targets for key in target]):
        if key in ("weights", "source"):
            continue
        values = [target.get(key) for target in targets]
        if key not in box_keys:
            batch.check_is_per_image(key, values)
            continue
        for target, value in zip(merged, batch.join(key, values), strict=True):
            if value is not None:
                target[key] = value
            elif count_entries(target.get(key)) is not None:  # of a first without boxes, and unknown to the second
                del target[key]
    for i, target in enumerate(merged):
        target["weights"], target["source"] = weights[i], source[i]
        target["lam"], target["shares"], target["canvas"] = lams[i], shares[i], canvases[i]
    return merged


class _Batch:
    """The targets of a batch, how samples are made up of them, and how many boxes each side of a sample keeps."""

    def __init__(
        self,
        targets: Sequence[Target],
        samples: Sequence[Sequence[int]],
        shares: Sequence[tuple[float, float]],
        canvases: Sequence[tuple[int, int]],
        min_weight: float,
    ) -> None:
        self.targets, self.samples, self.shares, self.canvases = targets, samples, shares, canvases
        boxes = [plain(target["boxes"]) for target in targets]
        self.numbers = [rows.shape[0] for rows in boxes]
        self.devices = [rows.device for rows in boxes]
        self.own = [_own_weights(target) for target in targets]
        self.given = [weights for weights in self.own if weights is not None]
        self.kept = self._heavy_rows(min_weight) if min_weight > 0 else {}
        self.counts = [[self.numbers[place] for place in sides] for sides in samples]
        for (i, side), rows in self.kept.items():
            self.counts[i][side] = len(rows)
        self.sizes = [sum(counts) for counts in self.counts]

    def is_uniform(self) -> bool:
        """Whether the samples can hold parts of one tensor: not on several devices, nor if some weights are learnt."""
        return len({*self.devices}) == 1 and not any(own.requires_grad for own in self.given)

    def weigh(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The weights and the source of each sample."""
        counts = np.array([count for counts in self.counts for count in counts])
        shares = [share for sides, both in zip(self.samples, self.shares, strict=True) for share in both[: len(sides)]]
        sources = [side for sides in self.samples for side in range(len(sides))]
        # Made on the host: a CUDA device gets one small copy of each, whatever the size of the batch.
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
        """What the targets hold of a key, joined for each sample; ``None`` for one that has nothing to join."""
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
        """Check that a key that is not joined does not have one entry per box."""
        # A field of one entry an image has one length; one that follows two different box counts belongs to the boxes.
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
        """The rows that weigh enough, by sample and side; a side that is not there keeps all."""
        kept = {}
        for i, (sides, both) in enumerate(zip(self.samples, self.shares, strict=True)):
            for side, (place, share) in enumerate(zip(sides, both, strict=False)):
                own = self.own[place]
                if own is not None:
                    kept[i, side] = (own * share >= min_weight).nonzero()[:, 0]
                elif share < min_weight:  # without weights of their own all weigh the share, which the host knows
                    kept[i, side] = torch.zeros(0, dtype=torch.int64, device=self.devices[place])
        return kept

    def _join_one(self, key: str, i: int, values: list[Any]) -> Any:
        """What one sample holds of a key, whatever that is; ``None`` if there is nothing to join."""
        sides, counts = self.samples[i], [count_entries(value) for value in values]
        numbers = [self.numbers[place] for place in sides]
        having = [side for side, count in enumerate(counts) if count is not None]
        lacking = [side for side, count in enumerate(counts) if count is None]
        # No boxes is no reason to lack a key, nor to have one.
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
