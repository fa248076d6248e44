import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import tv_tensors

from detmix.mixing.batch import mixup, mixup_batch, unmixed
from detmix.mixing.blend import blend_images
from detmix.mixing.plan import Mix, Placement
from tests.conftest import assert_same, make_sample
from tests.mixing.samples import LAMS

PER_BOX = ("boxes", "labels", "weights", "source", "masks", "keypoints", "area", "iscrowd")
SAMPLES = st.builds(
    make_sample, st.integers(0, 4), st.tuples(st.integers(4, 20), st.integers(4, 20)), st.integers(0, 99)
)


@given(first=SAMPLES, second=SAMPLES, lam=LAMS)
def test_every_per_box_key_of_a_mix_has_one_entry_per_box(first, second, lam):
    _, target = mixup(first, second, lam)
    number = len(first[1]["boxes"]) + len(second[1]["boxes"])
    assert {key: len(target[key]) for key in PER_BOX} == dict.fromkeys(PER_BOX, number)


@given(first=SAMPLES, second=SAMPLES, lam=LAMS)
def test_weights_of_each_source_add_up_to_its_share_of_the_boxes(first, second, lam):
    target = mixup(first, second, lam)[1]
    for source, share, sample in ((0, lam, first), (1, 1 - lam, second)):
        weights = target["weights"][target["source"] == source]
        assert weights.tolist() == [share] * len(sample[1]["boxes"])


@given(first=SAMPLES, second=SAMPLES, lam=LAMS)
def test_swapping_samples_and_shares_gives_the_same_weight_to_every_box(first, second, lam):
    (image, one), (swapped, other) = mixup(first, second, lam), mixup(second, first, 1 - lam)
    assert torch.equal(image, swapped)
    number = len(first[1]["boxes"])
    for key in set(PER_BOX) - {"source"}:
        assert torch.equal(one[key], torch.cat([other[key][len(other[key]) - number :], other[key][: -number or None]]))
    assert torch.equal(one["source"], 1 - torch.cat([other["source"].flip(0)]))


@given(first=SAMPLES, second=SAMPLES)
def test_at_lam_of_one_first_is_as_it_was_and_second_weighs_nothing(first, second):
    image, target = mixup(first, second, 1.0)
    height, width = first[0].shape[-2:]
    number = len(first[1]["boxes"])
    assert torch.equal(image[:, :height, :width], first[0])
    assert int(image.sum()) == int(first[0].sum())
    for key in ("boxes", "labels", "keypoints", "area", "iscrowd"):
        assert torch.equal(target[key][:number], first[1][key])
    assert target["weights"].tolist() == [1.0] * number + [0.0] * len(second[1]["boxes"])


@given(first=SAMPLES, second=SAMPLES, a=LAMS, b=LAMS)
def test_image_and_total_weight_are_linear_in_lam(first, second, a, b):
    middle = (a + b) / 2
    first, second = ((image.double(), target) for image, target in (first, second))
    (at_a, one), (at_b, other), (between, mean) = (mixup(first, second, lam) for lam in (a, b, middle))
    torch.testing.assert_close(between, (at_a + at_b) / 2)
    torch.testing.assert_close(mean["weights"], (one["weights"] + other["weights"]) / 2)


@given(first=SAMPLES, second=SAMPLES, lam=LAMS, placed=st.booleans())
def test_mixing_leaves_its_inputs_alone(first, second, lam, placed):
    kept = copy.deepcopy((first, second))
    image, target = mixup(first, second, lam, placement=Placement(0.7, 0.4, 1.0) if placed else None)
    image.fill_(0)
    for value in target.values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert_same((first, second), kept)


def test_a_mix_records_what_was_done(sample):
    first, second = sample(2, (9, 20)), sample(1, (12, 16), seed=1)
    target = mixup(first, second, 0.25)[1]
    assert (target["lam"], target["shares"], target["canvas"]) == (0.25, (0.25, 0.75), (12, 20))
    assert target["placement"] is None
    assert target["source"].tolist() == [0, 0, 1]
    placement = Placement(0.5, 0.0, 1.0)
    target = mixup(first, second, 0.25, placement=placement, shares=(1.0, 1.0))[1]
    assert (target["canvas"], target["placement"], target["shares"]) == ((9, 20), placement, (1.0, 1.0))


def test_what_a_scaled_second_leaves_uncovered_is_filled():
    first, second = torch.full((1, 2, 4), 100, dtype=torch.uint8), torch.full((1, 2, 2), 20, dtype=torch.uint8)
    image, _ = mixup((first, {}), (second, {}), 0.5, placement=Placement(1.0, 1.0, 0.0), fill=50)
    assert image.tolist() == [[[75, 75, 60, 60]] * 2]


