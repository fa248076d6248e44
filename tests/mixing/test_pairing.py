import random
from collections import Counter

import pytest
import torch

from detmix.mixing.pairing import PAIRINGS, pair
from tests.conftest import make_sample

OWN = [name for name in PAIRINGS if name not in ("with_boxes", "same_class", "different_class")]


def targets_with(*classes):
    return [{"boxes": torch.zeros(len(k), 4), "labels": torch.tensor(k, dtype=torch.int64)} for k in classes]


def draw(pairing, targets, pool=None, times=200):
    rng = random.Random(0)
    return [pair(pairing, targets, pool, rng) for _ in range(times)]


@pytest.mark.parametrize("name", PAIRINGS)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 7])
def test_no_sample_meets_itself(name, size):
    targets = targets_with(*[[1, 2]] * size)
    for partners in draw(name, targets, times=30):
        assert len(partners) == size
        assert all(-1 <= j < size and i != j for i, j in enumerate(partners))


@pytest.mark.parametrize("name", ["rotation", "permutation"])
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_each_sample_is_a_partner_once(name, size):
    assert all(sorted(partners) == list(range(size)) for partners in draw(name, [{}] * size))


@pytest.mark.parametrize("name", ["rotation", "permutation", "random"])
def test_partners_change_and_every_other_sample_is_as_likely(name):
    counts = Counter(partners[0] for partners in draw(name, [{}] * 4, times=1500))
    assert set(counts) == {1, 2, 3}
    assert all(abs(count - 500) < 100 for count in counts.values())


def test_every_permutation_without_fixed_points_is_as_likely():
    counts = Counter(map(tuple, draw("permutation", [{}] * 4, times=2700)))
    assert len(counts) == 9  # derangements of four
    assert all(abs(count - 300) < 80 for count in counts.values())


def test_a_rotation_moves_all_by_one_number():
    for partners in draw("rotation", [{}] * 6):
        assert len({(j - i) % 6 for i, j in enumerate(partners)}) == 1


def test_a_reversal_pairs_the_ends_and_leaves_the_middle():
    assert pair("reversal", [{}] * 4, None, random.Random(0)) == [3, 2, 1, 0]
    assert pair("reversal", [{}] * 5, None, random.Random(0)) == [4, 3, -1, 1, 0]


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("with_boxes", [{1, 3, 4}, {0, 3, 4}, {0, 1, 3, 4}, {0, 1, 4}, {0, 1, 3}]),
        ("same_class", [{1}, {0, 3}, set(), {1}, set()]),
        ("different_class", [{2, 3, 4}, {2, 4}, {0, 1, 3, 4}, {0, 2, 4}, {0, 1, 2, 3}]),
        ("random", [{1, 2, 3, 4}, {0, 2, 3, 4}, {0, 1, 3, 4}, {0, 1, 2, 4}, {0, 1, 2, 3}]),
    ],
)
def test_a_condition_allows_these_partners_and_no_others(name, allowed):
    targets = targets_with([1], [1, 2, 2], [], [2], [3])
    drawn = draw(name, targets, times=300)
    for i, expected in enumerate(allowed):
        assert {partners[i] for partners in drawn} == (expected or {-1})


def test_class_labels_are_paired_by_class_too():
    labels = torch.tensor([0, 1, 0, 1])
    assert pair("same_class", labels, None, random.Random(0)) == [2, 3, 0, 1]
    soft = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    assert {tuple(partners) for partners in draw("different_class", soft)} == {(1, 0, -1)}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(("size", "pool"), [(3, 5), (5, 3), (2, 1), (2, 0), (0, 3)])
def test_a_second_pool_offers_all_it_has(name, size, pool):
    drawn = draw(name, [{}] * size, [{}] * pool)
    assert all(len(partners) == size for partners in drawn)
    offered = {j for partners in drawn for j in partners}
    if name != "reversal" and size:
        assert offered == (set(range(pool)) or {-1})
    if name in ("rotation", "permutation") and pool >= size:
        assert all(len(set(partners)) == size for partners in drawn if pool)
    if name == "reversal":
        assert drawn[0] == [pool - 1 - i % pool if pool else -1 for i in range(size)]


def test_partners_of_a_pool_meet_the_condition():
    targets, pool = targets_with([1], [2]), targets_with([], [2], [1], [1, 3])
    drawn = draw("same_class", targets, pool)
    assert {partners[0] for partners in drawn} == {2, 3}
    assert {partners[1] for partners in drawn} == {1}


def test_a_function_of_the_users_decides():
    def largest(targets, pool, rng):
        order = sorted(range(len(pool)), key=lambda j: -len(pool[j]["boxes"]))
        return [next(j for j in order if j != i) for i in range(len(targets))]

    targets = [make_sample(n)[1] for n in (1, 3, 2)]
    assert pair(largest, targets, None, random.Random(0)) == [1, 2, 1]
    assert pair(lambda targets, pool, rng: torch.tensor([1, 0, -1]), targets, None, random.Random(0)) == [1, 0, -1]


@pytest.mark.parametrize(
    ("partners", "message"),
    [
        ([1, 0], "a partner for each of 3 samples, but gave 2"),
        ([1, 1, 0], "another of the 3 samples, but gave 1 for sample 1"),
        ([1, 0, 3], "but gave 3 for sample 2"),
        ([-2, 0, 1], "but gave -2 for sample 0"),
    ],
)
def test_a_choice_that_cannot_be_is_named(partners, message):
    with pytest.raises(ValueError, match=message):
        pair(lambda targets, pool, rng: partners, [{}] * 3, None, random.Random(0))
    if "sample 1" in message:
        assert pair(lambda targets, pool, rng: partners, [{}] * 3, [{}] * 3, random.Random(0)) == partners
