import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import tv_tensors

from detmix.mixing.placement import place
from detmix.mixing.plan import Placement
from tests.conftest import assert_same, make_sample

SHARES = st.floats(0, 1)
FORMATS = {
    "XYXY": [4.0, 4, 12, 10],
    "XYWH": [4.0, 4, 8, 6],
    "CXCYWH": [8.0, 7, 8, 6],
    "XYWHR": [4.0, 4, 8, 6, 10],
    "CXCYWHR": [8.0, 7, 8, 6, -30],
    "XYXYXYXY": [4.0, 4, 12, 4, 12, 10, 4, 10],
}


def square(size=(16, 24), box=(6, 4, 14, 12)):
    """An image black but for one white box, which mask and corner keypoints follow."""
    x1, y1, x2, y2 = box
    image = torch.zeros(3, *size)
    image[:, y1:y2, x1:x2] = 1
    target = {
        "boxes": torch.tensor([[x1, y1, x2, y2]], dtype=torch.float32),
        "labels": torch.tensor([3]),
        "weights": torch.tensor([0.5]),
        "masks": image[:1].to(torch.bool),
        "keypoints": torch.tensor([[[x1, y1, 2.0], [x2, y2, 1.0]]]),
        "area": torch.tensor([32.0]),  # half of the box
    }
    return image, target


@given(
    scale=st.floats(0.3, 2), x=SHARES, y=SHARES, canvas=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    size=st.tuples(st.integers(14, 40), st.integers(16, 40)),
)  # fmt: skip
def test_box_mask_keypoints_and_pixels_stay_together(scale, x, y, canvas, size):
    image, target = place(*square(size), canvas, Placement(scale, x, y))
    assert image.shape == (3, *canvas)
    number = len(target["boxes"])
    assert all(len(target[key]) == number for key in ("labels", "weights", "masks", "keypoints", "area"))
    if not number:
        return
    assert target["masks"].shape == (1, *canvas)
    assert target["masks"].dtype == torch.bool
    x1, y1, x2, y2 = target["boxes"][0].tolist()
    assert 0 <= x1 < x2 <= canvas[1]
    assert 0 <= y1 < y2 <= canvas[0]
    rows, columns = (image[0] > 0.5).any(1).nonzero(), (image[0] > 0.5).any(0).nonzero()
    if len(rows) and len(columns):  # the scaled square as the pixels show it, up to resampling
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert all(abs(float(a) - b) <= 1 + scale for a, b in zip(seen, (x1, y1, x2, y2), strict=True))
    for corner, (px, py, visible) in zip(((x1, y1), (x2, y2)), target["keypoints"][0].tolist(), strict=True):
        inside = 0 <= px < canvas[1] and 0 <= py < canvas[0]
        assert (visible > 0) == inside
        assert not inside or (abs(px - corner[0]) < 1e-3 and abs(py - corner[1]) < 1e-3)
    assert abs(float(target["area"][0]) - (x2 - x1) * (y2 - y1) / 2) < 1e-2 * canvas[0] * canvas[1]


def test_scale_of_one_fits_the_canvas_and_changes_nothing_else():
    image, target = square()
    placed, same = place(image, target, (16, 24), Placement(1.0, 0.3, 0.7))
    assert torch.equal(placed, image)
    assert_same(same, target)
    image, target = place(image, target, (8, 24), Placement(1.0, 1.0, 0.0))
    assert target["boxes"].tolist() == [[12 + 3, 2, 12 + 7, 6]]
    assert not image[:, :, :12].any()


def test_even_a_speck_has_a_pixel():
    image, target = place(*square(), (16, 24), Placement(0.01, 0.0, 0.0))
    assert int((image > 0).sum()) <= 3
    assert len(target["boxes"]) == 0


def test_boxes_that_may_hang_over_are_cut_at_the_canvas_all_the_same():
    boxes = tv_tensors.BoundingBoxes([[6.0, 4, 20, 12]], format="XYXY", canvas_size=(16, 24), clamping_mode=None)
    _, target = place(torch.zeros(3, 16, 24), {"boxes": boxes}, (16, 24), Placement(2.0, 0.0, 0.0))
    assert target["boxes"].tolist() == [[12, 8, 24, 16]]


@pytest.mark.parametrize(
    ("place_at", "visible"),
    [((0.0, 0.0), [0.0, 1.0, 0.0, 0.0]), ((1.0, 1.0), [0.0, 0.0, 1.0, 1.0]), ((0.5, 0.5), [0.0, 0.0, 0.0, 1.0])],
)
def test_keypoints_off_any_side_are_invisible(place_at, visible):
    # Of an image of 16 x 24, doubled: the left upper quarter, the right lower one, the middle.
    points = torch.tensor([[[13.0, 2, 1], [2, 2, 1], [22, 14, 1], [12, 8, 1]]])
    target = {"boxes": torch.tensor([[0.0, 0, 24, 16]]), "keypoints": points}
    _, new = place(torch.zeros(3, 16, 24), target, (16, 24), Placement(2.0, *place_at))
    assert new["keypoints"][0, :, 2].tolist() == visible
    below = {**target, "keypoints": torch.tensor([[[2.0, 9, 1], [2, 7, 1]]])}
    _, new = place(torch.zeros(3, 16, 24), below, (16, 24), Placement(2.0, 0.0, 0.0))
    assert new["keypoints"][0, :, 2].tolist() == [0, 1]


