import copy
from fractions import Fraction

import pytest
import torch
from torchvision import tv_tensors

from detmix.functional import blend_images, merge_targets, mixup, unmixed
from tests.conftest import assert_same

SIZES = [((5, 7), (5, 7)), ((5, 7), (6, 4)), ((3, 8), (6, 9)), ((4, 4), (1, 1))]


def exact_blend(first, second, lam, fill):
    """The real-valued blend, pixel by pixel, in rational numbers."""
    channels, height, width = first.shape[0], *(max(first.shape[i], second.shape[i]) for i in (1, 2))
    out = torch.zeros(channels, height, width, dtype=torch.float64)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                value = Fraction(0)
                for image, share in ((first, Fraction(lam)), (second, 1 - Fraction(lam))):
                    inside = y < image.shape[1] and x < image.shape[2]
                    value += share * Fraction(image[c, y, x].item() if inside else fill[c])
                out[c, y, x] = float(value)
    return out


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("fill", [0, 114, (10, 0, 255)])
def test_uint8_blend_is_the_exact_one_to_half_a_level(sizes, lam, fill):
    first, second = (torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes)
    out = blend_images(first, second, lam, fill=fill)
    exact = exact_blend(first, second, lam, [fill] * 3 if isinstance(fill, int) else fill)
    assert out.dtype == torch.uint8
    assert (out - exact).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 2**-8)]
)
def test_float_blend_is_the_exact_one_to_its_rounding(sizes, dtype, tolerance):
    first, second = (torch.randn(3, *size).to(dtype) for size in sizes)
    out = blend_images(first, second, 0.3, fill=(0.5, -1.0, 0.0))
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), exact_blend(first, second, 0.3, (0.5, -1, 0)), rtol=tolerance, atol=tolerance
    )


def test_rounding_has_no_bias():
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 256, 256)
    for lam in torch.rand(20).tolist():
        exact = lam * levels.double() + (1 - lam) * levels.mT.double()
        assert (blend_images(levels, levels.mT, lam) - exact).mean().abs() < 0.01


def test_an_image_blended_with_itself_is_itself():
    image = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8)
    assert torch.equal(blend_images(image, image, 0.37), image)


def test_lam_of_one_is_first_and_of_zero_is_second():
    first, second = torch.rand(3, 4, 6), torch.rand(3, 5, 5)
    assert torch.equal(blend_images(first, second, 1.0)[:, :4, :6], first)
    assert torch.equal(blend_images(first, second, 0.0)[:, :5, :5], second)


def test_blend_keeps_the_type_of_first_and_carries_gradients():
    first, second = tv_tensors.Image(torch.rand(3, 4, 4)), torch.rand(3, 4, 4, requires_grad=True)
    out = blend_images(first, second, 0.25)
    assert isinstance(out, tv_tensors.Image)
    blend_images(first.as_subclass(torch.Tensor), second, 0.25).sum().backward()
    assert torch.equal(second.grad, torch.full((3, 4, 4), 0.75))


@pytest.mark.parametrize(
    ("first", "second", "lam", "message"),
    [
        (torch.zeros(3, 4, 4), torch.zeros(1, 4, 4), 0.5, "agree in channels, but first has 3 and second has 1"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8), 0.5, "agree in dtype, .*float32 .*uint8"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, device="meta"), 0.5, "agree in device, .*cpu .*meta"),
        (torch.zeros(3, 4, 4), torch.zeros(4, 4), 0.5, r"second must be an image of shape \(C, H, W\).*\(4, 4\)"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), 1.5, r"lie in \[0, 1\], but it is 1.5"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), float("nan"), "but it is nan"),
    ],
)
def test_images_that_do_not_go_together_are_named(first, second, lam, message):
    with pytest.raises(ValueError, match=message):
        blend_images(first, second, lam)


def test_every_per_box_key_is_joined_first_before_second(sample):
    (_, first), (_, second) = sample(2, (12, 16)), sample(3, (14, 10), seed=1)
    first["names"], second["names"] = ["a", "b"], ["c", "d", "e"]
    merged = merge_targets(first, second, 0.25, (14, 16), box_keys={*first, "weights", "source"} - {"image_id"})
    for key in ("boxes", "labels", "keypoints", "area", "iscrowd"):
        assert torch.equal(merged[key], torch.cat([torch.as_tensor(first[key]), torch.as_tensor(second[key])])), key
        assert merged[key].dtype == first[key].dtype
    assert merged["names"] == ["a", "b", "c", "d", "e"]
    assert merged["weights"].tolist() == [0.25, 0.25, 0.75, 0.75, 0.75]
    assert merged["source"].tolist() == [0, 0, 1, 1, 1]
    assert merged["lam"] == 0.25
    assert merged["boxes"].canvas_size == (14, 16)


