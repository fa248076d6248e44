import copy

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from detmix.mixing.batch import mixup, unmixed
from detmix.mixing.merge import merge_targets
from detmix.targets import box_fields
from tests.conftest import assert_same, make_sample


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


ROTATED = {
    "XYWHR": [[2.0, 3.0, 4.0, 5.0, 30.0], [1.0, 1.0, 2.0, 2.0, 0.0]],
    "CXCYWHR": [[4.0, 5.0, 4.0, 5.0, 30.0], [2.0, 2.0, 2.0, 2.0, -90.0]],
    "XYXYXYXY": [[1.0, 1, 5, 1, 5, 4, 1, 4], [2.0, 2, 3, 2, 3, 6, 2, 6]],
}


@pytest.mark.parametrize("first_format", ROTATED)
@pytest.mark.parametrize("second_format", ROTATED)
def test_rotated_boxes_of_second_are_converted_to_the_format_of_first(first_format, second_format):
    first, second = (
        {"boxes": tv_tensors.BoundingBoxes(ROTATED[f], format=f, canvas_size=(9, 9)), "labels": torch.tensor([1, 2])}
        for f in (first_format, second_format)
    )
    boxes = merge_targets(first, second, 0.5, (9, 12))["boxes"]
    converted = v2.functional.convert_bounding_box_format(second["boxes"], new_format=first_format)
    assert boxes.format.value == first_format
    assert boxes.canvas_size == (9, 12)
    assert torch.equal(
        boxes.as_subclass(torch.Tensor), torch.cat([first["boxes"], converted]).as_subclass(torch.Tensor)
    )


def test_a_rotated_box_and_an_upright_one_are_named():
    first = {"boxes": tv_tensors.BoundingBoxes(ROTATED["XYWHR"], format="XYWHR", canvas_size=(9, 9))}
    second = {"boxes": tv_tensors.BoundingBoxes([[0, 0, 4, 4]], format="XYXY", canvas_size=(9, 9))}
    with pytest.raises(
        ValueError, match=r"rotated in both targets or in neither, .* XYWHR in the first and XYXY in the"
    ):
        merge_targets(first, second, 0.5, (9, 9))


def test_whole_numbers_keep_their_half_pixels_in_another_format():
    first = {"boxes": tv_tensors.BoundingBoxes([[2.0, 2.0, 3.0, 3.0]], format="CXCYWH", canvas_size=(9, 9))}
    second = {"boxes": tv_tensors.BoundingBoxes([[0, 0, 3, 3]], format="XYXY", canvas_size=(9, 9))}
    assert merge_targets(first, second, 0.5, (9, 9))["boxes"][1].tolist() == [1.5, 1.5, 3.0, 3.0]


def test_keypoints_of_torchvision_move_to_the_new_canvas():
    points = [tv_tensors.KeyPoints(torch.rand(n, 4, 2), canvas_size=(4, 6)) for n in (1, 2)]
    first, second = ({"boxes": torch.zeros(len(p), 4), "keypoints": p} for p in points)
    joined = merge_targets(first, second, 0.5, (8, 9))["keypoints"]
    assert isinstance(joined, tv_tensors.KeyPoints)
    assert joined.canvas_size == (8, 9)
    assert torch.equal(joined.as_subclass(torch.Tensor), torch.cat(points).as_subclass(torch.Tensor))


def test_lists_arrays_and_tuples_of_the_users_own_are_joined():
    first = {"boxes": torch.zeros(1, 4), "area": [3.0], "id": (7,), "difficult": np.array([True]), "iscrowd": [0]}
    second = {"boxes": torch.zeros(2, 4), "area": [4.0, 5.0], "id": (8, 9), "difficult": np.array([False, True])}
    second["iscrowd"] = torch.tensor([1, 0])
    merged = merge_targets(first, second, 0.5, (9, 9))
    assert merged["area"] == [3.0, 4.0, 5.0]
    assert list(merged["id"]) == [7, 8, 9]
    assert merged["difficult"].tolist() == [True, False, True]
    assert isinstance(merged["iscrowd"], torch.Tensor)
    assert merged["iscrowd"].tolist() == [0, 1, 0]


def test_a_value_without_entries_belongs_to_the_image_whatever_its_key():
    first = {"boxes": torch.zeros(1, 4), "id": 17, "type": "photo", "area": torch.tensor(5.0)}
    second = {"boxes": torch.zeros(2, 4), "id": 18, "type": "drawing", "area": torch.tensor(6.0)}
    merged = merge_targets(first, second, 0.5, (9, 9))
    assert (merged["id"], merged["type"], float(merged["area"])) == (17, "photo", 5.0)