def test_unmixed_has_the_keys_of_a_mixed_one(sample):
    image, target = unmixed(sample(2))
    assert target.keys() == mixup(sample(2), sample(2), 0.5)[1].keys()
    assert target["weights"].tolist() == [1, 1]
    assert target["source"].tolist() == [0, 0]
    assert (target["lam"], target["canvas"]) == (1, (12, 16))
    assert torch.equal(image, sample(2)[0])


def test_a_target_without_any_entries_is_that_of_an_image_without_annotations(sample):
    first, bare = sample(2), (torch.zeros(3, 9, 20, dtype=torch.uint8), {"image_id": 7})
    mixed = mixup(first, bare, 0.25)[1]
    assert mixed["weights"].tolist() == [0.25, 0.25]
    assert mixup(bare, first, 0.25)[1]["weights"].tolist() == [0.75, 0.75]
    target = mixup(bare, bare, 0.25)[1]
    assert target["image_id"] == 7
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].dtype == torch.int64
    with pytest.raises(ValueError, match=r"the second sample must hold 'boxes', but it holds \['bboxes'\]"):
        mixup(first, (bare[0], {"bboxes": torch.zeros(1, 4)}), 0.5)


def batch(counts=(2, 0, 3, 1, 0), sizes=((12, 16), (9, 20), (12, 16), (20, 8), (5, 5))):
    samples = [make_sample(n, size, i) for i, (n, size) in enumerate(zip(counts, sizes, strict=True))]
    return [image for image, _ in samples], [target for _, target in samples]


PLAN = [
    Mix(1, 0.25, (0.25, 0.75)),
    Mix(2, 0.5, (1.0, 0.0)),
    Mix(),
    Mix(2, 0.75, (0.75, 0.25), Placement(1.25, 0.5, 0.0)),
    Mix(0, 1.0, (1.0, 0.0)),
]


def test_a_batch_is_mixed_sample_by_sample_as_planned():
    images, targets = batch()
    out, out_targets = mixup_batch(images, targets, PLAN, fill=3)
    for i, mix in enumerate(PLAN):
        first = images[i], targets[i]
        if mix.partner < 0:
            expected = unmixed(first)
        else:
            second = images[mix.partner], targets[mix.partner]
            expected = mixup(first, second, mix.lam, shares=mix.shares, placement=mix.placement, fill=3)
        assert_same((out[i], out_targets[i]), (expected[0], expected[1] | {"partner": mix.partner}))


def test_a_share_without_a_partner_is_not_recorded():
    images, targets = batch((2,), [(12, 16)])
    (target,) = mixup_batch(images, targets, [Mix(-1, 0.25, (0.25, 0.75))])[1]
    assert Mix.of(target) == Mix()
    assert target["weights"].tolist() == [1, 1]


def test_what_mixed_targets_record_replays_bit_for_bit_even_from_json():
    images, targets = batch()
    mixed = mixup_batch(images, targets, PLAN)
    assert [Mix.of(target) for target in mixed[1]] == PLAN
    stored = json.loads(json.dumps([{field: target[field] for field in Mix._fields} for target in mixed[1]]))
    assert_same(mixup_batch(images, targets, [Mix.of(record) for record in stored]), mixed)
    with pytest.raises(ValueError, match=r"must hold \['partner', .*\], but \['lam', 'placement'\] are missing"):
        Mix.of({"partner": 1, "shares": [1, 0]})


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("placed", [False, True])
def test_a_batch_tensor_mixes_as_a_list_does(inplace, placed):
    images, targets = batch(sizes=[(12, 16)] * 5)
    plan = PLAN if placed else [mix._replace(placement=None) for mix in PLAN]
    plan = [mix._replace(partner=(i + 2) % 5) for i, mix in enumerate(plan)]
    listed, listed_targets = mixup_batch(images, targets, plan, fill=3)
    stacked = torch.stack([image.as_subclass(torch.Tensor) for image in images])
    kept = stacked.clone()
    out, out_targets = mixup_batch(stacked, targets, plan, fill=3, inplace=inplace)
    assert torch.equal(out, torch.stack(listed))
    assert_same(out_targets, listed_targets)
    assert (out is stacked) == inplace
    assert inplace or torch.equal(stacked, kept)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("stacked_pool", [False, True])
