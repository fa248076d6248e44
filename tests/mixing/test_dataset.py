import random

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from detmix import MixUp, MixUpDataset
from detmix.mixing.batch import mixup_batch
from detmix.mixing.plan import Mix
from tests.conftest import assert_same, make_sample


class Samples(torch.utils.data.Dataset):
    """Samples of several sizes and box counts, made anew for each index, which are counted."""

    def __init__(self, length=12):
        self.length = length
        self.loaded = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.loaded.append(index)
        return make_sample(index % 3, (8 + index % 4, 12), seed=index)


def plan(dataset, workers=0, **options):
    loader = DataLoader(dataset, num_workers=workers, collate_fn=list, **options)
    return [mix_of(sample) for batch in loader for sample in batch]


def mix_of(sample):
    _, target = sample
    return target["image_id"], target["partner"], target["lam"]


@pytest.mark.parametrize("options", [{}, {"scale": (0.5, 1.5)}, {"box_weights": "first", "min_weight": 0.1}])
def test_every_sample_is_mixed_with_another_one_of_the_dataset(options):
    dataset = MixUpDataset(Samples(), MixUp(seed=0, **options))
    assert len(dataset) == 12
    for index in range(12):
        image, target = dataset[index]
        partner = target["partner"]
        assert partner != index
        first, second = Samples()[index], Samples()[partner]
        (expected,), (expected_target,) = mixup_batch(
            [first[0]], [first[1]], [Mix.of({**target, "partner": 0})], pool=([second[0]], [second[1]]),
            min_weight=options.get("min_weight", 0.0),
        )  # fmt: skip
        assert_same((image, target), (expected, expected_target | {"partner": partner}))


def test_partners_come_from_the_whole_dataset_each_as_likely():
    dataset = MixUpDataset(Samples(4))
    partners = [dataset[1][1]["partner"] for _ in range(300)]
    assert {j: abs(partners.count(j) - 100) < 40 for j in set(partners)} == {0: True, 2: True, 3: True}


def test_a_partner_is_loaded_only_for_a_sample_that_is_mixed():
    dataset = MixUpDataset(Samples(), MixUp(p=0.5, seed=0))
    mixed = sum(dataset[index][1]["partner"] >= 0 for index in range(12))
    assert 0 < mixed < 12
    assert len(dataset.dataset.loaded) == 12 + mixed


SCHEDULE = range(5)  # before the start, on the ramp, twice in full, after the stop


def scheduled(seed=3):
    return MixUpDataset(Samples(60), MixUp(start=1, ramp=2, stop=4, seed=seed))


@pytest.fixture(scope="module")
def alone():
    """What the main process does to each sample, by epoch."""
    plans, dataset = [], scheduled()
    for epoch in SCHEDULE:
        dataset.set_epoch(epoch)
        plans.append(plan(dataset))
    return plans


def test_the_schedule_mixes_as_many_samples_as_it_says_each_epoch(alone):
    counts = [sum(partner >= 0 for _, partner, _ in plan) for plan in alone]
    assert (counts[0], counts[2], counts[3], counts[4]) == (0, 60, 60, 0)
    assert abs(counts[1] - 30) < 12


def test_each_epoch_and_seed_has_mixes_of_its_own(alone):
    assert all(a != b for a, b in zip(alone[2], alone[3], strict=True))
    other = scheduled(seed=4)
    other.set_epoch(2)
    assert plan(other) != alone[2]


