import random
from itertools import islice

import numpy as np
import pytest
import torch

from detmix import MixUp
from detmix.mixing.arrays import mixup_arrays


def ids(batch):
    """Which entries of ``np.eye(N)`` each entry of a batch is mixed from."""
    return [set(np.flatnonzero(entry)) for entry in np.asarray(batch)]


def stream(mixup, steps, entries=11, **options):
    """The first batches of a stream over entries that say who they are, two an epoch, as lists."""
    return [
        batch.tolist()
        for batch, _ in islice(mixup_arrays(np.eye(entries), np.eye(entries), 2, mixup, **options), steps)
    ]


def test_images_and_labels_of_two_entries_are_mixed_with_one_share():
    images, labels = np.random.default_rng(0).random((12, 3)), np.eye(12)
    for batch, soft in islice(mixup_arrays(images, labels, 3, MixUp(alpha=1.0, seed=0)), 20):
        assert batch.shape == (3, 3)
        for entry, shares in zip(batch, soft, strict=True):
            assert np.count_nonzero(shares) == 2
            assert shares.sum() == 1
            np.testing.assert_allclose(entry, sum(share * image for share, image in zip(shares, images, strict=True)))


def test_an_epoch_uses_no_entry_twice_and_leaves_out_others_each_time():
    batches = mixup_arrays(np.eye(11), np.eye(11), 2, MixUp(lam=0.5))
    left_out, orders = [], []
    for _ in range(20):
        epoch = [pair for batch, _ in islice(batches, 2) for pair in ids(batch)]
        assert len(set.union(*epoch)) == 8
        left_out.append(set(range(11)) - set.union(*epoch))
        orders.append(tuple(map(frozenset, epoch)))
    assert set.union(*left_out) == set(range(11))
    assert len(set(orders)) == 20


def test_without_shuffling_the_entries_come_in_order_and_the_second_half_is_mixed_into_the_first():
    for batch, _ in islice(mixup_arrays(np.eye(9), np.eye(9), 2, MixUp(lam=0.75), shuffle=False), 10):
        first, second = (np.nonzero(batch == share) for share in (0.75, 0.25))
        start = first[1][0]
        assert first[1].tolist() == [start, start + 1]
        assert sorted(second[1]) == [start + 2, start + 3]
        assert start in (0, 4)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("classes", [np.int64, np.uint8, np.bool_])
def test_arrays_give_arrays_and_tensors_give_the_same_as_tensors(dtype, classes):
    images, labels = np.arange(24).reshape(6, 2, 2).astype(dtype), (np.arange(6) % 2).astype(classes)
    given = {
        kinds: next(mixup_arrays(a, b, 3, MixUp(num_classes=2, seed=0)))
        for kinds, a, b in (
            ((np.ndarray, np.ndarray), images, labels),
            ((torch.Tensor, torch.Tensor), torch.from_numpy(images), torch.from_numpy(labels)),
            ((np.ndarray, torch.Tensor), images, torch.from_numpy(labels)),
        )
    }
    expected, expected_soft = given[np.ndarray, np.ndarray]
    assert expected.dtype == dtype
    assert expected_soft.dtype == np.float32
    for kinds, mixed in given.items():
        assert tuple(map(type, mixed)) == kinds
        np.testing.assert_array_equal(np.asarray(mixed[0]), expected)
        np.testing.assert_array_equal(np.asarray(mixed[1]), expected_soft)


def test_integer_images_are_rounded():
    images = np.array([[0], [0], [255], [255]], dtype=np.uint8)
    levels = {
        level
        for batch, _ in islice(mixup_arrays(images, np.eye(4), 2, MixUp(lam=0.75), shuffle=False), 4)
        for level in batch.ravel().tolist()
    }
    assert levels == {64}  # 0.25 * 255 = 63.75


def test_only_the_entries_of_a_step_are_copied():
    terabyte = np.broadcast_to(np.uint8(3), (2**20, 2**10, 2**10))
    batch, _ = next(mixup_arrays(terabyte, np.zeros(2**20, dtype=np.int64), 2, MixUp(num_classes=1)))
    assert batch.shape == (2, 2**10, 2**10)
    assert (batch == 3).all()


def test_a_memory_mapped_file_gives_what_the_array_gives(tmp_path):
    np.save(tmp_path / "images.npy", np.eye(11))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    for batch, soft in islice(mixup_arrays(mapped, np.eye(11), 2, MixUp(seed=0)), 6):
        assert type(batch) is np.ndarray
        np.testing.assert_allclose(batch, soft)
    assert [batch.tolist() for batch, _ in islice(mixup_arrays(mapped, np.eye(11), 2, MixUp(seed=0)), 6)] == stream(
        MixUp(seed=0), 6
    )


