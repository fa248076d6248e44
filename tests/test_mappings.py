"""Targets that are mappings, but no dicts: the labels of transformers' image processors, and those of the library."""

import copy
from collections import OrderedDict, UserDict
from types import MappingProxyType

import pytest
import torch
from transformers.feature_extraction_utils import BatchFeature

import detmix
from detmix import MixUp, weight_losses
from detmix.albumentations.pipeline import AlbumentationsTransform
from detmix.mixing.batch import mixup, mixup_batch
from detmix.mixing.dataset import MixUpDataset
from detmix.mixing.merge import merge_targets
from detmix.mixing.plan import Mix
from detmix.visualize import draw_sample
from tests.conftest import assert_same, make_sample
from tests.losses.tiny import WEIGHTS, assert_same_bits, batch, losses_on, tiny, weighted_copy
from tests.losses.tiny_transformers import build, labels

KINDS = [BatchFeature, UserDict, OrderedDict, MappingProxyType]
PLAN = [Mix(1, 0.75, (0.75, 0.25)), Mix(0, 0.5, (0.5, 0.5))]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def samples():
    return [make_sample(number, seed=seed) for seed, number in enumerate((2, 3))]


def test_any_mapping_is_mixed_into_a_dict(kind):
    images, targets = zip(*samples(), strict=True)
    given = [kind(target) for target in targets]
    kept = [dict(target) for target in given]
    for got, expected in (
        (mixup_batch(images, given, PLAN), mixup_batch(images, targets, PLAN)),
        (
            MixUp(lam=0.75)(images, given, PLAN, pool=(images, given)),
            MixUp(lam=0.75)(images, targets, PLAN, pool=(images, targets)),
        ),
        (
            MixUp(lam=0.75, scale=(0.5, 0.9), seed=1)(images, given),
            MixUp(lam=0.75, scale=(0.5, 0.9), seed=1)(images, targets),
        ),
        (
            mixup((images[0], given[0]), (images[1], given[1]), 0.75),
            mixup((images[0], targets[0]), (images[1], targets[1]), 0.75),
        ),
        (merge_targets(given[0], given[1], 0.5, (12, 16)), merge_targets(targets[0], targets[1], 0.5, (12, 16))),
        (
            MixUpDataset([*zip(images, given, strict=True)], MixUp(seed=1))[1],
            MixUpDataset([*zip(images, targets, strict=True)], MixUp(seed=1))[1],
        ),
    ):
        assert_same(got, expected)
    assert all(type(target) is kind for target in given)
    assert all(
        dict(target).keys() == old.keys() and all(target[key] is old[key] for key in old)
        for target, old in zip(given, kept, strict=True)
    )


@pytest.mark.parametrize("pairing", ["with_boxes", "same_class", "different_class"])
def test_pairings_read_any_mapping_and_the_labels_of_transformers(kind, pairing):
    targets = [{"boxes": torch.zeros(1, 4), "labels": torch.tensor([k])} for k in (1, 2, 1)]
    renamed = [kind({"boxes": t["boxes"], "class_labels": t["labels"]}) for t in targets]
    expected = MixUp(pairing=pairing, lam=0.5, seed=1).make_plan(targets)
    assert MixUp(pairing=pairing, lam=0.5, seed=1).make_plan([kind(t) for t in targets]) == expected
    assert MixUp(pairing=pairing, lam=0.5, seed=1).make_plan(renamed) == expected


def test_any_mapping_is_transformed_and_drawn(kind):
    import albumentations as A

    image, target = make_sample(2)
    flip = AlbumentationsTransform([A.HorizontalFlip(p=1.0)])
    assert_same(flip(image, kind(target)), flip(image, target))
    assert torch.equal(draw_sample(image, kind(target)), draw_sample(image, target))


@pytest.mark.parametrize("name", ["retinanet", "fasterrcnn", "ssd"])
def test_any_mapping_is_weighted_in_torchvision(kind, name):
    stock = tiny(name)
    model = weighted_copy(stock)
    for weights in (None, WEIGHTS):
        images, targets = batch(weights)
        expected = losses_on(model if weights else stock, images, targets)
        assert_same_bits(losses_on(model, images, [kind(target) for target in targets]), expected)


@pytest.mark.parametrize("name", ["DetrForObjectDetection", "RTDetrForObjectDetection"])
def test_any_mapping_is_weighted_in_transformers(kind, name):
    stock = build(name)
    model = weight_losses(copy.deepcopy(stock))
    pixels = torch.rand(3, 3, 64, 64)

    def losses(model, labels):
        torch.manual_seed(5)
        return {
            key: torch.as_tensor(value) for key, value in model(pixel_values=pixels, labels=labels).loss_dict.items()
        }

    for weights in (None, torch.tensor([0.3, 0.0, 1.7, 0.9, 0.4])):
        given = labels(weights)
        expected = losses(stock if weights is None else model, given)
        assert_same_bits(losses(model, [kind(label) for label in given]), expected)


def test_class_labels_are_joined_as_labels_are():
    mixed = MixUp(lam=0.75)(
        torch.rand(3, 3, 64, 64),
        given := [BatchFeature({k: v for k, v in label.items() if k != "masks"}) for label in labels()],
    )[1]
    for target in mixed:
        second = given[target["partner"]]["class_labels"] if target["partner"] >= 0 else torch.zeros(0).long()
        first = next(
            label["class_labels"]
            for label in given
            if torch.equal(label["boxes"], target["boxes"][target["source"] == 0])
        )
        assert torch.equal(target["class_labels"], torch.cat([first, second]))
        assert type(target) is dict
    with pytest.raises(
        ValueError, match="class_labels of target 0 must have one entry for each of the 2 boxes, but have 1"
    ):
        MixUp()(torch.rand(1, 3, 8, 8), [BatchFeature({"boxes": torch.zeros(2, 4), "class_labels": torch.ones(1)})])


def test_labels_of_0_are_mixed():
    target = {"boxes": torch.tensor([[0.0, 0.0, 2.0, 2.0]]), "labels": torch.tensor([0])}
    mixed = MixUp(lam=0.75)(torch.rand(2, 3, 8, 8), [target] * 2)[1]
    assert mixed[0]["labels"].tolist() == [0, 0]


def test_what_is_no_mapping_is_named():
    with pytest.raises(TypeError, match="targets must be dicts, or one tensor of class labels, but hold a list"):
        detmix.MixUp()(torch.rand(1, 3, 8, 8), [[]])