@pytest.mark.parametrize("empty", ["first", "second"])
def test_a_target_without_boxes_need_not_have_the_keys_of_the_other(sample, empty):
    full, bare = sample(2)[1], {"boxes": torch.zeros(0, 4), "area": torch.zeros(0), "names": []}
    del full["area"]
    pair = (bare, full) if empty == "first" else (full, bare)
    merged = merge_targets(*pair, 0.25, (12, 16), box_keys={*full, "area", "names"} - {"image_id"})
    assert isinstance(merged["boxes"], tv_tensors.BoundingBoxes)
    for key in ("boxes", "labels", "masks", "keypoints", "iscrowd"):
        assert torch.equal(merged[key], full[key]), key
    assert merged["weights"].tolist() == [0.75 if empty == "first" else 0.25] * 2
    assert not {"area", "names"} & merged.keys()


def test_two_targets_without_boxes_have_the_keys_of_both():
    first = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    second = {"boxes": torch.zeros(0, 4), "area": torch.zeros(0), "names": []}
    merged = merge_targets(first, second, 0.5, (4, 4), box_keys={"boxes", "labels", "area", "names"})
    assert all(len(merged[key]) == 0 for key in ("boxes", "labels", "area", "names", "weights", "source"))
    assert merged["labels"].dtype == torch.int64


def test_entries_of_a_target_without_boxes_are_not_lost_in_silence():
    first, second = {"boxes": torch.zeros(0, 4), "area": torch.ones(2)}, {"boxes": torch.zeros(1, 4)}
    with pytest.raises(ValueError, match="'area' of the first target has 2 entries for 0 boxes"):
        merge_targets(first, second, 0.5, (4, 4))
    with pytest.raises(ValueError, match="'area' has one entry per box, but the first target has none"):
        merge_targets(second, first, 0.5, (4, 4))


@pytest.mark.parametrize("own", [False, True])
def test_boxes_below_the_least_weight_are_dropped_with_all_they_have(sample, own):
    first, second = sample(2)[1], sample(3, seed=1)[1]
    if own:
        first["weights"], second["weights"] = torch.tensor([1.0, 0.25]), torch.tensor([0.5, 1.0, 1.0])
    merged = merge_targets(first, second, 0.75, (12, 16), min_weight=0.25)
    expected = {(0, 0): 0.75} if own else {(0, 0): 0.75, (0, 1): 0.75}
    expected |= {(1, 1): 0.25, (1, 2): 0.25} if own else {(1, 0): 0.25, (1, 1): 0.25, (1, 2): 0.25}
    assert merged["weights"].tolist() == list(expected.values())
    for key in ("boxes", "labels", "masks", "keypoints", "area", "iscrowd"):
        for row, (source, index) in enumerate(expected):
            assert torch.equal(merged[key][row], (first, second)[source][key][index]), key
    assert len(merge_targets(first, second, 0.75, (12, 16), min_weight=0.26)["boxes"]) == (1 if own else 2)
    assert isinstance(merged["boxes"], tv_tensors.BoundingBoxes)
    odd = unmixed((torch.zeros(3, 12, 16), {**first, "weights": [1.0, 0.125]}), min_weight=0.25, box_keys={"boxes"})[1]
    assert len(odd["boxes"]) == len(odd["weights"]) == len(odd["source"]) == 1
    unmixed_target = unmixed(
        (torch.zeros(3, 12, 16), {**first, "weights": torch.tensor([1.0, 0.125])}), min_weight=0.25
    )[1]
    assert len(unmixed_target["boxes"]) == len(unmixed_target["masks"]) == 1


def test_weights_are_float32_whatever_they_were():
    first = {"boxes": torch.zeros(2, 4), "weights": torch.tensor([0.5, 0.1], dtype=torch.float64)}
    weights = merge_targets(first, {"boxes": torch.zeros(1, 4), "weights": [0.5]}, 0.5, (4, 4))["weights"]
    assert weights.dtype == torch.float32
    assert torch.equal(weights, torch.tensor([0.25, 0.05, 0.25]))
    with pytest.raises(ValueError, match=r"lie in \[0, 1\], but it is -0.5"):
        merge_targets(first, first, -0.5, (4, 4))


def test_shares_of_their_own_weigh_the_boxes():
    first, second = {"boxes": torch.zeros(1, 4)}, {"boxes": torch.zeros(2, 4)}
    merged = merge_targets(first, second, 0.75, (4, 4), shares=(1.0, 0.0))
    assert merged["weights"].tolist() == [1, 0, 0]
    assert (merged["lam"], merged["shares"], merged["canvas"]) == (0.75, (1.0, 0.0), (4, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"keypoints": torch.zeros(3, 17, 3)},
            r"'keypoints' .* shape \(3, 3\) in the first target and \(17, 3\) in the",
        ),
        ({"area": torch.zeros(3, device="meta")}, "'area' must be on one device, but is on cpu .* and on meta"),
        ({"masks": torch.zeros(3, 12, 20)}, r"'masks' must fit on the canvas of \(12, 16\), but is of size \(12, 20\)"),
        ({"masks": torch.zeros(3, 20, 16)}, r"'masks' must fit on the canvas of \(12, 16\), but is of size \(20, 16\)"),
    ],
)
def test_values_that_cannot_be_one_are_named(sample, changes, message):
    with pytest.raises(ValueError, match=message):
        merge_targets(sample(2)[1], {**sample(3)[1], **changes}, 0.5, (12, 16))


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
