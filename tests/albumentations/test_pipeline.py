import copy

import albumentations as A
import numpy as np
import PIL.Image
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


@pytest.mark.parametrize(
    "form",
    [
        lambda array: array,
        lambda array: array[::-1].copy()[::-1],
        lambda array: np.broadcast_to(array, array.shape),  # read-only
        PIL.Image.fromarray,
    ],
    ids=["array", "negative strides", "read-only", "PIL"],
)
@pytest.mark.parametrize("shape", [(20, 24, 3), (20, 24)])
def test_pil_images_and_arrays_go_like_tensors(sample, form, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    _, target = sample(2, (20, 24))
    image, new = AlbumentationsTransform([A.HorizontalFlip(p=1)])(form(array), target)
    tensor = torch.from_numpy(array.reshape(20, 24, -1)).permute(2, 0, 1)
    expected, expected_target = AlbumentationsTransform([A.HorizontalFlip(p=1)])(tensor, target)
    assert type(image) is tv_tensors.Image
    assert type(expected) is torch.Tensor
    assert torch.equal(image, expected)
    assert_same(new, expected_target)


@pytest.mark.parametrize("form", [np.asarray, lambda array: torch.from_numpy(array).permute(2, 0, 1)])
def test_a_gray_image_is_left_alone_too(sample, form):
    array = np.full((20, 24, 1), 9, np.uint8)
    image, _ = AlbumentationsTransform([A.NoOp()])(form(array), sample(1, (20, 24))[1])
    image.zero_()
    assert (array == 9).all()


@pytest.mark.parametrize("form", [torch.Tensor, lambda xy: tv_tensors.KeyPoints(xy, canvas_size=(20, 20))])
def test_keypoints_without_visibility_move_and_stay(form):
    target = {
        "boxes": torch.tensor([[2.0, 2.0, 8.0, 18.0], [2.0, 2.0, 18.0, 18.0]]),
        "keypoints": form(torch.tensor([[[3.0, 4.0], [5.0, 6.0]], [[3.0, 5.0], [15.0, 7.0]]])),
    }
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    _, new = AlbumentationsTransform([A.Crop(x_min=10, y_min=0, x_max=20, y_max=16)])(image, target)
    assert type(new["keypoints"]) is type(target["keypoints"])
    assert new["keypoints"].tolist() == [[[-7.0, 5.0], [5.0, 7.0]]]  # of the box that is left
    assert getattr(new["keypoints"], "canvas_size", (16, 10)) == (16, 10)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_masks_keep_their_dtype(sample, dtype):
    image, target = sample(2, (20, 20))
    target["masks"] = target["masks"].to(dtype)
    _, new = AlbumentationsTransform([A.Rotate((90, 90), p=1), A.HorizontalFlip(p=1)])(image, target)
    assert new["masks"].dtype == dtype
    assert torch.equal(new["masks"], torch.rot90(target["masks"].as_subclass(torch.Tensor), 1, (1, 2)).flip(2))


def rotated(box_format):
    number = 8 if box_format == "XYXYXYXY" else 5
    return tv_tensors.BoundingBoxes(torch.ones(1, number), format=box_format, canvas_size=(8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": rotated("XYWHR")}, "boxes must not be rotated.* XYWHR"),
        ({"boxes": rotated("CXCYWHR")}, "boxes must not be rotated.* CXCYWHR"),
        ({"boxes": rotated("XYXYXYXY")}, "boxes must not be rotated.* XYXYXYXY"),
        ({"boxes": torch.ones(1, 5)}, r"boxes must have shape \(num_boxes, 4\), but have \(1, 5\)"),
        (
            {"boxes": torch.ones(1, 4, device="meta")},
            "boxes of the target must be on the device of its image, cpu, but are on meta",
        ),
        ({"boxes": torch.tensor([[0.0, 0, float("nan"), 2]])}, "box 0 of the target must be finite"),
        ({"weights": torch.ones(2)}, "'weights' must have one entry for each of 1 boxes, but has 2"),
        ({"masks": torch.ones(1, 8, 9)}, "masks of the target are on a canvas"),
    ],
)
def test_a_wrong_target_is_named(changes, message):
    target = {"boxes": torch.tensor([[0.0, 0, 2, 2]]), **changes}
    with pytest.raises(ValueError, match=message):
        AlbumentationsTransform([A.NoOp()])(torch.zeros(3, 8, 8), target)


@pytest.mark.parametrize("key", ["masks", "keypoints"])
def test_what_is_moved_must_be_a_tensor(key):
    target = {"boxes": torch.tensor([[0.0, 0, 2, 2]]), key: np.zeros((1, 8, 8))}
    with pytest.raises(TypeError, match=f"'{key}' must be a tensor, but is a ndarray"):
        AlbumentationsTransform([A.NoOp()])(torch.zeros(3, 8, 8), target)


def test_what_belongs_to_the_image_stays_whatever_its_name():
    target = {"boxes": torch.tensor([[0.0, 0, 2, 2], [4, 0, 6, 2]]), "id": 17, "pose": np.array(["left", "right"])}
    _, new = AlbumentationsTransform([A.Crop(4, 0, 8, 8)])(torch.zeros(3, 8, 8), target)
    assert new["id"] == 17
    assert new["pose"].tolist() == ["right"]


def test_a_target_without_boxes_is_named():
    with pytest.raises(ValueError, match=r"must hold 'boxes', but it holds \['bboxes'\]"):
        AlbumentationsTransform([A.NoOp()])(torch.zeros(3, 8, 8), {"bboxes": torch.zeros(0, 4)})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 8, 8, device="meta"), "image must be on the CPU.* on meta"),
        (torch.zeros(3, 8, 8, dtype=torch.float64), "image must be uint8 or float32.* torch.float64"),
        (torch.zeros(3, 8, 8, dtype=torch.float16), "image must be uint8 or float32.* torch.float16"),
        (np.zeros((8, 8, 3), np.uint16), "image must be uint8 or float32.* torch.uint16"),
    ],
)
def test_a_wrong_image_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        AlbumentationsTransform([A.NoOp()])(image, {"boxes": torch.zeros(0, 4)})