@pytest.mark.parametrize(
    ("context", "persistent", "workers", "epochs"),
    [
        ("fork", False, 2, SCHEDULE),
        ("fork", True, 2, SCHEDULE),
        ("spawn", True, 1, SCHEDULE),  # a process that is spawned imports for seconds
        ("spawn", False, 1, (2,)),
        pytest.param("spawn", True, 2, SCHEDULE, marks=pytest.mark.slow),
        pytest.param("spawn", False, 2, SCHEDULE, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_workers_mix_as_the_main_process_does_each_epoch(context, persistent, workers, epochs, alone):
    dataset = scheduled()
    loader = DataLoader(
        dataset,
        10,
        num_workers=workers,
        collate_fn=list,
        persistent_workers=persistent,
        multiprocessing_context=context,
        prefetch_factor=1,
    )
    for epoch in epochs:
        dataset.set_epoch(epoch)
        assert [mix_of(sample) for batch in loader for sample in batch] == alone[epoch]


def test_images_are_bit_identical_for_any_number_of_workers():
    dataset = MixUpDataset(Samples(), MixUp(seed=3, scale=(0.5, 1.5)))
    alone, shared = (list(DataLoader(dataset, num_workers=n, collate_fn=list)) for n in (0, 2))
    assert_same(shared, alone)


def test_without_a_seed_the_generator_of_torch_decides():
    plans = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        plans.append(plan(MixUpDataset(Samples())))
    assert plans[0] == plans[1] != plans[2]


def test_another_rank_mixes_otherwise(monkeypatch):
    plans = []
    for rank in (0, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        plans.append(plan(MixUpDataset(Samples(), MixUp(seed=3))))
    assert plans[0] == plans[1]
    assert all(a != b for a, b in zip(plans[0], plans[2], strict=True))


def test_a_dataset_of_one_sample_stays_unmixed():
    _, target = MixUpDataset(Samples(1))[0]
    assert target["partner"] == -1
    assert "weights" in target


@pytest.mark.parametrize("pairing", ["with_boxes", "same_class", "different_class"])
def test_a_partner_meets_the_condition_or_the_sample_stays_unmixed(pairing):
    samples = [make_sample(n, seed=i) for i, n in enumerate((1, 0, 2, 1))]
    for (_, target), labels in zip(samples, ([1], [], [1, 2], [3]), strict=True):
        target["labels"] = torch.tensor(labels, dtype=torch.int64)
    dataset = MixUpDataset(samples, MixUp(pairing=pairing))
    partners = [{dataset[i][1]["partner"] for _ in range(60)} for i in range(4)]
    assert (
        partners
        == {
            "with_boxes": [{2, 3}, {0, 2, 3}, {0, 3}, {0, 2}],
            "same_class": [{2}, {-1}, {0}, {-1}],
            "different_class": [{1, 3}, {0, 2, 3}, {1, 3}, {0, 1, 2}],
        }[pairing]
    )


def test_a_function_chooses_the_partner():
    dataset = MixUpDataset(Samples(6), partner=lambda index, rng: rng.choice([(index + 1) % 6, (index - 1) % 6]))
    assert {dataset[3][1]["partner"] for _ in range(30)} == {2, 4}
    alone = MixUpDataset(Samples(6), partner=lambda index, rng: -1)[3]
    assert (alone[1]["partner"], alone[1]["lam"]) == (-1, 1.0)
    assert torch.equal(alone[0], Samples()[3][0])
    assert MixUpDataset(Samples(6), pool=Samples(6), partner=lambda index, rng: index)[3][1]["partner"] == 3
    for choice in (3, 6, -2):
        with pytest.raises(ValueError, match=f"another of 6 samples, but chose {choice} for sample 3"):
            MixUpDataset(Samples(6), partner=lambda index, rng, choice=choice: choice)[3]


@pytest.mark.parametrize("bare", [{}, None])
def test_partners_can_come_from_a_set_without_labels(bare):
    pool = [(torch.full((3, 8, 12), level, dtype=torch.uint8), bare) for level in (100, 200)]
    dataset = MixUpDataset(Samples(6), pool=pool)
    partners = set()
    for _ in range(20):
        image, target = dataset[1]
        first, annotated = Samples()[1]
        partners.add(target["partner"])
        assert target["weights"].tolist() == [target["lam"]] * len(annotated["boxes"])
        level = 100 * (1 + target["partner"])
        expected = target["lam"] * first.double()[:, :8] + (1 - target["lam"]) * level
        assert (image[:, :8] - expected).abs().max() <= 0.51
    assert partners == {0, 1}


@pytest.mark.parametrize("kind", ["pil", "numpy", "grey", "uint16"])
def test_images_that_are_no_tensors_become_some(kind):
    pixels = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    images = {"pil": PIL.Image.fromarray(pixels), "numpy": pixels, "grey": pixels[..., 0]}
    image = images.get(kind, pixels.astype(np.uint16) * 200)
    target = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([1])}
    mixed, _ = MixUpDataset([(image, target), (image, target)])[0]
    expected = np.asarray(image)
    assert np.array_equal(mixed.numpy(), expected.transpose(2, 0, 1) if expected.ndim == 3 else expected[None])


def test_tensors_keep_their_type():
    target = {"boxes": torch.zeros(0, 4)}
    assert type(MixUpDataset([(torch.zeros(3, 4, 4), target)] * 2)[0][0]) is torch.Tensor
    assert type(MixUpDataset([(tv_tensors.Image(torch.zeros(3, 4, 4)), target)] * 2)[0][0]) is tv_tensors.Image


def test_indices_count_from_the_end_and_stop_at_it():
    dataset = MixUpDataset(Samples(), MixUp(p=0.0))
    assert dataset[-1][1]["image_id"] == 11
    for index in (12, -13):
        with pytest.raises(IndexError, match=f"index {index} is outside a dataset of 12 samples"):
            dataset[index]
    assert len(list(dataset)) == 12


def test_what_gives_no_pairs_is_named():
    with pytest.raises(
        TypeError, match=r"dataset must have a length and return samples by index, but generator does not"
    ):
        MixUpDataset(sample for sample in [])
    with pytest.raises(
        TypeError, match=r"pool must have a length .*\. Mix the batches of an iterable dataset with MixUp"
    ):
        MixUpDataset([], pool=(sample for sample in []))
    with pytest.raises(TypeError, match=r"sample 0 of list must be an \(image, target\) pair.*it is a Tensor"):
        MixUpDataset([torch.zeros(3, 4, 4)])[0]
    with pytest.raises(TypeError, match=r"sample 0 of list must be .* it is a tuple"):
        MixUpDataset([(torch.zeros(3, 4, 4), {"boxes": torch.zeros(0, 4)}, "more")])[0]
    with pytest.raises(
        TypeError, match=r"the target of sample 0 of list must be a dict with 'boxes', but it is a list"
    ):
        MixUpDataset([(torch.zeros(3, 4, 4), [{"bbox": [1, 2, 3, 4]}])])[0]
    with pytest.raises(ValueError, match=r"sample 0 of list must hold 'boxes', but it holds \['bboxes'\]"):
        MixUpDataset([(torch.zeros(3, 4, 4), {"bboxes": torch.zeros(1, 4)})])[0]
    with pytest.raises(ValueError, match=r"sample 0 of list must hold 'boxes', but it holds \['annotation'\]"):
        MixUpDataset([(torch.zeros(3, 4, 4), {"annotation": {"object": [{"name": "cat"}]}})])[0]  # VOC's, unwrapped
    for pairing in ("reversal", "permutation", lambda targets, pool, rng: []):
        with pytest.raises(ValueError, match=r"for single samples, but it is .*, which pairs a batch"):
            MixUpDataset(Samples(), MixUp(pairing=pairing))

    class Endless:
        def __getitem__(self, index):
            return make_sample()

    with pytest.raises(TypeError, match="Endless does not"):
        MixUpDataset(Endless())


def test_boxes_under_another_name_are_found_and_tuples_named():
    class Named(list):
        target_type = ("identity", "bbox")

    boxes = tv_tensors.BoundingBoxes([[0, 0, 2, 2]], format="XYXY", canvas_size=(4, 4))
    image = torch.zeros(3, 4, 4)
    for dataset, own in (
        ([(image, boxes)] * 2, set()),
        ([(image, {"bbox": boxes, "image_id": 4})] * 2, {"image_id"}),
        (Named([(image, (torch.tensor(7), boxes))] * 2), {"identity"}),
    ):
        target = MixUpDataset(dataset, MixUp(lam=0.25))[0][1]
        assert target["boxes"].tolist() == [[0, 0, 2, 2]] * 2
        assert target.keys() >= own
        assert "bbox" not in target


def test_draws_are_those_of_the_sample_whoever_asks_first():
    dataset = MixUpDataset(Samples(), MixUp(seed=1))
    order = list(range(12))
    first = {i: dataset[i][1]["lam"] for i in order}
    random.shuffle(order)
    assert {i: dataset[i][1]["lam"] for i in order} == first
