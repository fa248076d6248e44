"""MixUp: draw who is mixed with whom and how much, then mix."""

import os
import random
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import get_worker_info

from detmix.mixing.batch import mixup_batch
from detmix.mixing.blend import blend_batch
from detmix.mixing.labels import mix_labels
from detmix.mixing.pairing import PAIRINGS, Pairing, pair
from detmix.mixing.plan import SHARES, Law, Mix, Placement, Range, check_law, draw_lam, is_range
from detmix.targets import BOX_KEYS, Target


class MixUp(nn.Module):
    """Mix every sample of a batch with another one of it, for object detection.

    The images are blended on a shared canvas without resizing, the boxes of both are kept, each with the share of its
    image in ``target["weights"]`` [arXiv:1902.04103, sec. 3.1]. Make the loss heed them with `detmix.weight_losses`.

    The module has no parameters, leaves its inputs alone and runs on the device the batch is on; on CUDA it never waits
    for the device, but where ``scale``, ``min_weight`` and ``pairing`` say so. It mixes whenever it is called, in
    ``eval()`` too: do not call it on validation data.

    Every target that comes out, mixed or not, holds ``weights`` (float32, one a box), ``source`` (int64, one a box: 0
    for its own box, 1 for the partner's) and the record of its mix: ``partner`` (the index in the batch, -1 if not
    mixed), ``lam`` and ``shares`` (floats), ``placement`` and ``canvas`` ``(height, width)``.
    `detmix.functional.mixup_batch` replays it. A second mix multiplies the weights and writes its own record.

    With a tensor of class labels in place of the targets it is the mixup of classification [arXiv:1710.09412], for
    images or entries of any other shape, and gives soft labels.

    Mix before the images are normalised, and a pixel that only one of two images covers is blended with black, as in
    the Bag of Freebies; after normalisation ``fill=0`` is the mean colour instead, and black is ``-mean / std`` a
    channel. torchvision's detectors normalise by themselves, so images in [0, 1] are what they and this want.

    Args:
        alpha: Of the law of ``lam``, Beta(alpha, alpha), or ``(a, b)`` for Beta(a, b). 1.5 is the Bag of Freebies'.
        p: The probability that a sample is mixed at all.
        lam: The law of ``lam`` in place of Beta: a constant, ``(low, high)`` for the uniform one, or a function of a
            `random.Random`. Draws are rounded to multiples of 2**-24, so that both shares are exact in float32.
        per_batch: Draw whether to mix, and ``lam``, once a batch instead of once a sample.
        box_weights: ``"lam"`` weighs boxes and labels by the shares of the images. ``"first"`` keeps those of first alone,
            the partner's weigh 0, with ``lam`` from Beta(alpha + 1, alpha) for a number alpha: in expectation the same
            loss [F. Huszar, "mixup: Data-dependent Data Augmentation", 2017]. ``"ones"`` leaves weights as they are, as
            YOLOX and mmdetection do.
        min_weight: Boxes that would weigh less are dropped; the objects are background then. Waits for a CUDA device
            only if targets come with weights, or with lists.
        pairing: ``"rotation"`` of the batch by a random number of places, ``"permutation"``, ``"reversal"``, or for
            each sample a random one of those that are there (``"random"``), that have boxes (``"with_boxes"``), a class
            in common (``"same_class"``) or none (``"different_class"``); or a function of ``(targets, pool, rng)``, see
            `detmix.mixing.pairing.Pairing`. Looking at classes waits for a CUDA device: call `make_plan` before the
            transfer, where that counts.
        scale: Jitter the second image, as YOLOX and RTMDet do: it is scaled by a random factor between these two, as a
            multiple of the size that just fits, and laid at a random place of the first's canvas; see
            `detmix.mixing.placement.place`. Waits for a CUDA device, as boxes that leave the canvas are dropped.
        fill: The value of a pixel that an image does not cover: one number, or one a channel.
        start: The first epoch, counted from 0, that mixes; see `set_epoch`.
        stop: The first epoch that does not any more; ``None`` mixes to the end.
        ramp: Over so many epochs from ``start`` the probability rises in equal steps to ``p``.
        box_keys: Names of further target keys with one entry per box, besides `detmix.functional.BOX_KEYS`.
        num_classes: Of integer class labels, for classification.
        inplace: Write the mix into the batch tensor it gets.
        seed: The draws depend on it, the epoch, the rank and the number of the batch in the epoch, and on nothing else;
            save and restore that number with ``state_dict``. ``None`` draws from torch's default CPU generator and the
            rank, so ``torch.manual_seed`` decides.

    Raises:
        ValueError: if an argument is outside its range; when called, if the batch is inconsistent.

    Example:
        >>> images = [torch.rand(3, 32, 48), torch.rand(3, 40, 24)]
        >>> targets = [
        ...     {"boxes": torch.tensor([[2.0, 3.0, 20.0, 30.0]]), "labels": torch.tensor([1])},
        ...     {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
        ... ]
        >>> images, targets = MixUp()(images, targets)
        >>> [tuple(image.shape) for image in images], [len(target["weights"]) for target in targets]
        ([(3, 40, 48), (3, 40, 48)], [1, 1])
    """

    def __init__(
        self,
        alpha: float | Range = 1.5,
        p: float = 1.0,
        *,
        lam: Law = None,
        per_batch: bool = False,
        box_weights: Literal["lam", "first", "ones"] = "lam",
        min_weight: float = 0.0,
        pairing: str | Pairing = "rotation",
        scale: Range | None = None,
        fill: float | Sequence[float] = 0.0,
        start: int = 0,
        stop: int | None = None,
        ramp: int = 0,
        box_keys: Iterable[str] = (),
        num_classes: int | None = None,
        inplace: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.alpha, self.p, self.lam, self.per_batch = alpha, p, lam, per_batch
        self.box_weights, self.min_weight = box_weights, min_weight
        self.pairing, self.scale, self.fill = pairing, scale, fill
        self.start, self.stop, self.ramp = start, stop, ramp
        self.box_keys = BOX_KEYS | frozenset(box_keys)
        self.num_classes, self.inplace, self.seed = num_classes, inplace, seed
        self._check_arguments()
        # The epoch and the rank. Workers hold copies of this object; what lies in shared memory reaches them all.
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._drawn = (0, 0)  # an epoch, and the batches drawn in it
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next batches belong to, in this process and in workers that are already running.

        Call it before each epoch, if there is a schedule or a seed.
        """
        self._shared[0] = epoch
        self._shared[1] = _rank()

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0."""
        return int(self._shared[0])

    def probability(self, epoch: int | None = None) -> float:
        """The probability that a sample is mixed in an epoch: this one, if ``None``.

        Example:
            >>> mixup = MixUp(p=0.8, start=1, ramp=2, stop=5)
            >>> [mixup.probability(epoch) for epoch in range(6)]
            [0.0, 0.4, 0.8, 0.8, 0.8, 0.0]
        """
        epoch = self.epoch if epoch is None else epoch
        if epoch < self.start or (self.stop is not None and epoch >= self.stop):
            return 0.0
        return self.p * min(1.0, (epoch - self.start + 1) / max(1, self.ramp))

    def make_plan(self, targets: Sequence[Any] | Tensor, pool: Sequence[Any] | Tensor | None = None) -> list[Mix]:
        """Draw the plan for a batch: a partner and a share for each sample.

        Args:
            targets: B targets, or class labels ``(B,)``.
            pool: The targets of a second pool, where the partners come from that.

        Returns:
            B plans. A sample that finds no partner is left as it is.

        Example:
            >>> MixUp(lam=0.75, pairing="reversal").make_plan([{}, {}])[0]
            Mix(partner=1, lam=0.75, shares=(0.75, 0.25), placement=None)
        """
        if not isinstance(targets, Tensor) and (wrong := [t for t in targets if not isinstance(t, dict)]):
            raise TypeError(
                f"targets must be dicts, or one tensor of class labels, but hold a {type(wrong[0]).__name__}."
            )
        worker = get_worker_info()
        rng = self.make_rng("batch", 0 if worker is None else worker.id, self._count_batch())
        partners = pair(self.pairing, targets, pool, rng)
        probability = self.probability()
        drawn = [self.draw(rng, probability) for _ in targets]
        if self.per_batch:
            drawn = [mix._replace(lam=drawn[0].lam, shares=drawn[0].shares) for mix in drawn]
        return [
            Mix() if j < 0 or mix.lam == 1 else mix._replace(partner=j) for j, mix in zip(partners, drawn, strict=True)
        ]

    def make_rng(self, *key: Any) -> random.Random:
        """A stream of draws, on the CPU, the same whatever device the batch is on.

        With a seed it depends on that, the epoch, the rank and ``key``; without one, on torch's generator and the rank.
        """
        if get_worker_info() is None:
            self._shared[1] = _rank()
        epoch, rank = self._shared.tolist()
        if self.seed is None:
            return random.Random(f"{int(torch.randint(2**63 - 1, ()))} {rank}")
        return random.Random(f"{self.seed} {epoch} {rank} {key}")

    def draw(self, rng: random.Random, probability: float | None = None) -> Mix:
        """One sample's share, and the place of its partner, without saying who that is; ``lam`` is 1 if not mixed.

        Args:
            rng: Where the draws come from.
            probability: That it is mixed at all; this epoch's, if ``None``.
        """
        mixed = rng.random() < (self.probability() if probability is None else probability)
        lam = self._draw_lam(rng)
        placement = None if self.scale is None else Placement(rng.uniform(*self.scale), rng.random(), rng.random())
        return Mix(-1, lam, SHARES[self.box_weights](lam), placement) if mixed else Mix()

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        targets: Sequence[Target] | Tensor,
        plan: Sequence[Mix] | None = None,
        *,
        pool: tuple[Any, Any] | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor | list[Tensor], list[Target] | Tensor]:
        """Mix a batch.

        Args:
            images: A batch ``(B, C, H, W)``, or a sequence of B images ``(C, H_i, W_i)`` of any sizes; floating
                point in any range, or integer. With class labels, a batch ``(B, ...)``.
            targets: B dicts with ``boxes`` ``(num_boxes, 4)`` in pixels and what else belongs to each box; or class
                labels, integers ``(B,)`` or shares ``(B, num_classes)``.
            plan: The mixes to replay; drawn with `make_plan` if ``None``.
            pool: Images and targets that the partners are taken from, the targets ``None`` if there are none; the batch
                itself if ``None``.
            out: A batch tensor to write the mix into, also that of a sequence of images whose mixes are of one size:
                memory of the caller's, for a loop that uses it again, or a ``collate_fn`` that would stack.

        Returns:
            Images, a tensor for a tensor and a list for a sequence, ``out`` if given, and new targets, or soft labels.
        """
        if pool is not None and pool[1] is None:
            pool = (pool[0], [{}] * len(pool[0]))
        plan = self.make_plan(targets, None if pool is None else pool[1]) if plan is None else plan
        if not isinstance(targets, Tensor):
            options: dict[str, Any] = {"fill": self.fill, "min_weight": self.min_weight, "box_keys": self.box_keys}
            return mixup_batch(images, targets, plan, pool=pool, inplace=self.inplace, out=out, **options)
        if not isinstance(images, Tensor) or self.scale is not None:
            raise TypeError("class labels go with one batch tensor, and with no scale; detection targets are dicts.")
        entries, labels = (None, None) if pool is None else pool
        soft = mix_labels(targets, plan, num_classes=self.num_classes, pool=labels)
        partners, lams = [mix.partner for mix in plan], [mix.lam for mix in plan]
        memory: dict[str, Any] = {"inplace": self.inplace, "out": out}
        return blend_batch(images, partners, lams, pool=entries, fill=self.fill, **memory), soft

    def get_extra_state(self) -> dict[str, Any]:
        """Where the draws stand, for ``state_dict``: the epoch and the batches drawn in it."""
        return {"epoch": self.epoch, "drawn": list(self._drawn)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on where ``get_extra_state`` was called."""
        self.set_epoch(state["epoch"])
        self._drawn = (state["drawn"][0], state["drawn"][1])

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        law = f"alpha={self.alpha}" if self.lam is None else f"lam={self.lam}"
        return f"{law}, p={self.p}, box_weights={self.box_weights!r}, pairing={self.pairing!r}, fill={self.fill}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._shared.share_memory_()  # a copy's own, so its workers hear of epochs too

    def _count_batch(self) -> int:
        epoch, count = self._drawn
        count = count if epoch == self.epoch else 0
        self._drawn = (self.epoch, count + 1)
        return count

    def _draw_lam(self, rng: random.Random) -> float:
        alpha = self.alpha
        if self.box_weights == "first" and isinstance(alpha, int | float):
            alpha = (alpha + 1, alpha)
        return draw_lam(rng, alpha, self.lam)

    def _check_arguments(self) -> None:
        check_law(self.alpha, self.lam)
        scale = (1.0, 1.0) if self.scale is None else self.scale
        stop = self.start if self.stop is None else self.stop
        for name, fits, expected in (
            ("p", 0 <= self.p <= 1, "a probability, in [0, 1]"),
            ("box_weights", self.box_weights in SHARES, f"one of {list(SHARES)}"),
            ("min_weight", 0 <= self.min_weight <= 1, "in [0, 1]"),
            ("pairing", callable(self.pairing) or self.pairing in PAIRINGS, f"a function or one of {list(PAIRINGS)}"),
            ("scale", is_range(scale) and min(scale) > 0, "(low, high), both positive"),
            ("start", self.start >= 0, "an epoch, 0 or more"),
            ("stop", stop >= self.start, f"no epoch before start, {self.start}"),
            ("ramp", self.ramp >= 0, "a number of epochs, 0 or more"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {expected}, but it is {getattr(self, name)!r}.")


def _rank() -> int:
    """The number of this process among those that train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", 0))
