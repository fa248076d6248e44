"""mixup_arrays: an endless stream of mixed batches from arrays, for classification without a DataLoader."""

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

    As the MixupGenerator known from Keras: every step takes twice ``batch_size`` new entries and mixes the first half
    with the second. An epoch uses no entry twice; the up to ``2 * batch_size - 1`` entries left at its end are left
    out, others each time if ``shuffle``. Only the entries of a step are read and copied, so memory-mapped arrays work.

    The stream starts where ``mixup`` stands, at its epoch and its number of batches in it, and counts both on: a
    schedule (``start``, ``stop``, ``ramp``) needs no ``set_epoch``, and ``mixup.epoch`` is the epoch of the last batch.
    With ``MixUp(seed=...)`` shuffling and mixing depend on these alone, so the ``state_dict`` of ``mixup`` is enough to
    go on with the very next batch; without a seed ``torch.manual_seed`` decides. Give every stream a MixUp of its own.

    Args:
        images: ``(N, ...)`` of any modality, integer or floating point; integers are rounded.
        labels: Classes ``(N,)``, integers from 0, which need ``MixUp(num_classes=...)``, or one-hot or soft labels
            ``(N, num_classes)``.
        batch_size: The entries of a mixed batch, at most half of N.
        mixup: How to mix; ``MixUp(alpha=0.2)`` if ``None``, as the MixupGenerator. Its ``pairing`` chooses for each
            entry of the first half one of the second.
        shuffle: Take the entries of each epoch in a new order; in that of the arrays if not.

    Returns:
        An iterator over ``(batch, soft)``, ``(batch_size, ...)`` and ``(batch_size, num_classes)``, arrays for arrays
        and tensors for tensors: the batch in the dtype of ``images``, the soft labels floating point, float32 for
        integers.

    Raises:
        TypeError: if one of the two is neither a tensor nor a numpy array, or the settings of ``mixup`` are for
            detection.
        ValueError: if their lengths differ, ``batch_size`` is outside 1..N // 2, or ``labels`` have another shape, lie
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
            f"batch_size must lie in 1..{len(images) // 2}, as a step mixes two entries of {len(images)} for each that "
            f"it gives, but it is {batch_size}."
        )
    # Mixing two entries, those of the lowest and the highest class, shows now what would fail in the midst of a run.
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