@pytest.mark.parametrize("placed", [False, True])
def test_partners_can_come_from_a_second_pool(stacked, stacked_pool, placed):
    images, targets = batch((2, 1), [(12, 16), (12, 16)])
    pool = [make_sample(1, (9, 14), seed=7)[0], make_sample(0, (9, 14) if stacked_pool else (12, 10), seed=8)[0]]
    if stacked_pool:
        pool = torch.stack([image.as_subclass(torch.Tensor) for image in pool])
    placement = Placement(0.8, 1.0, 0.0) if placed else None
    plan = [Mix(1, 0.25, (0.25, 0.75), placement), Mix(0, 0.5, (0.5, 0.5), placement)]
    first = torch.stack(images) if stacked else images
    out, out_targets = mixup_batch(first, targets, plan, pool=(pool, [{}, {"image_id": 3}]))
    for i, (mix, image, target) in enumerate(zip(plan, images, targets, strict=True)):
        expected = mixup((image, target), (pool[mix.partner], {}), mix.lam, placement=placement)
        assert torch.equal(out[i], expected[0])
        assert_same(out_targets[i], expected[1] | {"partner": mix.partner})
        assert out_targets[i]["weights"].tolist() == [mix.lam] * len(target["boxes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda i, t, p: (i[:4], t, p),
            "images and targets must be of one length, but there are 4 images and 5 targets",
        ),
        (lambda i, t, p: (i, t, p[:4]), "plan must hold one Mix for each of 5 samples, but it holds 4"),
        (lambda i, t, p: (i, t, [Mix(5), *p[1:]]), "partner of sample 0 must be -1 or an index below 5, but it is 5"),
        (lambda i, t, p: (i, t, [Mix(-2), *p[1:]]), "partner of sample 0 .* it is -2"),
        (lambda i, t, p: (i, t, [Mix(1, 1.5), *p[1:]]), r"lie in \[0, 1\], but it is 1.5"),
        (
            lambda i, t, p: (i, [*t[:4], {"boxes": torch.full((1, 4), float("inf"))}], p),
            "box 0 of target 4 must be fin",
        ),
        (lambda i, t, p: (i, [*t[:4], {"boxes": torch.ones(2, 4), "labels": torch.ones(1)}], p), "labels of target 4"),
        (lambda i, t, p: (i, [{**t[0], "area": torch.ones(1)}, *t[1:]], p), "'area' of the first target has 1 entries"),
    ],
)
def test_a_batch_that_does_not_go_together_loses_nothing(change, message):
    images, targets = batch(sizes=[(12, 16)] * 5)
    images, targets, plan = change(torch.stack(images).float(), targets, PLAN)
    kept = copy.deepcopy((images, targets))
    with pytest.raises(ValueError, match=message):
        mixup_batch(images, targets, plan, inplace=True)
    assert_same((images, targets), kept)


def test_a_pool_that_is_wrong_is_named_as_such():
    images, targets = batch()
    with pytest.raises(ValueError, match=r"label.* of target of the pool, 0 must have one entry"):
        mixup_batch(images, targets, PLAN, pool=(images[:1], [{"boxes": torch.ones(2, 4), "labels": torch.ones(1)}]))
    with pytest.raises(TypeError, match="target 0 must be a dict with 'boxes', but it is a int"):
        mixup_batch(images, [0] * 5, PLAN)
    with pytest.raises(TypeError, match="inplace needs one batch tensor, but images is a list"):
        mixup_batch(images, targets, PLAN, inplace=True)


def test_blends_are_those_of_the_images(sample):
    first, second = sample(1), sample(2, (9, 20), seed=1)
    assert torch.equal(mixup(first, second, 0.3, fill=5)[0], blend_images(first[0], second[0], 0.3, fill=5))


def test_a_second_mix_multiplies_the_weights(sample):
    once = mixup(sample(1), sample(1, seed=1), 0.25)
    twice = mixup(once, sample(1, seed=2), 0.5)[1]
    assert twice["weights"].tolist() == [0.125, 0.375, 0.5]
    assert twice["source"].tolist() == [0, 0, 1]


@pytest.mark.parametrize(("num_first", "num_second"), [(0, 0), (0, 2), (2, 0)])
@pytest.mark.parametrize("careless", [False, True])
def test_empty_targets_keep_dtypes_and_shapes(sample, num_first, num_second, careless):
    samples = [sample(num_first), sample(num_second, seed=1)]
    if careless:  # torch.tensor([]), of shape (0,) and float32 whatever the key
        for _, target in samples:
            if not len(target["boxes"]):
                target.update(labels=torch.tensor([]), area=torch.tensor([]))
    target = mixup(*samples, 0.5)[1]
    number = num_first + num_second
    assert target["boxes"].shape == (number, 4)
    assert target["masks"].shape == (number, 12, 16)
    assert target["keypoints"].shape == (number, 3, 3)
    assert all(len(target[key]) == number for key in ("labels", "weights", "source", "area", "iscrowd"))
    if number or not careless:
        assert target["labels"].dtype == torch.int64


def test_other_keys_are_those_of_first_by_identity(sample):
    (image, first), second = sample(2), sample(2, seed=1)
    first["size"] = torch.tensor([12, 16])
    first["meta"] = {"file": "a.jpg"}
    target = mixup((image, first), second, 0.5)[1]
    assert target["size"] is first["size"]
    assert target["meta"] is first["meta"]
    assert target["image_id"] == 0
