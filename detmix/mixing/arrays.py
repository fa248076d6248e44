"""Stream mixed batches from arrays, for classification without a DataLoader."""

import operator
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detmix.mixing.plan import Mix
from detmix.mixing.transform import MixUp
from detmix.targets import take

Images = TypeVar("Images", Tensor, npt.NDArray[Any])
Labels = TypeVar("Labels", Tensor, npt.NDArray[Any])


def mixup_arrays(
    images: Images, labels: Labels, batch_size: int, mixup: MixUp | None = None, *, shuffle: bool = True
) -> Iterator[tuple[Images, Labels]]:
    """Mix arrays for classification [arXiv:1710.09412], batch by batch, without end.

    Works as the MixupGenerator known from Keras. Each step takes ``2 * batch_size`` new entries and mixes the first
    half with the second. No entry is used twice in an epoch. Up to ``2 * batch_size - 1`` entries are left over at its
    end; with ``shuffle`` they are others in each epoch. Each step reads and copies its own entries only, so
    memory-mapped arrays work.

    The stream starts at the epoch and batch of ``mixup`` and advances both. A schedule (``start``, ``stop``, ``ramp``)
    needs no ``set_epoch``, and ``mixup.epoch`` is the epoch of the last batch. With ``MixUp(seed=...)`` the order and
    the mixes depend on these alone: restore the ``state_dict`` of ``mixup`` to continue with the next batch. Without a
    seed `torch.manual_seed` determines them. Give each stream a `MixUp` of its own.

    Args:
        images: ``(N, ...)`` of any modality, integer or floating point. Integers are rounded.
        labels: Classes ``(N,)``, integers from 0, which require ``MixUp(num_classes=...)``; or one-hot or soft labels
            ``(N, num_classes)``.
        batch_size: Entries of a mixed batch, at most half of N.
        mixup: How to mix; ``MixUp(alpha=0.2)`` if ``None``, as the MixupGenerator. Its ``pairing`` chooses, for each
            entry of the first half, one of the second.
        shuffle: Take the entries of each epoch in a new order. Without, in the order of the arrays.

    Returns:
        An iterator over ``(batch, soft)``: ``(batch_size, ...)`` in the dtype of ``images``, and soft labels
        ``(batch_size, num_classes)``, floating point, float32 for integers. Arrays for arrays, tensors for tensors.

    Raises:
        TypeError: If one of the two is neither a tensor nor a numpy array, or the settings of ``mixup`` are for
            detection.
        ValueError: If their lengths differ, ``batch_size`` is outside 1..N // 2, or ``labels`` have another shape, lie
            outside ``num_classes`` or lack it.

    Example:
        >>> images, labels = np.zeros((100, 28, 28, 1), dtype=np.uint8), np.arange(100) % 10
        >>> batches = mixup_arrays(images, labels, 32, MixUp(alpha=0.2, num_classes=10))
        >>> batch, soft = next(batches)
        >>> batch.shape, batch.dtype, soft.shape, soft.dtype
        ((32, 28, 28, 1), dtype('uint8'), (32, 10), dtype('float32'))
    """
    mixup = MixUp(alpha=0.2) if mixup is None else mixup
    for name, array in (("images", images), ("labels", labels)):
        if not isinstance(array, Tensor | np.ndarray) or not array.ndim:
            raise TypeError(f"{name} must be a tensor or a numpy array (N, ...), but it is {_kind(array)}.")
    if len(images) != len(labels):
        raise ValueError(f"images and labels must be of one length, but have {len(images)} and {len(labels)} entries.")
    if not 1 <= operator.index(batch_size) <= len(images) // 2:
        raise ValueError(
            f"batch_size must lie in 1..{len(images) // 2}, half of the {len(images)} entries, since each step mixes "
            f"twice as many, but it is {batch_size}."
        )
    # Mix the entries of the lowest and the highest class now: wrong settings fail here, not in the middle of a run.
    classes = labels + 0 if labels.ndim == 1 else torch.arange(2)  # argmin knows no bool tensors
    rows = torch.tensor([int(classes.argmin()), int(classes.argmax())])
    mixup(*_load(images, labels, rows), [Mix(1, 0.5, (0.5, 0.5)), Mix()])
    return _steps(images, labels, batch_size, mixup, shuffle)


def _steps(images: Any, labels: Any, batch_size: int, mixup: MixUp, shuffle: bool) -> Iterator[tuple[Any, Any]]:
    while True:
        order = torch.arange(len(images))
        if shuffle:
            seed = mixup.make_rng("shuffle").getrandbits(63)
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        epoch, drawn = mixup.get_extra_state()["drawn"]
        for step in range(drawn if epoch == mixup.epoch else 0, len(images) // (2 * batch_size)):
            first, second = order[2 * batch_size * step :][: 2 * batch_size].reshape(2, batch_size)
            mixed = mixup(*_load(images, labels, first), pool=_load(images, labels, second))
            yield tuple(
                new.numpy() if isinstance(array, np.ndarray) else new
                for new, array in zip(mixed, (images, labels), strict=True)
            )
        mixup.set_epoch(mixup.epoch + 1)


def _load(images: Any, labels: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    batch, classes = (torch.as_tensor(take(array, rows)) for array in (images, labels))
    return batch, classes


def _kind(value: Any) -> str:
    return "a single number" if isinstance(value, Tensor | np.ndarray) else f"a {type(value).__name__}"
