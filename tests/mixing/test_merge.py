import copy
import io
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import convert_bounding_box_format

from detmix.mixing.batch import mixup_batch, unmixed
from detmix.mixing.join import SHARED_BYTES
from detmix.mixing.merge import merge_by_plan, merge_targets
from detmix.mixing.plan import Mix
from detmix.targets import BOX_KEYS
from tests.conftest import DEVICES, assert_same, without_waiting

CANVAS = (20, 24)
KEYS = BOX_KEYS | {"names"}


def merge_batch(targets, samples, lams, shares, canvases, **options):
    """Merge samples that are told by the places of their one or two targets."""
    firsts = [sides[0] for sides in samples]
    pool = None if firsts == [*range(len(targets))] else targets
    plan = [
        Mix(sides[1], lam, both) if len(sides) > 1 else Mix()
        for sides, lam, both in zip(samples, lams, shares, strict=True)
    ]
    return merge_by_plan([targets[first] for first in firsts], plan, canvases, pool=pool, **options)


def boxes_of(kind, number):
    corner = torch.rand(number, 2) * 10
    boxes = torch.cat([corner, corner + 1 + torch.rand(number, 2)], 1)
    if kind == "plain":
        return boxes
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=CANVAS)
    return convert_bounding_box_format(boxes, new_format=kind)


def masks_of(kind, number):
    masks = torch.randint(0, 2, (number, *CANVAS), dtype=torch.uint8)
    return tv_tensors.Mask(masks) if kind == "tv" else masks


def points_of(kind, number):
    points = torch.rand(number, 3, 2)
    return tv_tensors.KeyPoints(points, canvas_size=CANVAS) if kind == "tv" else points


VALUES = {
    "labels": {
        "tensor": lambda n: torch.randint(1, 9, (n,)),
        "int32": lambda n: torch.randint(1, 9, (n,), dtype=torch.int32),
        "list": lambda n: torch.randint(1, 9, (n,)).tolist(),
        "array": lambda n: torch.randint(1, 9, (n,)).numpy(),
    },
    "area": {
        "tensor": torch.rand,
        "learnt": lambda n: torch.rand(n, requires_grad=True),
        "double": lambda n: torch.rand(n, dtype=torch.float64),
    },
    "weights": {"none": lambda n: None, "tensor": torch.rand, "list": lambda n: torch.rand(n).tolist()},
    "names": {"list": lambda n: [f"{torch.rand(())}" for _ in range(n)]},
}


@st.composite
def batches(draw):
    """Targets of many kinds, and how they are joined; values of one key are mostly, not always, of one kind."""
    torch.manual_seed(draw(st.integers(0, 99)))
    boxes = draw(st.sampled_from([["plain"], ["XYXY"], ["XYXY", "CXCYWH"]]))
    kinds = {key: draw(st.lists(st.sampled_from([*VALUES[key]]), min_size=1, max_size=2)) for key in VALUES}
    tensors = {"masks": masks_of, "keypoints": points_of}
    shared = {key: draw(st.sampled_from([None, "plain", "tv"])) for key in tensors}
    targets = []
    for i in range(draw(st.integers(1, 5))):
        number = draw(st.integers(0, 3))
        target = {"image_id": i, "boxes": boxes_of(draw(st.sampled_from(boxes)), number)}
        target |= {key: VALUES[key][draw(st.sampled_from(kinds[key]))](number) for key in VALUES}
        target |= {key: make(shared[key], number) for key, make in tensors.items() if shared[key]}
        if target["weights"] is None:
            del target["weights"]
        for key in ("labels", "area", "names", "masks"):
            if not number and key in target and draw(st.booleans()):
                del target[key]
        targets.append(target)
    place = st.integers(0, len(targets) - 1)
    samples = draw(st.lists(st.lists(place, min_size=1, max_size=2), min_size=1, max_size=6))
    lams = [draw(st.integers(0, 8)) / 8 if len(sides) > 1 else 1.0 for sides in samples]
    return targets, samples, lams, [(lam, 1 - lam) for lam in lams], [CANVAS] * len(samples)


def rows_of(targets, key, box_format):
    """Entry by entry what a key holds in one target after the other."""
    for target in targets:
        values = target.get(key, ())
        if isinstance(values, tv_tensors.BoundingBoxes):
            values = convert_bounding_box_format(values, new_format=box_format)
        for value in values:
            yield value.tolist() if hasattr(value, "tolist") else value


