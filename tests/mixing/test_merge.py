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
from torchvision.transforms.v2.functional import convert_bounding_box_format

from detmix.mixing.batch import mixup_batch
from detmix.mixing.join import SHARED_BYTES
from detmix.mixing.merge import merge_by_plan
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