def test_masks_are_padded_to_the_canvas(sample):
    (_, first), (_, second) = sample(1, (4, 6)), sample(2, (5, 3), seed=1)
    masks = merge_targets(first, second, 0.5, (5, 6))["masks"]
    assert isinstance(masks, tv_tensors.Mask)
    assert masks.shape == (3, 5, 6)
    assert torch.equal(masks[0, :4], first["masks"][0])
    assert torch.equal(masks[1:, :, :3], second["masks"])
    assert not masks[0, 4:].any()
    assert not masks[1:, :, 3:].any()


def test_plain_masks_are_padded_as_tv_tensors_are(sample):
    (_, first), (_, second) = sample(1, (4, 6)), sample(2, (5, 3), seed=1)
    expected = merge_targets(first, second, 0.5, (5, 6))["masks"].as_subclass(torch.Tensor)
    for target in (first, second):
        target["masks"] = target["masks"].as_subclass(torch.Tensor)
    assert torch.equal(merge_targets(first, second, 0.5, (5, 6))["masks"], expected)


def test_boxes_of_second_are_converted_to_the_format_of_first():
    xyxy = tv_tensors.BoundingBoxes([[1.0, 2.0, 5.0, 8.0]], format="XYXY", canvas_size=(9, 9))
    cxcywh = tv_tensors.BoundingBoxes([[3.0, 5.0, 4.0, 6.0]], format="CXCYWH", canvas_size=(7, 9))
    labels = torch.tensor([1])
    for first, second in ((xyxy, cxcywh), (cxcywh, xyxy)):
        merged = merge_targets({"boxes": first, "labels": labels}, {"boxes": second, "labels": labels}, 0.5, (9, 9))
        assert merged["boxes"].format == first.format
        assert torch.equal(merged["boxes"].as_subclass(torch.Tensor), first.repeat(2, 1).as_subclass(torch.Tensor))
        assert merged["boxes"].canvas_size == (9, 9)


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


def test_mixing_leaves_its_inputs_alone(sample):
    first, second = sample(2), sample(3, (9, 20), seed=1)
    kept = copy.deepcopy((first, second))
    image, target = mixup(first, second, 0.4)
    image.fill_(0)
    for value in target.values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert_same((first, second), kept)


def test_other_keys_are_those_of_first_by_identity(sample):
    (image, first), second = sample(2), sample(2, seed=1)
    first["size"] = torch.tensor([12, 16])
    first["meta"] = {"file": "a.jpg"}
    target = mixup((image, first), second, 0.5)[1]
    assert target["size"] is first["size"]
    assert target["meta"] is first["meta"]
    assert target["image_id"] == 0


def test_unmixed_has_the_keys_of_a_mixed_one(sample):
    image, target = unmixed(sample(2))
    assert target.keys() == mixup(sample(2), sample(2), 0.5)[1].keys()
    assert target["weights"].tolist() == [1, 1]
    assert target["source"].tolist() == [0, 0]
    assert target["lam"] == 1
    assert torch.equal(image, sample(2)[0])


def test_a_key_that_only_one_target_has_is_named(sample):
    (_, first), (_, second) = sample(2), sample(2)
    del second["masks"]
    for pair, which in (((first, second), "second"), ((second, first), "first")):
        with pytest.raises(ValueError, match=f"'masks' has one entry per box, but the {which} target has none"):
            merge_targets(*pair, 0.5, (12, 16))


def test_a_length_that_disagrees_is_named(sample):
    (_, first), (_, second) = sample(2), sample(3)
    second["area"] = second["area"][:2]
    with pytest.raises(ValueError, match="'area' of the second target has 2 entries for 3 boxes"):
        merge_targets(first, second, 0.5, (12, 16))


def test_a_per_box_key_nobody_declared_is_named(sample):
    (_, first), (_, second) = sample(2), sample(3)
    first["angle"], second["angle"] = torch.rand(2), torch.rand(3)
    with pytest.raises(ValueError, match=r"'angle' has one entry per box .*2 and 3.* add it to box_keys"):
        merge_targets(first, second, 0.5, (12, 16))


def test_a_box_type_that_differs_is_named(sample):
    (_, first), (_, second) = sample(2), sample(3)
    second["boxes"] = second["boxes"].as_subclass(torch.Tensor)
    with pytest.raises(ValueError, match=r"'boxes' must be of one type.*BoundingBoxes in the first target and Tensor"):
        merge_targets(first, second, 0.5, (12, 16))
