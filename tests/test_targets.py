import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from detmix.mixing.batch import mixup
from detmix.targets import box_fields, check_batch, check_target, is_list, keys_per_box, take
from tests.conftest import make_sample

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


def test_a_box_that_torchvision_drops_after_a_mix_takes_its_weight_along():
    samples = [make_sample(n, (40, 60), seed=i) for i, n in enumerate((3, 4))]
    for _, target in samples:
        target["keypoints"] = tv_tensors.KeyPoints(target["keypoints"][..., :2], canvas_size=(40, 60))
    image, target = mixup(*samples, 0.75)
    target["labels"] = torch.arange(7)
    pipeline = v2.Compose(
        [
            v2.RandomIoUCrop(min_scale=0.4, max_scale=0.6, sampler_options=[0.1]),
            v2.Resize((32, 32)),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=4, labels_getter=box_fields),
        ]
    )
    torch.manual_seed(0)
    counts = set()
    for _ in range(20):
        _, new = pipeline(image, target)
        rows = new["labels"]
        counts.add(len(rows))
        assert torch.equal(new["weights"], target["weights"][rows])
        assert torch.equal(new["source"], target["source"][rows])
        assert torch.equal(new["area"], target["area"][rows])
        assert all(len(new[key]) == len(rows) for key in ("boxes", "masks", "keypoints", "iscrowd"))
        assert isinstance(new["boxes"], tv_tensors.BoundingBoxes)
        assert isinstance(new["masks"], tv_tensors.Mask)
    assert len(counts) > 2


def test_a_list_that_torchvision_could_not_filter_is_named():
    with pytest.raises(ValueError, match=r"'area' must be a tensor to follow its boxes .* it is a list"):
        box_fields((torch.zeros(3, 4, 4), {"boxes": torch.zeros(2, 4), "area": [1, 2]}))


@pytest.mark.parametrize("value", [[], (), [1], np.zeros(0), np.zeros((2, 3)), torch.zeros(0), torch.zeros(1, 2)])
def test_what_has_entries_can_belong_to_boxes(value):
    assert is_list(value)
    assert keys_per_box({"area": value, "size": value}) == {"area"}


@pytest.mark.parametrize("value", [17, 1.5, "photo", None, {"a": 1}, torch.tensor(3), np.array(3)])
def test_what_has_none_belongs_to_the_image(value):
    assert not is_list(value)
    assert keys_per_box({"area": value}) == set()


def test_entries_are_taken_in_the_order_of_the_rows():
    rows = torch.tensor([2, 0])
    assert take(["a", "b", "c"], rows) == take(("a", "b", "c"), rows) == ["c", "a"]
    array = take(np.array([5.0, 6.0, 7.0]), rows)
    assert isinstance(array, np.ndarray)
    assert array.tolist() == [7.0, 5.0]
    columns = [[1.0, 1, 2, 2], [3.0, 3, 4, 4], [5.0, 5, 6, 6]]
    taken = take(tv_tensors.BoundingBoxes(columns, format="XYWH", canvas_size=(9, 9)), rows)
    assert taken.format == tv_tensors.BoundingBoxFormat.XYWH
    assert taken[:, 0].tolist() == [5, 1]
