"""Which samples a batch has and what is drawn for them, as functions of seed, epoch and place alone.

So a run that was killed goes on from any batch, and the number of workers changes nothing.
"""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import BatchSampler, Dataset, DistributedSampler

Key = tuple[int, int]


class SeededDataset(Dataset[Any]):
    """A dataset in which every sample is drawn with a seed of its own.

    Args:
        dataset: A map-style dataset, which may draw from the generators of torch, numpy and Python.
        seed: The seed of the run.

    Example:
        >>> class Noise(Dataset):
        ...     def __getitem__(self, index):
        ...         return torch.rand(())
        >>> noise = SeededDataset(Noise(), seed=0)
        >>> bool(noise[3, 7] == noise[3, 7]), bool(noise[3, 7] == noise[4, 7])
        (True, False)
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Any:
        """The sample of ``(epoch, index)``."""
        epoch, index = key
        with isolate_rng(include_cuda=False):
            set_seed(self.seed, epoch, index)
            return self.dataset[index]


class EpochBatchSampler(BatchSampler):
    """Batches of ``(epoch, index)``, of which the first pass may leave out those that a run has had.

    Args:
        sampler: Gives indices and knows the epoch; Lightning tells it which.
        batch_size: Indices a batch. The last, smaller batch is left out.
        start: The batch that the first pass begins with.

    Example:
        >>> indices = DistributedSampler(range(5), num_replicas=1, rank=0, shuffle=False)
        >>> batches = EpochBatchSampler(indices, batch_size=2, start=1)
        >>> list(batches), list(batches), len(batches)
        ([[(0, 2), (0, 3)]], [[(0, 0), (0, 1)], [(0, 2), (0, 3)]], 2)
    """

    sampler: DistributedSampler[Any]

    def __init__(self, sampler: DistributedSampler[Any], batch_size: int, start: int = 0) -> None:
        super().__init__(sampler, batch_size, drop_last=True)
        self.start = start

    def __iter__(self) -> Iterator[list[Any]]:
        start, self.start = self.start, 0
        for batch in islice(super().__iter__(), start, None):
            yield [(self.sampler.epoch, index) for index in batch]


def set_seed(*key: int) -> None:
    """Seed the generators of torch, numpy and Python by numbers from 0 up, all of which count."""
    words = np.random.SeedSequence(key).generate_state(4)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[2]))  # noqa: NPY002  it is this generator that others draw from
    random.seed(int(words[3]))
