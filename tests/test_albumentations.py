import copy

import albumentations as A
import pytest
import torch
from torchvision import tv_tensors

from detmix.albumentations import AlbumentationsTransform
from tests.conftest import assert_same


def weighted_sample(sample, number=3, size=(40, 60)):
    image, target = sample(number, size)
    return image, {**target, "weights": torch.arange(1, number + 1) / 4, "names": [f"box {i}" for i in range(number)]}


def test_a_flip_moves_boxes_masks_and_keypoints_together(sample):
    image, target = weighted_sample(sample)
    flipped, new = AlbumentationsTransform([A.HorizontalFlip(p=1)])(image, target)
    assert torch.equal(flipped, image.flip(2))
    assert isinstance(flipped, tv_tensors.Image)
    assert torch.equal(new["masks"], target["masks"].flip(2))
    torch.testing.assert_close(new["boxes"][:, [2, 0]], 60 - target["boxes"][:, [0, 2]], atol=1e-4, rtol=0)
    torch.testing.assert_close(new["keypoints"][..., 1:], target["keypoints"][..., 1:], atol=1e-4, rtol=0)
    assert new["boxes"].canvas_size == (40, 60)
    assert torch.equal(new["weights"], target["weights"])


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_box_that_is_dropped_takes_all_it_has_along(sample, gone):
    image, target = weighted_sample(sample)
    target["boxes"] = torch.tensor([[30.0, 2, 40, 12], [33, 15, 50, 25], [36, 27, 56, 38]])
    target["boxes"][gone, 0::2] = torch.tensor([2.0, 12.0])
    crop = AlbumentationsTransform([A.Crop(x_min=25, y_min=0, x_max=60, y_max=40)], box_keys=["names"])
    cropped, new = crop(image, target)
    left = [i for i in range(3) if i != gone]
    assert cropped.shape == (3, 40, 35)
    assert new["weights"].tolist() == target["weights"][left].tolist()
    assert new["labels"].tolist() == target["labels"][left].tolist()
    assert new["names"] == [f"box {i}" for i in left]
    assert torch.equal(new["masks"], target["masks"][left][..., 25:])
    assert new["image_id"] is target["image_id"]


def test_keypoints_that_leave_the_image_stay_invisible(sample):
    image, target = sample(1, (20, 20))
    target["boxes"] = torch.tensor([[2.0, 2.0, 18.0, 18.0]])
    target["keypoints"] = torch.tensor([[[3.0, 5.0, 2.0], [15.0, 5.0, 2.0], [15.0, 15.0, 0.0]]])
    _, new = AlbumentationsTransform([A.Crop(x_min=10, y_min=0, x_max=20, y_max=20)])(image, target)
    assert new["keypoints"].tolist() == [[[-7.0, 5.0, 0.0], [5.0, 5.0, 2.0], [5.0, 15.0, 0.0]]]


def test_area_follows_the_box(sample):
    image, target = sample(2, (20, 20))
    _, new = AlbumentationsTransform([A.Resize(40, 60)])(image, target)
    torch.testing.assert_close(new["area"], target["area"] * 6, rtol=1e-4, atol=0)


@pytest.mark.parametrize("transform", [A.HorizontalFlip(p=1), A.Resize(10, 14), A.RandomBrightnessContrast(p=1)])
def test_a_sample_without_boxes_goes_through(sample, transform):
    image, target = sample(0, (20, 20))
    out, new = AlbumentationsTransform([transform])(image, target)
    assert new["boxes"].shape == (0, 4)
    assert new["labels"].dtype == torch.int64
    assert new["masks"].shape == (0, *out.shape[1:])
    assert new["keypoints"].shape == (0, 3, 3)


def test_all_boxes_can_be_dropped(sample):
    image, target = sample(2, (20, 20))
    target["boxes"] = torch.tensor([[1.0, 1, 5, 5], [2, 2, 6, 6]])
    out, new = AlbumentationsTransform([A.Crop(x_min=10, y_min=10, x_max=20, y_max=20)])(image, target)
    assert new["boxes"].shape == (0, 4)
    assert new["masks"].shape == (0, 10, 10)
    assert new["keypoints"].shape == (0, 3, 3)
    assert out.shape == (3, 10, 10)


@pytest.mark.parametrize("box_format", ["XYWH", "CXCYWH"])
def test_the_format_of_the_boxes_is_kept(sample, box_format):
    image, _ = sample(0, (20, 20))
    boxes = tv_tensors.BoundingBoxes([[4.0, 6.0, 8.0, 6.0]], format=box_format, canvas_size=(20, 20))
    _, new = AlbumentationsTransform([A.NoOp()])(image, {"boxes": boxes, "labels": torch.tensor([1])})
    assert new["boxes"].format == boxes.format
    torch.testing.assert_close(new["boxes"].as_subclass(torch.Tensor), boxes.as_subclass(torch.Tensor))


def test_the_seed_of_torch_decides_and_transforms_draw_apart(sample):
    image, target = sample(1, (20, 20))
    flips = AlbumentationsTransform([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)])
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(torch.stack([flips(image, target)[0].as_subclass(torch.Tensor) for _ in range(30)]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert len(runs[0].unique(dim=0)) == 4  # both, either, none: the two flips do not share their draw


def test_it_leaves_its_input_alone(sample):
    image, target = weighted_sample(sample)
    kept = copy.deepcopy((image, target))
    out, new = AlbumentationsTransform([A.NoOp()])(image, target)
    out.zero_()
    new["boxes"].zero_()
    assert_same((image, target), kept)
