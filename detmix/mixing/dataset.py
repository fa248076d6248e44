"""Mix each sample of a dataset with another one of it."""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from detmix.mixing.batch import mix_by_plan
from detmix.mixing.pairing import CONDITIONS
from detmix.mixing.plan import Mix
from detmix.mixing.transform import MixUp
from detmix.targets import Sample, Target, annotated, check_target

TRIES = 16
"""Partners that are loaded at most to find one that meets a condition."""


class MixUpDataset(Dataset[Sample]):
    """Mix each sample of a map-style detection dataset with a random other sample of it.

    For your own training loop. It loads two samples for each one that it mixes. With ``p=0.5`` a loader of JPEGs
    without further augmentation gave 0.50 to 0.73 times the images per second. `MixUp` on the batch loads one image per
    sample and gave 0.83 to 1.38 times (see ``docs/speed.md``). Iterable datasets cannot be wrapped; mix their
    batches.

    Without a seed the draws follow torch's generator, which a `DataLoader` seeds anew in each worker and epoch. With
    ``MixUp(seed=...)`` they depend on the seed, the epoch, the rank and the index only, so the number of workers does
    not matter. Call `set_epoch` before each epoch then, as for a `DistributedSampler`; otherwise every epoch repeats
    the first. A schedule (``start``, ``stop``, ``ramp``) needs it too. The epoch lies in shared memory and reaches
    workers that are already running (``persistent_workers=True``).

    Args:
        dataset: Returns ``(image, target)`` for an index: the image a tensor ``(C, H, W)``, a PIL image or a numpy
            array ``(H, W, C)``, the target a dict with ``boxes``. torchvision's CocoDetection, VOCDetection, Kitti,
            WIDERFace and CelebA do so under ``wrap_dataset_for_transforms_v2``. Where these name their boxes otherwise,
            or have none for an image without annotations, the key is ``boxes`` here.
        mixup: How to mix; ``MixUp()`` if ``None``. Its ``pairing`` may be a condition (``"with_boxes"``,
            ``"same_class"``, ``"different_class"``). Then up to 16 partners are loaded until one meets it. If none
            does, the sample stays unmixed.
        pool: Dataset that the partners come from, such as one without labels (targets ``{}`` or ``None``).
        partner: Function of ``(index, rng)`` that returns the index of the partner, or -1 for none. ``None`` chooses
            any other sample.

    Raises:
        TypeError: If a dataset has no length, or a sample is not an ``(image, target)`` pair with boxes.
        ValueError: If ``mixup`` pairs whole batches, or ``partner`` returns the sample itself or one that does not
            exist.

    Example:
        >>> import torch
        >>> box = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([1])}
        >>> dataset = MixUpDataset([(torch.rand(3, 8, 8), box), (torch.rand(3, 6, 9), box)], MixUp(seed=0))
        >>> image, target = dataset[0]
        >>> image.shape, target["partner"], float(target["weights"].sum())
        (torch.Size([3, 8, 9]), 1, 1.0)
    """

    def __init__(
        self,
        dataset: Any,
        mixup: MixUp | None = None,
        *,
        pool: Any = None,
        partner: Callable[[int, random.Random], int] | None = None,
    ) -> None:
        for name, source in (("dataset", dataset), ("pool", dataset if pool is None else pool)):
            if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
                raise TypeError(
                    f"{name} must have a length and return samples by index, but {type(source).__name__} does not. Mix "
                    f"the batches of an iterable dataset with MixUp."
                )
        self.dataset, self.pool, self.partner = dataset, pool, partner
        self.mixup = MixUp() if mixup is None else mixup
        if self.mixup.inplace:
            raise TypeError("inplace of mixup must be False: it needs one batch tensor, and a dataset has samples.")
        if self.mixup.pairing not in ("rotation", *CONDITIONS):
            raise ValueError(
                f"pairing must be one of {['rotation', *CONDITIONS]} for single samples, but it is "
                f"{self.mixup.pairing!r}, which pairs a batch; give a function as partner."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next samples, in this process and in running workers."""
        self.mixup.set_epoch(epoch)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample at ``index``, mixed. `MixUp` describes the keys that its target gains."""
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is outside a dataset of {size} samples.")
        index %= size
        rng = self.mixup.make_rng("sample", index)
        mix = self.mixup.draw(rng)
        first = _load(self.dataset, index)
        j, second = (-1, None) if mix.lam == 1 else self._partner(index, first[1], rng)
        plan = [Mix() if second is None else mix._replace(partner=0)]
        pool = None if second is None else ([second[0]], [second[1]])
        (image,), (target,) = mix_by_plan([first[0]], [first[1]], plan, pool=pool, **self.mixup.options)
        return image, target | {"partner": j}

    def _partner(self, index: int, target: Target, rng: random.Random) -> tuple[int, Sample | None]:
        pool = self.dataset if self.pool is None else self.pool
        look, fits = CONDITIONS.get(str(self.mixup.pairing), CONDITIONS["random"])
        for j in self._candidates(index, len(pool), rng):
            second = _load(pool, j)
            if fits(look(target), look(second[1])):
                return j, second
        return -1, None

    def _candidates(self, index: int, size: int, rng: random.Random) -> Iterator[int]:
        is_own = self.pool is None
        if self.partner is None:
            others = range(index + 1, index + size) if is_own else range(size)
            yield from (j % size for j in rng.sample(others, min(TRIES, len(others))))
            return
        for _ in range(TRIES):
            j = int(self.partner(index, rng))
            if not -1 <= j < size or (is_own and j == index):
                raise ValueError(
                    f"partner must choose -1 or another of {size} samples, but chose {j} for sample {index}."
                )
            if j < 0:
                return
            yield j


def _load(dataset: Any, index: int) -> Sample:
    sample, name = dataset[index], type(dataset).__name__
    if not (isinstance(sample, tuple | list) and len(sample) == 2):
        raise TypeError(
            f"sample {index} of {name} must be an (image, target) pair, but it is a {type(sample).__name__}; wrap "
            f"torchvision's datasets with wrap_dataset_for_transforms_v2."
        )
    image = sample[0] if isinstance(sample[0], Tensor) else TF.to_image(sample[0])
    target = _as_target(sample[1], getattr(dataset, "target_type", ()))
    if not isinstance(target, Mapping):
        raise TypeError(
            f"the target of sample {index} of {name} must be a dict with 'boxes', but it is a {type(target).__name__}; "
            f"wrap torchvision's datasets with wrap_dataset_for_transforms_v2."
        )
    target = annotated(image, target)
    check_target(target, where=f"sample {index} of {name}", image=image)
    return image, target


def _as_target(target: Any, names: Any) -> Any:
    # torchvision's wrapper gives None where a split has no annotations, and CelebA's the values of target_type alone.
    if target is None:
        return {}
    if isinstance(target, tv_tensors.BoundingBoxes):
        return {"boxes": target}
    if isinstance(target, tuple) and len(target) == len(names):
        target = dict(zip(names, target, strict=True))
    if isinstance(target, Mapping) and "boxes" not in target:
        boxes = [key for key, value in target.items() if isinstance(value, tv_tensors.BoundingBoxes)]
        return {"boxes" if [key] == boxes else key: value for key, value in target.items()}
    return target
