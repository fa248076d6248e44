"""Make the samples of a batch and their random numbers depend only on the seed, the epoch and the index.

A run can therefore resume at any batch, and the number of workers does not change it.
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
    """Wrap a dataset so that every sample has its own seed.

    Args:
        dataset: Map-style dataset that may use the global generators of torch, numpy and Python.
        seed: Seed of the run.

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
        """Return the sample of ``(epoch, index)``."""
        epoch, index = key
        with isolate_rng(include_cuda=False):
            set_seed(self.seed, epoch, index)
            return self.dataset[index]


class EpochBatchSampler(BatchSampler):
    """Yield batches of ``(epoch, index)``; the first pass can start in the middle of an epoch.

    Args:
        sampler: Sampler of indices; Lightning sets its epoch.
        batch_size: Indices per batch. A last, smaller batch is left out.
        start: Batch that the first pass starts with.

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
    """Seed the global generators of torch, numpy and Python with a key of several numbers from 0 up."""
    words = np.random.SeedSequence(key).generate_state(4)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[2]))  # noqa: NPY002  other libraries use this generator
    random.seed(int(words[3]))
