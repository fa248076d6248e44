import pytest
import torch
from torchvision import tv_tensors

from detmix.targets import check_batch, check_target

IMAGE = torch.zeros(3, 12, 16)


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
        ({"boxes": torch.zeros(2)}, r"boxes of target 5 must have shape \(num_boxes, 4\), but have \(2,\)"),
    ],
)
def test_what_is_wrong_with_a_target_is_named(sample, changes, message):
    with pytest.raises(ValueError, match=message):
        check_target({**sample(2)[1], **changes}, where="target 5", image=IMAGE, num_classes=4)


def test_a_sound_target_passes_with_boxes_and_without(sample):
    for number in (0, 2):
        check_target(sample(number)[1], where="target 0", image=IMAGE, num_classes=4)
    check_target({"boxes": torch.tensor([])}, where="target 0")


def test_a_target_that_is_none_is_named():
    with pytest.raises(TypeError, match="target 0 must be a dict with 'boxes', but it is a list"):
        check_target([], where="target 0")
    with pytest.raises(ValueError, match=r"target 0 must hold 'boxes', but it holds \['labels'\]"):
        check_target({"labels": torch.ones(1)}, where="target 0")
    with pytest.raises(TypeError, match="boxes of target 0 must be a tensor, but they are a list"):
        check_target({"boxes": [[0, 0, 1, 1]]}, where="target 0")


def test_a_batch_of_mismatched_lengths_is_named(sample):
    image, target = sample(1)
    with pytest.raises(ValueError, match="there are 2 images and 1 targets"):
        check_batch([image, image], [target])


def test_an_image_that_is_none_is_named(sample):
    image, target = sample(1)
    with pytest.raises(TypeError, match=r"image of target 1 must be a tensor \(C, H, W\), but it is a ndarray"):
        check_batch([image, image.numpy()], [target, target])
    with pytest.raises(ValueError, match=r"image of target 0 must have shape \(C, H, W\), but has \(12, 16\)"):
        check_batch([image[0], image], [target, target])


def test_a_batch_names_the_target_by_its_index(sample):
    (image, target), other = sample(2), sample(2)
    samples = [other, (image, {**target, "labels": torch.tensor([1])})]
    with pytest.raises(ValueError, match="labels of target 1 "):
        check_batch(*zip(*samples, strict=True))


@pytest.mark.parametrize("key", ["boxes", "masks", "keypoints"])
def test_what_was_made_for_an_image_of_another_size_is_named(sample, key):
    image, target = sample(2)
    if key == "keypoints":
        target[key] = tv_tensors.KeyPoints(target[key][..., :2], canvas_size=(12, 17))
    other = sample(2, (12, 17))[1][key] if key != "keypoints" else target[key]
    with pytest.raises(
        ValueError, match=rf"{key} of target 0 are on a canvas of \(12, 17\), but its image is \(12, 16\)"
    ):
        check_target({**target, key: other}, where="target 0", image=image)


def test_plain_masks_have_the_size_of_their_image_if_there_are_any(sample):
    image, target = sample(2)
    with pytest.raises(ValueError, match=r"masks of target 0 are on a canvas of \(12, 17\)"):
        check_target({**target, "masks": torch.zeros(2, 12, 17)}, where="target 0", image=image)
    check_target({**sample(0)[1], "masks": torch.zeros(0)}, where="target 0", image=image)


def test_boxes_and_labels_apart_are_named_without_an_image_too(sample):
    target = {**sample(2)[1], "labels": torch.ones(2, device="meta")}
    with pytest.raises(ValueError, match="labels of target 0 must be on the device of its boxes, cpu, but are on meta"):
        check_target(target, where="target 0")


@pytest.mark.parametrize("kinds", [("XYXY", "XYXY"), ("XYXY", "XYWHR"), ("XYWHR", "XYXY")])
def test_the_one_box_in_a_batch_that_is_not_finite_is_named(kinds):
    targets = [
        {"boxes": tv_tensors.BoundingBoxes(torch.ones(2, 4 + ("R" in kind)), format=kind, canvas_size=(12, 16))}
        for kind in (*kinds, kinds[1])
    ]
    check_batch([IMAGE] * 3, targets)
    targets[1]["boxes"][1, 2] = float("inf")
    for images in ([IMAGE] * 3, torch.stack([IMAGE] * 3)):
        with pytest.raises(ValueError, match=r"box 1 of target 1 must be finite, but it is \[1.0, 1.0, inf, 1.0"):
            check_batch(images, targets)


def test_finite_boxes_whose_sum_is_not_pass():
    boxes = torch.full((2, 4), 6e4, dtype=torch.float16)
    check_batch([IMAGE] * 2, [{"boxes": boxes}] * 2)


def test_boxes_that_require_a_gradient_are_looked_at_without_a_warning():
    check_target({"boxes": torch.ones(1, 4, requires_grad=True)}, where="target 0", image=IMAGE)


def test_a_batch_of_none_passes():
    check_batch(torch.zeros(0, 3, 4, 4), [])
    check_batch([], [])


def test_boxes_of_any_other_shape_are_named():
    for shape in ((), (2,), (1, 2, 4)):
        with pytest.raises(ValueError, match=r"boxes of target 0 must have shape \(num_boxes, 4\), but have"):
            check_target({"boxes": torch.zeros(shape)}, where="target 0")
