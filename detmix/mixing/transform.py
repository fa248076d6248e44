"""Draw who is mixed with whom and how much, then mix: the transform `MixUp`."""

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import get_worker_info

from detmix.mixing.batch import check_memory, check_samples, mix_by_plan
from detmix.mixing.blend import blend_by_plan
from detmix.mixing.labels import mix_labels_by_plan
from detmix.mixing.pairing import PAIRINGS, Pairing, pair
from detmix.mixing.plan import SHARES, Law, Mix, Placement, Range, check_law, check_plan, draw_lam, is_range
from detmix.targets import BOX_KEYS, Target


class MixUp(nn.Module):
    """Mix every sample of a batch with another one, for object detection.

    Blends the images on a shared canvas without resizing and keeps the boxes of both. Each box gets the share of its
    image in ``target["weights"]`` [arXiv:1902.04103, sec. 3.1]. `detmix.weight_losses` makes a detector's loss use it.

    The module has no parameters, does not change its inputs, and runs on the device of the batch. On CUDA it never
    waits for the GPU, except for ``scale``, ``min_weight`` and ``pairing`` as described there. It is not disabled by
    ``eval()``: call it on training batches only.

    Every target that it returns, mixed or not, holds ``weights`` (float32, one per box), ``source`` (int64, one per
    box: 0 for its own box, 1 for the partner's) and a record of the mix: ``partner`` (index in the batch, -1 if not
    mixed), ``lam`` and ``shares`` (floats), ``placement``, and ``canvas`` ``(height, width)``.
    `detmix.functional.mixup_batch` replays it. A second mix multiplies the weights and writes its own record.

    With a tensor of class labels instead of targets it is the mixup of classification [arXiv:1710.09412], for images or
    entries of any shape, and returns soft labels.

    Mix before the images are normalised: a pixel that only one image covers is then blended with black, as in the Bag
    of Freebies. After normalisation ``fill=0`` is the mean colour, and black is ``-mean / std`` per channel.
    torchvision's detectors normalise inside and take images in [0, 1].

    Args:
        alpha: Parameter of the Beta distribution that ``lam`` is drawn from, Beta(alpha, alpha); ``(a, b)`` for
            Beta(a, b). 1.5 is the value of the Bag of Freebies.
        p: Probability that a sample is mixed.
        lam: Distribution of ``lam`` instead of Beta: a constant, ``(low, high)`` for a uniform draw, or a function of a
            `random.Random`. Draws are rounded to multiples of 2**-24, so that both shares are exact in float32.
        per_batch: Draw once per batch whether to mix, and ``lam``, instead of once per sample.
        box_weights: ``"lam"`` weights boxes and labels by the shares of the images. ``"first"`` keeps the boxes of the
            first image at full weight and gives the partner's 0, with ``lam`` from Beta(alpha + 1, alpha) for a number
            alpha. The expected loss is the same [F. Huszar, "mixup: Data-dependent Data Augmentation", 2017].
            ``"ones"`` does not scale weights, as YOLOX and mmdetection.
        min_weight: Drop boxes whose weight would be below this. Their objects become background. Waits for the GPU only
            if targets have weights of their own, or lists.
        pairing: ``"rotation"`` of the batch by a random offset, ``"permutation"``, ``"reversal"``; or a random choice
            among all samples (``"random"``), those with boxes (``"with_boxes"``), with a class in common
            (``"same_class"``) or with none (``"different_class"``); or a function, see `detmix.mixing.pairing.Pairing`.
            Reading classes waits for the GPU. Call `make_plan` before the transfer if that matters.
        scale: Scale the second image by a random factor between these two, as a multiple of the size that just fits,
            and lay it at a random place of the first's canvas, as YOLOX and RTMDet do; see
            `detmix.mixing.placement.place`. Waits for the GPU, since boxes that leave the canvas are dropped.
        fill: Value of pixels that an image does not cover: one number, or one per channel.
        start: First epoch that mixes, counted from 0; see `set_epoch`.
        stop: First epoch that no longer mixes; ``None`` mixes to the end.
        ramp: Number of epochs, from ``start``, over which the probability rises in equal steps to ``p``.
        box_keys: Further target keys that hold one entry per box, besides `detmix.functional.BOX_KEYS`.
        num_classes: Number of classes of integer labels, for classification.
        inplace: Write the mix into the batch tensor that is passed.
        seed: Seed of the draws. They depend on it, the epoch, the rank and the number of the batch in the epoch only;
            ``state_dict`` saves that number. ``None`` draws from torch's default CPU generator and the rank, so
            `torch.manual_seed` determines them.

    Raises:
        ValueError: If an argument is out of range; when called, if the batch is inconsistent.

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
        # The epoch and the rank, in shared memory: workers hold copies of this object.
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._drawn = (0, 0)  # an epoch, and how many batches were drawn in it
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next batches, in this process and in workers that are already running.

        Call it before each epoch if there is a schedule or a seed.
        """
        self._shared[0] = epoch
        self._shared[1] = _rank()

    @property
    def epoch(self) -> int:
        """Epoch of the next batches, counted from 0."""
        return int(self._shared[0])

    def probability(self, epoch: int | None = None) -> float:
        """Return the probability that a sample is mixed in an epoch; in the current one if ``None``.

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
            pool: Targets that the partners come from, if not from the batch.

        Returns:
            B mixes. A sample without a partner stays unmixed.

        Raises:
            TypeError: If targets are not dicts.
            ValueError: If a pairing function returns no valid partners.

        Example:
            >>> MixUp(lam=0.75, pairing="reversal").make_plan([{}, {}])[0]
            Mix(partner=1, lam=0.75, shares=(0.75, 0.25), placement=None)
        """
        if not isinstance(targets, Tensor) and (wrong := [t for t in targets if not isinstance(t, Mapping)]):
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
        """Make a source of randomness, on the CPU whatever the device of the batch.

        With a seed it depends on the seed, the epoch, the rank and ``key``. Without, on torch's generator and the rank.
        """
        if get_worker_info() is None:
            self._shared[1] = _rank()
        epoch, rank = self._shared.tolist()
        if self.seed is None:
            return random.Random(f"{int(torch.randint(2**63 - 1, ()))} {rank}")
        return random.Random(f"{self.seed} {epoch} {rank} {key}")

    def draw(self, rng: random.Random, probability: float | None = None) -> Mix:
        """Draw the share of one sample and the placement of its partner, but not the partner; ``lam`` is 1 if unmixed.

        Args:
            rng: Source of randomness.
            probability: Probability that the sample is mixed; that of the current epoch if ``None``.
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
            images: Batch ``(B, C, H, W)``, or a sequence of B images ``(C, H_i, W_i)`` of any sizes; integer, or
                floating point in any range. With class labels, a batch ``(B, ...)``.
            targets: B dicts with ``boxes`` ``(num_boxes, 4)`` in pixels and further values per box; or class labels,
                integers ``(B,)`` or shares ``(B, num_classes)``.
            plan: Mixes to replay; drawn with `make_plan` if ``None``.
            pool: Images and targets that the partners come from, if not from the batch. Its targets may be ``None``.
            out: Batch tensor to write the mix into. Reuse it in a loop, or allocate it in a ``collate_fn`` instead of
                stacking. Mixes of a sequence of images must all have its size.

        Returns:
            Images, a tensor for a tensor and a list for a sequence, ``out`` if given; and new targets, or soft labels.
        """
        if pool is not None and pool[1] is None:
            pool = (pool[0], [{}] * len(pool[0]))
        others, other_targets = (None, None) if pool is None else pool
        if isinstance(targets, Tensor):
            if not isinstance(images, Tensor) or self.scale is not None:
                raise TypeError(
                    "class labels go with one batch tensor, and with no scale; detection targets are dicts."
                )
            plan = self._plan(plan, targets, other_targets)
            soft = mix_labels_by_plan(targets, plan, num_classes=self.num_classes, pool=other_targets)
            return blend_by_plan(images, plan, pool=others, fill=self.fill, inplace=self.inplace, out=out), soft
        check_memory(images, self.inplace, out)
        plan = self._plan(plan, targets, other_targets)
        targets = check_samples(images, targets)
        if pool is not None:
            pool = (pool[0], check_samples(*pool, where="target of the pool,"))
        return mix_by_plan(images, targets, plan, pool=pool, inplace=self.inplace, out=out, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """Settings that apply a plan to samples: ``fill``, ``min_weight`` and ``box_keys``."""
        return {"fill": self.fill, "min_weight": self.min_weight, "box_keys": self.box_keys}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the position of the draws, for ``state_dict``: the epoch and the batches drawn in it."""
        return {"epoch": self.epoch, "drawn": list(self._drawn)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from the position that ``get_extra_state`` returned."""
        self.set_epoch(state["epoch"])
        self._drawn = (state["drawn"][0], state["drawn"][1])

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        law = f"alpha={self.alpha}" if self.lam is None else f"lam={self.lam}"
        return f"{law}, p={self.p}, box_weights={self.box_weights!r}, pairing={self.pairing!r}, fill={self.fill}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._shared.share_memory_()  # memory of its own, so that the workers of a copy see its epochs

    def _plan(self, plan: Sequence[Mix] | None, targets: Any, others: Any) -> Sequence[Mix]:
        """Draw a plan, or check one that is given."""
        if plan is None:
            return self.make_plan(targets, others)
        check_plan(plan, len(targets), len(targets if others is None else others))
        return plan

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
    """Return the number of this process among those that train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", 0))