def test_a_seed_decides_the_stream_and_no_global_generator_does():
    streams = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(streams))
        np.random.seed(len(streams))  # noqa: NPY002 - the global state is what is tested
        random.seed(len(streams))
        streams.append(stream(MixUp(seed=seed), 6))
    assert streams[0] == streams[1] != streams[2]


def test_without_a_seed_the_generator_of_torch_decides_shuffling_and_mixing():
    for settings in ({"lam": 0.75, "pairing": "reversal"}, {"p": 1.0}):  # of the first only the order is random
        streams = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            streams.append(stream(MixUp(**settings), 6))
        assert streams[0] == streams[1] != streams[2]


def test_a_schedule_follows_the_epochs_of_the_stream():
    mixup = MixUp(start=1, stop=3, lam=0.5)
    batches = mixup_arrays(np.eye(11), np.eye(11), 2, mixup)
    seen = [(mixup.epoch, max(map(len, ids(batch)))) for batch, _ in islice(batches, 8)]
    assert seen == [(0, 1), (0, 1), (1, 2), (1, 2), (2, 2), (2, 2), (3, 1), (3, 1)]


@pytest.mark.parametrize("drawn", range(6))  # two an epoch: at its start, in its midst and at its end
def test_a_restored_mixup_goes_on_with_the_very_next_batch(drawn):
    whole = stream(MixUp(seed=0), 10)
    mixup = MixUp(seed=0)
    stream(mixup, drawn)
    restored = MixUp(seed=0)
    restored.load_state_dict(mixup.state_dict())
    assert stream(restored, 10 - drawn) == whole[drawn:]


def test_partners_are_chosen_as_the_mixup_says():
    labels = np.arange(20) % 2
    batches = mixup_arrays(np.eye(20), labels, 10, MixUp(pairing="same_class", num_classes=2))
    pairs = [pair for batch, _ in islice(batches, 10) for pair in ids(batch)]
    assert {len(pair) for pair in pairs} >= {2}
    assert all(len(set(labels[list(pair)])) == 1 for pair in pairs)


def test_without_a_mixup_alpha_is_that_of_the_keras_generator():
    streams = []
    for mixup in (None, MixUp(alpha=0.2)):
        torch.manual_seed(0)
        streams.append(stream(mixup, 6))
    assert streams[0] == streams[1]


@pytest.mark.parametrize("shuffle", [True, False])
def test_mixing_leaves_the_arrays_alone(shuffle):
    images, labels = torch.eye(8), torch.eye(8)
    for batch, soft in islice(mixup_arrays(images, labels, 4, MixUp(inplace=True), shuffle=shuffle), 3):
        batch.zero_()
        soft.zero_()
    assert torch.equal(images, torch.eye(8))
    assert torch.equal(labels, torch.eye(8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": np.arange(9)}, ValueError, "of one length, but have 10 and 9 entries"),
        ({"batch_size": 0}, ValueError, r"batch_size must lie in 1\.\.5, .* but it is 0"),
        ({"batch_size": 6}, ValueError, r"batch_size must lie in 1\.\.5, .* but it is 6"),
        ({"batch_size": 2.0}, TypeError, "'float' object cannot be interpreted as an integer"),
        ({"mixup": None}, ValueError, "num_classes must be given to mix integer labels"),
        ({"mixup": MixUp(num_classes=9)}, ValueError, r"labels must lie in 0\.\.8, but go from 0 to 9"),
        ({"labels": np.linspace(0, 1, 10)}, ValueError, r"must be classes \(B,\), integers, .*float64"),
        ({"labels": np.zeros((10, 3, 2))}, ValueError, r"soft labels \(B, num_classes\), but are \(2, 3, 2\)"),
        ({"mixup": MixUp(scale=(0.5, 1.0), num_classes=10)}, TypeError, "class labels go with .* no scale"),
        ({"images": [[0.0]] * 10}, TypeError, r"images must be a tensor or a numpy array \(N, ...\), but it is a list"),
        ({"labels": np.array(3)}, TypeError, r"labels must be .* \(N, ...\), but it is a single number"),
    ],
)
def test_a_mistake_is_named_at_the_call(arguments, error, message):
    sound = {"images": np.zeros((10, 2)), "labels": np.arange(10), "batch_size": 2, "mixup": MixUp(num_classes=10)}
    with pytest.raises(error, match=message):
        mixup_arrays(**sound | arguments)
