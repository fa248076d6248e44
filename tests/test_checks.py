import pytest
import torch

from detmix.checks import check_batch, check_sample


def spoiled(sample, **changes):
    image, target = sample(2)
    return image, {**target, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"boxes": torch.tensor([[0.0, 0, 1, 1], [0, float("nan"), 2, 3]])},
            r"box 1 of target 5 .*finite.*\[0.0, nan, 2",
        ),
        (
            {"labels": torch.tensor([1, 4])},
            r"label 1 of target 5 must be a class from 1 to 3 \(0 is background\).* it is 4",
        ),
        ({"labels": torch.tensor([0, 1])}, r"label 0 of target 5 .* it is 0"),
        ({"labels": torch.tensor([1])}, "labels of target 5 must have one entry for each of the 2 boxes, but have 1"),
        (
            {"weights": torch.tensor([0.5, -0.1])},
            "weight 1 of target 5 must be finite and not negative, but it is -0.1",
        ),
        ({"weights": torch.tensor([0.5, 1, 1])}, "weights of target 5 must have one entry for each of the 2 boxes"),
        (
            {"boxes": torch.zeros(2, 4, device="meta")},
            "boxes of target 5 must be on the device of its image, cpu, .* meta",
        ),
        ({"boxes": torch.zeros(2)}, r"boxes of target 5 must have shape \(num_boxes, 4\), but have \(2,\)"),
    ],
)
def test_what_is_wrong_with_a_target_is_named(sample, changes, message):
    with pytest.raises(ValueError, match=message):
        check_sample(*spoiled(sample, **changes), where="target 5", num_classes=4)


def test_a_sound_target_passes_with_boxes_and_without(sample):
    for number in (0, 2):
        check_sample(*sample(number), where="target 0", num_classes=4)
    check_sample(torch.zeros(3, 4, 4), {"boxes": torch.tensor([])}, where="target 0")


def test_a_target_that_is_none_is_named():
    with pytest.raises(TypeError, match="target 0 must be a dict with 'boxes', but it is a list"):
        check_sample(torch.zeros(3, 4, 4), [], where="target 0")
    with pytest.raises(ValueError, match=r"target 0 must hold 'boxes', but it holds \['labels'\]"):
        check_sample(torch.zeros(3, 4, 4), {"labels": torch.ones(1)}, where="target 0")
    with pytest.raises(TypeError, match="boxes of target 0 must be a tensor, but they are a list"):
        check_sample(torch.zeros(3, 4, 4), {"boxes": [[0, 0, 1, 1]]}, where="target 0")


def test_a_batch_of_mismatched_lengths_is_named(sample):
    image, target = sample(1)
    with pytest.raises(ValueError, match="there are 2 images and 1 targets"):
        check_batch([image, image], [target])


def test_a_batch_names_the_target_by_its_index(sample):
    samples = [sample(2), spoiled(sample, labels=torch.tensor([1]))]
    with pytest.raises(ValueError, match="labels of target 1 "):
        check_batch(*zip(*samples, strict=True))