@given(batches(), st.sampled_from([0.0, 0.375]))
def test_every_box_keeps_what_belongs_to_it_and_weighs_its_share(batch, min_weight):
    targets, samples, lams, shares, _ = batch
    for merged, sides, lam, both in zip(
        merge_batch(*batch, min_weight=min_weight, box_keys=KEYS), samples, lams, shares, strict=True
    ):
        sources = [(side, targets[place], share) for side, (place, share) in enumerate(zip(sides, both, strict=False))]
        weights, kept, source = [], [], []
        for side, target, share in sources:
            own = torch.as_tensor(target.get("weights", [1.0] * len(target["boxes"])), dtype=torch.float32)
            weights += (own * share).tolist()
            kept += (own * share >= min_weight).tolist()
            source += [side] * len(own)
        assert merged["weights"].tolist() == [weight for weight, keep in zip(weights, kept, strict=True) if keep]
        assert merged["source"].tolist() == [side for side, keep in zip(source, kept, strict=True) if keep]
        assert (merged["lam"], merged["shares"], merged["canvas"]) == (lam, both, CANVAS)
        box_format = getattr(merged["boxes"], "format", None)
        for key in {key for _, target, _ in sources for key in target} - {"weights", "image_id"}:
            rows = list(rows_of([target for _, target, _ in sources], key, box_format))
            expected = [row for row, keep in zip(rows, kept, strict=True) if keep] if rows else []
            assert list(rows_of([merged], key, box_format)) == expected, key


def comparable(target):
    """With sorted keys, and lists for arrays, which ``==`` compares entry by entry."""
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in sorted(target.items())}


@given(batches(), st.sampled_from([0.0, 0.375]))
def test_a_batch_is_its_samples_joined_one_by_one(batch, min_weight):
    targets, samples, lams, shares, canvases = batch
    options = {"min_weight": min_weight, "box_keys": KEYS}
    merged = merge_batch(*batch, **options)
    for i, sides in enumerate(samples):
        alone = [targets[place] for place in sides]
        (expected,) = merge_batch(alone, [[*range(len(alone))]], [lams[i]], [shares[i]], [canvases[i]], **options)
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert merged[i][key].requires_grad == value.requires_grad, key
                assert getattr(merged[i][key], "canvas_size", None) == getattr(value, "canvas_size", None), key
                assert getattr(merged[i][key], "format", None) == getattr(value, "format", None), key
        assert_same(comparable(merged[i]), comparable(expected))


@given(batches(), st.booleans())
def test_nothing_that_is_written_into_one_result_shows_anywhere_else(batch, grad):
    targets = [{key: value for key, value in target.items() if key != "area"} for target in batch[0]]
    merged = merge_batch(targets, *batch[1:], box_keys=KEYS)
    kept_targets, kept = copy.deepcopy((targets, merged))
    for i, target in enumerate(merged):
        with torch.set_grad_enabled(grad):
            for key in KEYS & target.keys():
                value = target[key]
                if isinstance(value, torch.Tensor):
                    value.fill_(7)
                else:
                    value[:] = [0] * len(value)
        others = zip([*targets, *merged[i + 1 :]], [*kept_targets, *kept[i + 1 :]], strict=True)
        for other, expected in others:
            assert_same(comparable(other), comparable(expected))


def simple_targets(number, boxes=2, kind="plain", **more):
    make = {"labels": torch.ones, "area": torch.rand, **more}
    return [{"boxes": boxes_of(kind, boxes), **{key: f(boxes) for key, f in make.items()}} for _ in range(number)]


def rotated(number):
    """The arguments that join each of so many targets with the next one."""
    return (
        [[i, (i + 1) % number] for i in range(number)],
        [0.75] * number,
        [(0.75, 0.25)] * number,
        [CANVAS] * number,
    )


def test_a_result_can_change_while_autograd_still_needs_another():
    targets = simple_targets(3, boxes=2)
    for target in targets:
        target["boxes"].requires_grad_()
    first, second, _ = merge_batch(targets, *rotated(3))
    loss = (second["boxes"] ** 2).sum()  # its backward pass reads the boxes
    first["boxes"].mul_(3)
    (loss + first["boxes"].sum()).backward()
    assert torch.equal(targets[0]["boxes"].grad, torch.full((2, 4), 3.0))
    assert torch.equal(targets[1]["boxes"].grad, 3 + 2 * targets[1]["boxes"])
    assert torch.equal(targets[2]["boxes"].grad, 2 * targets[2]["boxes"])


def test_only_what_was_learnt_requires_a_gradient():
    targets = simple_targets(3, weights=torch.rand)
    targets[0]["weights"].requires_grad_()
    targets[0]["area"].requires_grad_()
    merged = merge_batch(targets, *rotated(3))
    for key in ("weights", "area"):
        assert [target[key].requires_grad for target in merged] == [True, False, True], key
    sum(target["weights"].sum() for target in merged).backward()
    assert targets[0]["weights"].grad.tolist() == [1.0, 1.0]


