"""MixUpDataset: mix each sample of a dataset with a random other one of it."""

import random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from detmix.functional import Sample
from detmix.transforms import MixUp


class MixUpDataset(Dataset[Sample]):
    """Mix each sample of a map-style detection dataset with a random other one, wherever it stands in the dataset.

    For training loops of one's own. It loads two samples for each one it gives; `MixUp` on the batch loads one.

    Without a seed the draws follow torch's generator, which a `DataLoader` seeds anew in each worker and epoch. With a
    seed they depend on (seed, epoch, index) alone, so they are the same for any number of workers; call `set_epoch`
    before each epoch then, as for a `DistributedSampler`, or every epoch repeats the first. The epoch lies in shared
    memory, so it reaches workers that are already running (``persistent_workers=True``).

    Args:
        dataset: Gives ``(image, target)`` for an index: a tensor ``(C, H, W)``, a PIL image or a numpy array
            ``(H, W, C)``, and a dict with ``boxes``. Wrap torchvision's own datasets with
            ``wrap_dataset_for_transforms_v2`` first.
        mixup: How to mix; ``MixUp()`` if ``None``.
        seed: See above.

    Raises:
        TypeError: if the dataset has no length, or a sample is not an ``(image, target)`` pair with boxes.

    Example:
        >>> box = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([1])}
        >>> dataset = MixUpDataset([(torch.rand(3, 8, 8), box), (torch.rand(3, 6, 9), box)], seed=0)
        >>> image, target = dataset[0]
        >>> image.shape, target["partner"], float(target["weights"].sum())
        (torch.Size([3, 8, 9]), 1, 1.0)
    """

    def __init__(self, dataset: Any, mixup: MixUp | None = None, *, seed: int | None = None) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise TypeError(
                f"dataset must have a length and give samples by index, but {type(dataset).__name__} does not."
            )
        self.dataset = dataset
        self.mixup = MixUp() if mixup is None else mixup
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next draws are for, in this process and in running workers."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``, mixed with another; the keys it gains are those `MixUp` describes."""
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is outside a dataset of {size} samples.")
        index %= size
        rng = self.mixup.make_rng() if self.seed is None else random.Random(f"{self.seed} {int(self._epoch)} {index}")
        lam = self.mixup.draw_lam(rng) if size > 1 else 1.0
        if lam == 1:
            return self.mixup.mix(self._load(index), None, 1.0, partner=-1)
        partner = (index + rng.randrange(1, size)) % size
        return self.mixup.mix(self._load(index), self._load(partner), lam, partner=partner)

    def _load(self, index: int) -> Sample:
        sample = self.dataset[index]
        if not (isinstance(sample, tuple | list) and len(sample) == 2 and isinstance(sample[1], dict)):
            raise TypeError(
                f"sample {index} of {type(self.dataset).__name__} must be an (image, target) pair, target a dict, "
                f"but it is a {type(sample).__name__}; wrap torchvision's datasets with wrap_dataset_for_transforms_v2."
            )
        image, target = sample
        return image if isinstance(image, Tensor) else TF.to_image(image), target
