# ruff: noqa: NPY002  it is the global generator that is tested
import random

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from detmix.training.sampling import EpochBatchSampler, SeededDataset, set_seed


class Draws(torch.utils.data.Dataset):
    """Each sample is what the three generators give."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64)


def passes(num_workers=0, start=0, epochs=(0,), seed=0):
    sampler = DistributedSampler(Draws(), 1, 0, shuffle=True, seed=seed)
    batches = EpochBatchSampler(sampler, 4, start)
    loader = DataLoader(SeededDataset(Draws(), seed), batch_sampler=batches, num_workers=num_workers)
    out = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        out.append(list(loader))
    return out


def test_a_pass_from_the_middle_gives_what_is_left_of_the_whole():
    ((*_, last),) = passes(epochs=[3])
    ((only,),) = passes(epochs=[3], start=2)
    assert torch.equal(last, only)


def test_a_later_pass_begins_at_the_beginning_again():
    whole, again = passes(start=1, epochs=[0, 0])
    assert (len(whole), len(again)) == (2, 3)


def test_workers_change_nothing():
    (alone,), (shared,) = passes(), passes(num_workers=2)
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


def test_draws_and_order_differ_from_epoch_to_epoch_and_seed_to_seed():
    first, second = (torch.cat(batches) for batches in passes(epochs=[0, 1]))
    ((other,),) = ([torch.cat(batches)] for batches in passes(seed=1))
    for one in (second, other):
        assert not torch.equal(first[:, 0], one[:, 0])
        by_index, others = (draws[draws[:, 0].argsort()] for draws in (first, one))
        assert (by_index[:, 1:] != others[:, 1:]).all()


def test_the_generators_outside_are_left_alone():
    set_seed(5)
    wanted = torch.rand(3), np.random.rand(3), random.random()
    set_seed(5)
    SeededDataset(Draws(), 0)[1, 2]
    found = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(wanted[0], found[0])
    assert (wanted[1] == found[1]).all()
    assert wanted[2] == found[2]


def test_every_number_of_a_seed_counts():
    draws = []
    for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**32)]:
        set_seed(*key)
        draws.append((float(torch.rand(())), np.random.rand(), random.random()))
    for values in zip(*draws, strict=True):
        assert len(set(values)) == len(draws)