def stored(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", ["plain", "XYXY"])
def test_what_is_large_is_not_stored_along_with_a_sample(kind):
    number, boxes = 8, 4
    targets = simple_targets(
        number, boxes, kind, embedding=lambda n: torch.rand(n, 5000), masks=lambda n: masks_of("plain", n)
    )
    merged = merge_batch(targets, *rotated(number), box_keys=BOX_KEYS | {"embedding"})
    for target in merged:
        for key in ("embedding", "masks"):
            assert target[key].untyped_storage().nbytes() == target[key].nbytes, key
        for key in ("boxes", "labels", "area", "weights", "source"):
            assert target[key].untyped_storage().nbytes() == number * target[key].nbytes <= SHARED_BYTES, key
    assert len(stored(merged[0]).getvalue()) < 1.2 * sum(merged[0][key].nbytes for key in ("embedding", "masks"))
    assert_same(torch.load(stored(merged[3]), weights_only=False), merged[3])


class Counting(TorchDispatchMode):
    """How often each operation was called."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def operations(number, targets):
    plan = [Mix((i + 1) % number, 0.75, (0.75, 0.25)) if i % 3 else Mix() for i in range(number)]
    with Counting() as mode:
        mixup_batch(torch.zeros(number, 3, *CANVAS), targets, plan)
    return mode.counts


@pytest.mark.parametrize("kind", ["plain", "XYXY"])
def test_a_larger_batch_takes_no_more_operations(kind):
    few, many = (operations(number, simple_targets(number, kind=kind)) for number in (4, 32))
    assert few == many
    assert many["cat"] == 3 + 1  # boxes, labels and area, and the boxes once more, to check them
    assert many["unsafe_split_with_sizes"] == 3 + 2  # these, weights and source


def test_weights_of_their_own_take_no_more_operations_either():
    few, many = (operations(number, simple_targets(number, weights=torch.rand)) for number in (4, 32))
    assert few == many


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_is_joined_without_waiting_for_the_device(device):
    targets = [{key: value.to(device) for key, value in target.items()} for target in simple_targets(4)]
    with without_waiting(device):
        merged = merge_batch(targets, *rotated(4), min_weight=0.5)
    for key in ("boxes", "labels", "area", "weights", "source"):
        assert {target[key].device.type for target in merged} == {device}, key
    assert [target["weights"].tolist() for target in merged] == [[0.75, 0.75]] * 4


def test_samples_can_lie_on_several_devices():
    targets = [*simple_targets(2), {"boxes": torch.zeros(3, 4, device="meta"), "weights": [1, 1, 1]}]
    merged = merge_batch(targets, [[0, 1], [2]], [0.5, 1.0], [(0.5, 0.5), (1.0, 0.0)], [CANVAS] * 2)
    assert [merged[1][key].device.type for key in ("boxes", "weights", "source")] == ["meta"] * 3
    assert merged[0]["weights"].tolist() == [0.5] * 4


def test_keys_stand_in_the_order_of_first_before_what_is_new():
    first, second = simple_targets(2)
    (merged,) = merge_batch([{"id": 7, **first}, {**second, "area": second["area"]}], *rotated(2))[:1]
    assert list(merged) == ["id", "boxes", "labels", "area", "weights", "source", "lam", "shares", "canvas"]


def test_boxes_that_are_only_copied_keep_their_canvas():
    targets = simple_targets(2, kind="XYXY")
    copy, joined = merge_batch(targets, [[0], [0, 1]], [1.0, 0.5], [(1.0, 0.0), (0.5, 0.5)], [(30, 30)] * 2)
    assert (copy["boxes"].canvas_size, joined["boxes"].canvas_size) == (CANVAS, (30, 30))


def test_no_samples_are_no_work():
    assert merge_batch([], [], [], [], []) == []


def test_a_target_that_could_not_be_mixed_is_not_let_through_unmixed():
    with pytest.raises(ValueError, match="'area' of the first target has 1 entries for 2 boxes"):
        merge_batch([{"boxes": torch.zeros(2, 4), "area": torch.zeros(1)}], [[0]], [1.0], [(1.0, 0.0)], [CANVAS])
    with pytest.raises(ValueError, match="'weights' of the first target has 1 entries for 2 boxes"):
        merge_batch([{"boxes": torch.zeros(2, 4), "weights": [0.5]}], [[0]], [1.0], [(1.0, 0.0)], [CANVAS])


@pytest.mark.parametrize(("weights", "shape"), [(0.5, r"\(\)"), (torch.ones(2, 1), r"\(2, 1\)")])
def test_weights_of_another_shape_are_named(weights, shape):
    with pytest.raises(ValueError, match=rf"'weights' must have shape \(num_boxes,\), but have {shape}"):
        merge_batch([{"boxes": torch.zeros(2, 4), "weights": weights}], [[0]], [1.0], [(1.0, 0.0)], [CANVAS])


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
