"""MixUp: draw who is mixed with whom and how much, then mix."""

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detmix import functional
from detmix.checks import check_batch
from detmix.functional import BOX_KEYS, Sample, Target


class MixUpParams(NamedTuple):
    """What is done to each sample of a batch, drawn before anything is done: plain numbers, to log and to replay."""

    partners: list[int]
    """The index of the sample each one is mixed with; -1 for a sample that is left as it is."""
    lams: list[float]
    """Each sample's own share of its mix; 1 for a sample that is left as it is."""


class MixUp(nn.Module):
    """Mix every sample of a batch with another one of it, for object detection.

    The images are blended on a shared canvas without resizing, the boxes of both are kept, each with the share of its
    image in ``target["weights"]`` [arXiv:1902.04103, sec. 3.1]. Make the loss heed them with `detmix.weight_losses`.

    The module has no parameters, leaves its inputs alone and runs on the device the batch is on; on CUDA it never waits
    for the device. It mixes whenever it is called, in ``eval()`` too: do not call it on validation data.

    Every target that comes out, mixed or not, holds ``weights`` (float32, one a box), ``source`` (int64, one a box: 0
    for its own box, 1 for the partner's), ``lam`` (float) and ``partner`` (the index in the batch, -1 if not mixed).

    Args:
        alpha: Of the law of the shares, Beta(alpha, alpha). 1.5 is the Bag of Freebies' choice.
        p: The probability that a sample is mixed at all.
        fill: See `detmix.functional.blend_images`.
        box_keys: Names of further target keys with one entry per box, besides `detmix.functional.BOX_KEYS`.
        generator: Where the draws come from; torch's default CPU generator, so ``torch.manual_seed``, if ``None``.

    Raises:
        ValueError: if alpha is not positive or p is outside [0, 1]; when called, if the batch is inconsistent.

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
        alpha: float = 1.5,
        p: float = 1.0,
        *,
        fill: float | Sequence[float] = 0.0,
        box_keys: Iterable[str] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha of Beta(alpha, alpha) must be positive and finite, but it is {alpha}.")
        if not 0 <= p <= 1:
            raise ValueError(f"p is a probability and must lie in [0, 1], but it is {p}.")
        self.alpha = alpha
        self.p = p
        self.fill = fill
        self.box_keys = BOX_KEYS | frozenset(box_keys)
        self.generator = generator

    def make_params(self, batch_size: int) -> MixUpParams:
        """Draw the plan for a batch: one random rotation of it, so that no sample meets itself, and a share for each.

        A batch of one has no partner to offer and is left as it is.

        Example:
            >>> MixUp(p=0.0).make_params(2)
            MixUpParams(partners=[-1, -1], lams=[1.0, 1.0])
        """
        rng = self.make_rng()
        shift = rng.randrange(1, batch_size) if batch_size > 1 else 0
        lams = [self.draw_lam(rng) if shift else 1.0 for _ in range(batch_size)]
        return MixUpParams([(i + shift) % batch_size if lam < 1 else -1 for i, lam in enumerate(lams)], lams)

    def make_rng(self) -> random.Random:
        """A stream of draws seeded by the generator: on the CPU, the same whatever device the batch is on."""
        return random.Random(int(torch.randint(2**63 - 1, (), generator=self.generator)))

    def draw_lam(self, rng: random.Random) -> float:
        """One share from Beta(alpha, alpha), or 1 with probability 1 - p."""
        mixed = rng.random() < self.p
        lam = rng.betavariate(self.alpha, self.alpha)
        return lam if mixed else 1.0

    def forward(
        self, images: Tensor | Sequence[Tensor], targets: Sequence[Target], params: MixUpParams | None = None
    ) -> tuple[Tensor | list[Tensor], list[Target]]:
        """Mix a batch.

        Args:
            images: A batch ``(B, C, H, W)``, or a sequence of B images ``(C, H_i, W_i)`` of any sizes; floating
                point in any range, or integer.
            targets: B dicts with ``boxes`` ``(num_boxes, 4)`` in pixels and what else belongs to each box.
            params: A plan, to replay; drawn with `make_params` if ``None``.

        Returns:
            New images, a tensor for a tensor and a list for a sequence, and new targets.
        """
        check_batch(images, targets)
        params = self.make_params(len(images)) if params is None else params
        samples = list(zip(images, targets, strict=True))
        mixed = [
            self.mix(sample, None if j < 0 else samples[j], lam, partner=j)
            for sample, j, lam in zip(samples, *params, strict=True)
        ]
        mixed_images = [image for image, _ in mixed]
        batch = torch.stack(mixed_images) if isinstance(images, Tensor) and mixed else mixed_images
        return batch, [target for _, target in mixed]

    def mix(self, first: Sample, second: Sample | None, lam: float, *, partner: int) -> Sample:
        """Mix one sample with its partner, or with none, and note which it was."""
        if second is None:
            image, target = functional.unmixed(first, box_keys=self.box_keys)
        else:
            image, target = functional.mixup(first, second, lam, fill=self.fill, box_keys=self.box_keys)
        return image, target | {"partner": partner}

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        return f"alpha={self.alpha}, p={self.p}, fill={self.fill}"