@pytest.mark.parametrize("area", [torch.tensor([32.0]), torch.tensor([32]), [32], [32.0]])
def test_area_of_any_kind_follows_its_box(area):
    _, target = place(torch.zeros(3, 16, 24), {**square()[1], "area": area}, (16, 24), Placement(1.5, 0.0, 0.0))
    # 8 x 8 become 12 x 10 on the canvas, of which the area is one half
    new = target["area"]
    assert type(new) is type(area)
    assert float(new[0]) == 60.0
    assert not isinstance(area, torch.Tensor) or new.dtype == area.dtype


def test_masks_of_the_users_own_follow_by_their_type():
    target = {**square()[1], "amodal": tv_tensors.Mask(square()[1]["masks"])}
    _, new = place(torch.zeros(3, 16, 24), target, (20, 40), Placement(0.7, 0.3, 0.2))
    assert isinstance(new["amodal"], tv_tensors.Mask)
    assert torch.equal(new["amodal"], new["masks"])


def test_the_places_are_the_edges_and_the_middle():
    for share, left in ((0.0, 0), (0.5, 12), (1.0, 24)):
        _, target = place(*square(), (32, 48), Placement(0.5, share, share))
        assert target["boxes"][0, :2].tolist() == [6 + left, 4 + round(left * 16 / 24)]
    # twice as large as the canvas: 0 shows the left part, 1 the right one
    for share, left in ((0.0, 0), (0.5, -12), (1.0, -24)):
        _, target = place(*square(), (16, 24), Placement(2.0, share, 0.5))
        assert target["boxes"][0, 0::2].tolist() == [max(0, 12 + left), min(24, 28 + left)]


def test_what_the_image_does_not_cover_is_filled():
    image, _ = place(torch.ones(3, 4, 4, dtype=torch.uint8), {}, (4, 8), Placement(1.0, 1.0, 0.0), fill=(7, 8, 9))
    assert image[:, 0].tolist() == [[level] * 4 + [1] * 4 for level in (7, 8, 9)]


def test_a_box_off_the_canvas_is_dropped_with_all_it_has():
    image, target = square(box=(0, 0, 4, 4))
    assert len(place(image, target, (16, 24), Placement(2.0, 1.0, 1.0))[1]["boxes"]) == 0
    two = {**target, "boxes": torch.tensor([[0.0, 0, 4, 4], [20, 12, 24, 16]]), "labels": torch.tensor([3, 5])}
    two = {key: two[key] for key in ("boxes", "labels")} | {"names": ["a", "b"], "id": 8}
    _, new = place(image, two, (16, 24), Placement(2.0, 1.0, 1.0), box_keys={"boxes", "labels", "names", "id"})
    assert new["boxes"].tolist() == [[16, 8, 24, 16]]
    assert (new["labels"].tolist(), new["names"], new["id"]) == ([5], ["b"], 8)


@pytest.mark.parametrize(("box_format", "columns"), FORMATS.items())
def test_boxes_of_every_format_keep_it(box_format, columns):
    boxes = tv_tensors.BoundingBoxes([columns], format=box_format, canvas_size=(16, 24))
    annotated = {"boxes": boxes, "area": torch.tensor([40.0])}
    _, target = place(torch.zeros(3, 16, 24), annotated, (8, 12), Placement(1.0, 0.0, 0.0))
    assert target["area"].tolist() == pytest.approx([10.0])
    assert target["boxes"].format == boxes.format
    assert target["boxes"].canvas_size == (8, 12)
    scales = torch.tensor([[0.5] * 4 + [1.0]] if box_format.endswith("R") else 0.5)
    torch.testing.assert_close(target["boxes"].as_subclass(torch.Tensor), boxes.as_subclass(torch.Tensor) * scales)


def test_keypoints_of_torchvision_follow():
    points = tv_tensors.KeyPoints([[[6.0, 4.0]]], canvas_size=(16, 24))
    target = {**square()[1], "keypoints": points}
    _, new = place(torch.zeros(3, 16, 24), target, (32, 48), Placement(0.5, 1.0, 0.0))
    assert isinstance(new["keypoints"], tv_tensors.KeyPoints)
    assert new["keypoints"].canvas_size == (32, 48)
    assert new["keypoints"].tolist() == [[[30.0, 4.0]]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_type_are_kept_and_inputs_left_alone(dtype):
    image, target = make_sample(3)
    image = tv_tensors.Image(image.to(dtype))
    kept = copy.deepcopy((image, target))
    placed, new = place(image, target, (20, 20), Placement(1.3, 0.2, 0.9))
    assert placed.dtype == dtype
    assert isinstance(placed, tv_tensors.Image)
    assert isinstance(new["masks"], tv_tensors.Mask)
    placed.zero_()
    assert_same((image, target), kept)
    same = place(image, target, (12, 16), Placement(1.0, 0.0, 0.0))[0]
    same.zero_()
    assert_same((image, target), kept)


@pytest.mark.parametrize("key", ["bbox", "segmentation"])
def test_coordinates_that_cannot_follow_are_named(key):
    image, target = square()
    with pytest.raises(ValueError, match=f"'{key}' holds coordinates of a list, which cannot follow its image"):
        place(image, {**target, key: [[1, 2, 3, 4]]}, (16, 24), Placement(1.0, 0.0, 0.0))
