import copy
import json
import pickle
import random

import albumentations as A
import numpy as np
import pytest
import torch

from detmix.albumentations import MixUp

LAM = 0.75  # and its complement are exact, and so are both shares of a whole pixel or box


def annotated(boxes, size=(8, 10), channels=(3,), dtype=np.uint8, seed=0, prefix="own"):
    """One sample, as a pipeline takes it, with `boxes` in pixels, their corners, and a name for each."""
    image = np.random.default_rng(seed).integers(0, 256, (*size, *channels), dtype=np.uint8)
    image = image if dtype == np.uint8 else (image / 256).astype(dtype)
    names = [f"{prefix} {i}" for i in range(len(boxes))]
    return {"image": image, "bboxes": np.array(boxes, np.float32).reshape(-1, 4), "names": names}


OWN = [[1, 2, 5, 6], [0, 0, 10, 8], [4, 1, 6, 7]]
THEIRS = [[0, 3, 6, 12], [2, 2, 4, 4]]


def partner_of(boxes=THEIRS, size=(12, 6), **settings):
    return annotated(boxes, size, seed=1, prefix="partner", **settings)


def pipeline(*transforms, box_format="pascal_voc", label_fields=("names", "weights"), seed=0, **settings):
    return A.Compose(
        list(transforms) or [MixUp(lam=LAM, p=1.0)],
        bbox_params=A.BboxParams(box_format, label_fields=list(label_fields), **settings),
        keypoint_params=A.KeypointParams("xy", label_fields=["joints"], remove_invisible=False),
        seed=seed,
    )


def run(mix, sample, partner, **more):
    """The pipeline's result for a sample that weighs every box 1."""
    points = {"keypoints": np.zeros((0, 2)), "joints": []}
    weights = {"weights": [1.0] * len(sample["bboxes"])}
    if isinstance(partner, dict):
        partner = {**points, **partner}
    return mix(**{**points, **weights, **sample}, mixup_metadata=partner, **more)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
@pytest.mark.parametrize("sizes", [((4, 5), (4, 5)), ((4, 5), (6, 3)), ((6, 7), (4, 5)), ((2, 3), (6, 7))])
@pytest.mark.parametrize("fill", [0, 9])
def test_images_are_blended_on_a_canvas_that_holds_both(dtype, channels, sizes, fill):
    first = annotated([], sizes[0], channels, dtype)
    second = partner_of([], sizes[1], channels=channels, dtype=dtype)
    out = run(pipeline(MixUp(lam=LAM, fill=fill, p=1.0)), first, second)["image"]
    expected = np.zeros((*np.max(sizes, 0), *channels))
    for row, column in np.ndindex(expected.shape[:2]):
        for image, share in ((first["image"], 0.75), (second["image"], 0.25)):
            is_inside = row < image.shape[0] and column < image.shape[1]
            expected[row, column] += share * (image[row, column].astype(np.float64) if is_inside else fill)
    assert out.dtype == dtype
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(out, np.rint(expected) if dtype == np.uint8 else expected)


def test_fill_can_be_one_number_a_channel():
    mix = pipeline(MixUp(lam=LAM, fill=(4, 8, 12), p=1.0))
    out = run(mix, annotated([], (2, 2)), partner_of([], (3, 1)))["image"]
    assert out[2, 1].tolist() == [4, 8, 12]


def to_format(box, box_format, size):
    left, top, right, bottom = box
    height, width = size
    corners = [left / width, top / height, right / width, bottom / height]
    centre = [(corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2]
    return {
        "pascal_voc": box,
        "coco": [left, top, right - left, bottom - top],
        "albumentations": corners,
        "yolo": [*centre, corners[2] - corners[0], corners[3] - corners[1]],
    }[box_format]


@pytest.mark.parametrize("box_format", ["pascal_voc", "coco", "yolo", "albumentations"])
@pytest.mark.parametrize(("size", "partner_size"), [((8, 10), (12, 6)), ((12, 16), (12, 6)), ((8, 10), (16, 20))])
def test_boxes_of_both_keep_their_place_on_the_canvas(box_format, size, partner_size):
    first, second = annotated(OWN, size), partner_of(size=partner_size)
    for sample in (first, second):
        shape = sample["image"].shape[:2]
        sample["bboxes"] = np.array([to_format(box, box_format, shape) for box in sample["bboxes"].tolist()])
    out = run(pipeline(box_format=box_format), first, second)
    canvas = out["image"].shape[:2]
    np.testing.assert_allclose(
        out["bboxes"], [to_format(box, box_format, canvas) for box in OWN + THEIRS], atol=1e-5, rtol=0
    )
    assert out["names"] == first["names"] + second["names"]
    assert out["weights"] == [0.75] * 3 + [0.25] * 2


WEIGHTS = {
    "list": list,
    "list of int": lambda values: [int(value) for value in values],
    "list of float32": lambda values: [np.float32(value) for value in values],
    "float32": lambda values: np.array(values, np.float32),
    "float64": lambda values: np.array(values, np.float64),
    "float16": lambda values: np.array(values, np.float16),
    "int": lambda values: np.array(values, np.int64),
    "bool": lambda values: np.array(values, bool),
}


@pytest.mark.parametrize("form", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("numbers", [(0, 0), (0, 1), (1, 0), (1, 1), (3, 2), (3, 0)])
def test_weights_are_the_shares_to_the_last_bit(form, numbers):
    mix = pipeline(MixUp(lam=0.3, p=1.0))
    lam = round(0.3 * 2**24) / 2**24
    first, second = annotated(OWN[: numbers[0]]), partner_of(THEIRS[: numbers[1]])
    for _ in range(2):  # a second call finds what Albumentations has learnt of the field in the first one
        out = run(mix, {**first, "weights": form([1.0] * numbers[0])}, second)
        assert np.array_equal(out["weights"], [lam] * numbers[0] + [1 - lam] * numbers[1])
        assert len(out["bboxes"]) == len(out["names"]) == sum(numbers)
        first, second = annotated(OWN), partner_of(THEIRS)
        numbers = (3, 2)


def test_a_weight_that_is_given_is_multiplied():
    first, second = {**annotated(OWN), "weights": [0.5, 1, 0.5]}, {**partner_of(), "weights": np.array([1, 0.125])}
    mixed = run(pipeline(), first, second)
    assert mixed["weights"] == [0.375, 0.75, 0.375, 0.25, 0.03125]


def test_two_mixes_multiply():
    mix = pipeline(MixUp(lam=LAM, p=1.0), MixUp(lam=0.5, metadata_key="other", p=1.0))
    third = {**annotated([[1, 1, 3, 9]], (10, 14), prefix="third"), "keypoints": [], "joints": []}
    out = run(mix, annotated(OWN[:1]), partner_of(THEIRS[:1]), other=third)
    assert out["image"].shape == (12, 14, 3)
    assert out["names"] == ["own 0", "partner 0", "third 0"]
    assert out["weights"] == [0.375, 0.125, 0.5]
    np.testing.assert_allclose(out["bboxes"], [OWN[0], THEIRS[0], [1, 1, 3, 9]], atol=1e-5)


@pytest.mark.parametrize("channels", [(), (2,)])
@pytest.mark.parametrize("as_list", [False, True])
def test_masks_and_keypoints_come_in_the_order_of_the_boxes(as_list, channels):
    first, second = annotated(OWN), partner_of()
    rng = np.random.default_rng(2)
    for sample, prefix in ((first, "own"), (second, "partner")):
        number, size = len(sample["bboxes"]), sample["image"].shape[:2]
        sample["masks"] = rng.integers(0, 2, (number, *size, *channels), dtype=np.uint8)
        sample["keypoints"] = rng.random((number * 2, 2)) * 6
        sample["joints"] = [f"{prefix} {i} {j}" for i in range(number) for j in range(2)]
        if as_list:
            sample["masks"], sample["keypoints"] = list(sample["masks"]), sample["keypoints"].tolist()
    out = run(pipeline(), first, second)
    assert len(out["masks"]) == 5
    for mask, source in zip(out["masks"], [*first["masks"], *second["masks"]], strict=True):
        expected = np.zeros((12, 10, *channels), np.uint8)
        for row, column in np.ndindex(source.shape[:2]):
            expected[row, column] = source[row, column]
        np.testing.assert_array_equal(mask, expected)
        assert mask.dtype == np.uint8
    np.testing.assert_allclose(out["keypoints"], np.concatenate([first["keypoints"], second["keypoints"]]), atol=1e-5)
    assert out["joints"] == first["joints"] + second["joints"]
    assert isinstance(out["masks"], list) == isinstance(out["keypoints"], list) == as_list


@pytest.mark.parametrize("empty", [list, lambda: np.zeros((0, 8, 10), np.int64)])
@pytest.mark.parametrize("partner_empty", [list, lambda: np.zeros((0, 12, 6), np.int64)])
@pytest.mark.parametrize("numbers", [(0, 0), (0, 2), (3, 0)])
def test_a_side_without_boxes_loses_nothing_of_the_other(empty, partner_empty, numbers):
    first, second = annotated(OWN[: numbers[0]]), partner_of(THEIRS[: numbers[1]])
    for sample, none in ((first, empty), (second, partner_empty)):
        number, size = len(sample["bboxes"]), sample["image"].shape[:2]
        sample["masks"] = np.ones((number, *size), np.uint8) if number else none()
        sample["bboxes"] = sample["bboxes"] if number else []
        sample["keypoints"], sample["joints"] = [[i, i + 1] for i in range(number)], ["joint"] * number
    out = run(pipeline(), first, second)
    number = sum(numbers)
    assert out["image"].shape == (12, 10, 3)
    assert np.shape(out["bboxes"])[0] == len(out["names"]) == len(out["weights"]) == len(out["joints"]) == number
    assert np.reshape(out["keypoints"], (-1, 2)).tolist() == [[i, i + 1] for i in range(number)]
    masks = np.asarray(out["masks"])
    assert len(masks) == number
    if number:
        height, width = (8, 10) if numbers[0] else (12, 6)
        assert masks.shape == (number, 12, 10)
        assert masks.dtype == np.uint8
        assert masks[:, :height, :width].all()
        assert masks.sum() == number * height * width


def test_an_empty_list_of_masks_stays_one_that_later_transforms_take():
    mix = pipeline(MixUp(lam=LAM, p=1.0), A.HorizontalFlip(p=1))
    assert run(mix, {**annotated([]), "masks": []}, {**partner_of([]), "masks": []})["masks"] == []


@pytest.mark.parametrize("names", [["own 0", "partner 1"], ["own 1", "own 2", "partner 0"]])
def test_a_box_that_a_later_crop_drops_takes_its_weight_along(names):
    boxes = {name: [0, 0, 2, 2] for name in ["own 0", "own 1", "own 2", "partner 0", "partner 1"]}
    boxes |= {name: [3, i, 6, i + 3] for i, name in enumerate(names)}
    first = {**annotated([boxes[f"own {i}"] for i in range(3)]), "weights": [1, 0.5, 0.25]}
    second = {**partner_of([boxes[f"partner {i}"] for i in range(2)]), "weights": [1, 0.5]}
    weights = {"own 0": 0.75, "own 1": 0.375, "own 2": 0.1875, "partner 0": 0.25, "partner 1": 0.125}
    out = run(pipeline(MixUp(lam=LAM, p=1.0), A.Crop(3, 0, 9, 8)), first, second)
    assert out["names"] == names
    assert out["weights"] == [weights[name] for name in names]
    np.testing.assert_allclose(out["bboxes"], [[0, i, 3, i + 3] for i in range(len(names))], atol=1e-5)


@pytest.mark.parametrize(
    ("transform", "move"),
    [
        (A.HorizontalFlip(p=1), lambda x0, y0, x1, y1: [10 - x1, y0, 10 - x0, y1]),
        (A.VerticalFlip(p=1), lambda x0, y0, x1, y1: [x0, 12 - y1, x1, 12 - y0]),
        (A.Resize(36, 20), lambda x0, y0, x1, y1: [2 * x0, 3 * y0, 2 * x1, 3 * y1]),
        (A.RandomBrightnessContrast(p=1), lambda *box: list(box)),
    ],
)
def test_later_transforms_see_boxes_on_the_canvas(transform, move):
    out = run(pipeline(MixUp(lam=LAM, p=1.0), transform), annotated(OWN), partner_of())
    np.testing.assert_allclose(out["bboxes"], [move(*box) for box in OWN + THEIRS], atol=1e-4)
    assert out["weights"] == [0.75] * 3 + [0.25] * 2


def test_random_crops_keep_weights_beside_their_boxes():
    boxes = [[i, i, i + 3, i + 3] for i in range(7)]
    weights = {f"own {i}": 0.75 * (i + 1) / 8 for i in range(7)} | {f"partner {i}": (i + 1) / 32 for i in range(7)}
    first = {**annotated(boxes, (12, 12)), "weights": [(i + 1) / 8 for i in range(7)]}
    second = {**partner_of(boxes, (10, 14)), "weights": [(i + 1) / 8 for i in range(7)]}
    mix = pipeline(MixUp(lam=LAM, p=1.0), A.RandomCrop(5, 5), A.HorizontalFlip(p=0.5))
    kept = set()
    for _ in range(20):
        out = run(mix, first, second)
        assert out["weights"] == [weights[name] for name in out["names"]]
        assert len(out["bboxes"]) == len(out["names"])
        kept |= set(out["names"])
    assert len(kept) > 7


def test_a_label_field_finds_the_mask_of_each_box_that_is_left():
    first, second = annotated(OWN), partner_of()
    for sample, start in ((first, 0), (second, len(OWN))):
        number, size = len(sample["bboxes"]), sample["image"].shape[:2]
        sample["masks"] = np.zeros((number, *size), np.uint8)
        for mask, (x0, y0, x1, y1) in zip(sample["masks"], sample["bboxes"].astype(int), strict=True):
            mask[y0:y1, x0:x1] = 1
        sample["rows"] = np.arange(start, start + number)
    mix = pipeline(MixUp(lam=LAM, p=1.0), A.Crop(5, 0, 10, 12), label_fields=["names", "rows", "weights"])
    out = run(mix, first, second)
    assert out["rows"].tolist() == [1, 2, 3]
    for row, (x0, y0, x1, y1) in zip(out["rows"], np.rint(out["bboxes"]).astype(int), strict=True):
        assert out["masks"][row].sum() == out["masks"][row][y0:y1, x0:x1].sum() == (x1 - x0) * (y1 - y0)


def test_transforms_in_front_see_the_sample_alone():
    first, second = annotated(OWN), partner_of()
    out = run(pipeline(A.HorizontalFlip(p=1), MixUp(lam=0.5, p=1.0)), first, second)
    np.testing.assert_allclose(out["bboxes"][:3], [[10 - x1, y0, 10 - x0, y1] for x0, y0, x1, y1 in OWN], atol=1e-5)
    np.testing.assert_allclose(out["bboxes"][3:], THEIRS, atol=1e-5)


@pytest.mark.parametrize("mixup", [MixUp(p=1.0), MixUp(p=0.0)])
def test_a_sample_without_partner_stays_as_it_is(mixup):
    first = {**annotated(OWN), "weights": [1.0, 0.5, 1.0], "masks": list(np.ones((3, 8, 10), np.uint8))}
    out = run(pipeline(mixup), first, [] if mixup.p else partner_of())
    assert out["weights"] == first["weights"]
    assert out["names"] == first["names"]
    np.testing.assert_array_equal(out["image"], first["image"])
    np.testing.assert_array_equal(out["masks"], first["masks"])
    np.testing.assert_allclose(out["bboxes"], OWN, atol=1e-5)


def partners(number=4):
    """As many samples, each with one box, named by its index and 9 pixels plus its index high."""
    points = {"keypoints": [], "joints": []}
    return [{**annotated([[0, 0, 1, 1]], (9 + i, 4), prefix=f"from {i}"), **points} for i in range(number)]


def test_one_of_the_partners_is_drawn_whole():
    mix = pipeline(MixUp(p=1.0))
    seen = set()
    for _ in range(40):
        out = run(mix, annotated([]), partners())
        (name,) = out["names"]
        assert name == f"from {len(out['image']) - 9} 0"
        seen.add(name)
    assert len(seen) == 4


def test_the_seed_of_the_pipeline_decides():
    def draw(mix):
        outs = [run(mix, annotated(OWN), partners()) for _ in range(8)]
        return [(out["image"].tobytes(), out["names"], out["weights"]) for out in outs]

    runs = [draw(pipeline(MixUp(p=0.5), seed=seed)) for seed in (5, 5, 6)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what must not matter
    torch.manual_seed(0)
    assert draw(pipeline(MixUp(p=0.5), seed=5)) == runs[0]


def test_the_applied_params_tell_lam():
    mix = A.Compose(
        [MixUp(p=1.0)], bbox_params=A.BboxParams("coco", label_fields=["weights"]), save_applied_params=True, seed=0
    )
    box = [[0, 0, 2, 2]]
    image = np.zeros((4, 4), np.uint8)
    out = mix(image=image, bboxes=box, weights=[1.0], mixup_metadata={"image": image, "bboxes": box})
    ((name, params),) = out["applied_transforms"]
    assert name == "MixUp"
    assert out["weights"] == [params["lam"], 1 - params["lam"]]


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.2}, {"alpha": (1, 3)}, {"lam": 0.3}, {"lam": (0.1, 0.9)}])
def test_shares_are_exact_in_float32_and_add_up_to_1(settings):
    mixup = MixUp(**settings)
    mixup.set_random_seed(0)
    for _ in range(200):
        lam = mixup.draw_lam()
        assert (lam * 2**24).is_integer()
        assert float(np.float32(lam)) == lam
        assert np.float32(lam) + np.float32(1 - lam) == 1


@pytest.mark.parametrize(
    ("settings", "mean", "variance"),
    [  # of Beta(a, b): a / (a + b) and ab / (a + b)^2 / (a + b + 1)
        ({"alpha": 1.5}, 0.5, 1 / 16),
        ({"alpha": (6, 2)}, 0.75, 1 / 48),
        ({"alpha": 0.5, "lam": (0.2, 0.8)}, 0.5, 0.36 / 12),
        ({"lam": 0.3}, 0.3, 0),
    ],
)
def test_shares_follow_their_law(settings, mean, variance):
    mixup = MixUp(**settings)
    mixup.set_random_seed(0)
    draws = [mixup.draw_lam() for _ in range(4000)]
    assert abs(np.mean(draws) - mean) < 5 * (variance / 4000) ** 0.5 + 1e-7
    assert abs(np.var(draws) - variance) < 0.1 * variance + 1e-12


@pytest.mark.parametrize("box_format", ["pascal_voc", "albumentations"])
def test_sample_and_partner_are_left_alone(box_format):
    first, second = annotated(OWN), partner_of()
    for sample, size in ((first, (8, 10)), (second, (12, 6))):
        sample["bboxes"] = np.array([to_format(box, box_format, size) for box in sample["bboxes"].tolist()])
        sample["image"] = sample["image"][:, ::-1]  # of negative strides
        sample["masks"] = np.ones((len(sample["bboxes"]), *size), np.uint8)
        sample["weights"] = np.ones(len(sample["bboxes"]))
        sample["keypoints"], sample["joints"] = np.ones((1, 2)), ["joint"]
        for value in sample.values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False  # whoever writes to it raises
    metadata = [second]
    kept = copy.deepcopy(metadata)
    out = run(pipeline(box_format=box_format, clip=True), first, metadata)
    assert out["mixup_metadata"] is metadata
    assert second.keys() == kept[0].keys()
    assert all(np.array_equal(second[key], kept[0][key]) for key in kept[0])


def test_labels_of_the_partner_are_not_cut_to_the_samples_type():
    mix = pipeline(label_fields=["names", "ids", "weights"])
    first = {**annotated(OWN[:1]), "names": np.array(["cat"]), "ids": np.array([7], np.uint8)}
    second = {**partner_of(THEIRS[:1]), "names": np.array(["giraffe"]), "ids": np.array([300.5])}
    out = run(mix, first, second)
    assert out["names"].tolist() == ["cat", "giraffe"]
    assert out["ids"].tolist() == [7, 300.5]


def test_labels_that_were_never_seen_can_join_at_any_call():
    mix = pipeline()
    for first, second in (("cat", "dog"), ("emu", "cat"), ("dog", "fox")):
        out = run(mix, {**annotated(OWN[:1]), "names": [first]}, {**partner_of(THEIRS[:1]), "names": [second]})
        assert out["names"] == [first, second]


@pytest.mark.parametrize(("own", "theirs"), [("list", "array"), ("array", "list")])
def test_the_sample_decides_between_lists_and_arrays(own, theirs):
    forms = {"list": np.ndarray.tolist, "array": np.asarray}
    first, second = annotated(OWN), partner_of()
    for sample, form in ((first, forms[own]), (second, forms[theirs])):
        sample["keypoints"], sample["joints"] = form(np.ones((1, 2))), ["joint"]
        sample["bboxes"] = form(sample["bboxes"])
        sample["weights"] = form(np.ones(len(sample["bboxes"])))
    out = run(pipeline(), first, second)
    for key in ("bboxes", "keypoints", "weights"):
        assert isinstance(out[key], type(first[key]))


def test_boxes_may_have_columns_of_their_own():
    mix = A.Compose([MixUp(lam=LAM, p=1.0)], bbox_params=A.BboxParams("pascal_voc", label_fields=["weights", "ids"]))
    image = np.zeros((8, 8, 3), np.uint8)
    partner = {"image": image, "bboxes": [[2, 2, 6, 6, 40]], "ids": [4]}
    out = mix(image=image, bboxes=[[0, 0, 4, 4, 30]], weights=[1.0], ids=[3], mixup_metadata=partner)
    np.testing.assert_allclose(out["bboxes"], [[0, 0, 4, 4, 30], [2, 2, 6, 6, 40]], atol=1e-5)
    assert (out["weights"], out["ids"]) == ([0.75, 0.25], [3, 4])
    partner["bboxes"] = [[2, 2, 6, 6]]
    with pytest.raises(ValueError, match="as many columns"):
        mix(image=image, bboxes=[[0, 0, 4, 4, 30]], weights=[1.0], ids=[3], mixup_metadata=partner)


def test_a_masked_sample_and_its_partner_must_fit():
    first = {**annotated(OWN), "masks": np.ones((3, 8, 10), np.uint8)}
    good = {**partner_of(), "masks": np.ones((2, 12, 6), np.uint8)}
    for masks, message in (
        (good["masks"][:1], "1 masks for 2 bboxes"),
        (good["masks"][:, 1:], r"mask 0 of mixup_metadata must be as large as its image, \(12, 6\), but is \(11, 6\)"),
        (good["masks"].astype(np.float32), "masks of mixup_metadata must have the dtype .* uint8, but has float32"),
        (np.ones((2, 12, 6, 1), np.uint8), r"masks of mixup_metadata must have the channels .* \(\), but has \(1,\)"),
        (None, r"must have \['image', 'bboxes', 'masks', 'keypoints'\].* has no \['masks'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run(pipeline(), first, {**good, "masks": masks})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, r"mixup_metadata must have .* has no \['image'\]"),
        ({"bboxes": None}, r"mixup_metadata must have .* which may be empty, but has no \['bboxes'\]"),
        ({"image": np.zeros((12, 6, 3), np.float32)}, "image of mixup_metadata .* dtype .* uint8, but has float32"),
        ({"image": np.zeros((12, 6, 4), np.uint8)}, r"image of mixup_metadata .* channels .* \(3,\), but has \(4,\)"),
        ({"image": np.zeros((12, 6), np.uint8)}, r"image of mixup_metadata .* channels .* \(3,\), but has \(\)"),
        ({"names": None}, "mixup_metadata must have the label field 'names' of its bboxes"),
        ({"names": ["one"]}, "'names' of mixup_metadata must have one entry for each of 2 bboxes"),
        ({"weights": [1.0]}, "'weights' of mixup_metadata must have one entry for each of 2 bboxes"),
        ({"names": [1, 2]}, r"'names' of mixup_metadata must be categories.* \[1, 2\]"),
        ({"bboxes": np.array([[0, 0, 9, 9], [0, 0, 2, 2]])}, "bboxes of mixup_metadata: Expected x_max"),
        ({"keypoints": [[1, 1]]}, "'joints' of mixup_metadata must have one entry for each of 1 keypoints"),
    ],
)
def test_a_wrong_partner_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        run(pipeline(), annotated(OWN), {**partner_of(), **changes})


def test_a_number_is_no_category():
    mix = pipeline(label_fields=["names", "weights"])
    with pytest.raises(ValueError, match=r"'names' of mixup_metadata must be numbers.* \['one', 'two'\]"):
        run(mix, {**annotated(OWN), "names": [1, 2, 3]}, {**partner_of(), "names": ["one", "two"]})


def test_the_partner_of_a_list_is_named_by_its_index():
    with pytest.raises(ValueError, match=r"mixup_metadata\[0\] must have .* has no \['image', "):
        run(pipeline(), annotated(OWN), [{"boxes": []}])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "mixup_metadata must be a dict or a list of dicts, but is a NoneType"),
        (7, "mixup_metadata must be a dict or a list of dicts, but is a int"),
        ([7], r"mixup_metadata\[0\] must be a dict, but is a int"),
        ({**partner_of(), "image": [[0]]}, "image of mixup_metadata must be a numpy array, but is a list"),
    ],
)
def test_a_partner_of_a_wrong_type_is_named(metadata, message):
    with pytest.raises(TypeError, match=message):
        run(pipeline(), annotated(OWN), metadata)


def test_a_forgotten_partner_is_an_error():
    mix = A.Compose([MixUp(metadata_key="mate", p=1.0)], bbox_params=A.BboxParams("coco", label_fields=["weights"]))
    with pytest.raises(ValueError, match="mate"):
        mix(image=np.zeros((4, 4), np.uint8), bboxes=[], weights=[])


@pytest.mark.parametrize("box_params", [None, A.BboxParams("coco"), A.BboxParams("coco", label_fields=["labels"])])
def test_a_pipeline_that_would_lose_the_weights_is_refused(box_params):
    image = np.zeros((4, 4), np.uint8)
    fields = {} if box_params is None else {"bboxes": [], "labels": []}
    for metadata in ([], {"image": image, **fields}):
        with pytest.raises(ValueError, match="'weights' must be a label field"):
            A.Compose([MixUp(p=1.0)], bbox_params=box_params)(image=image, **fields, mixup_metadata=metadata)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mask": np.zeros((8, 10), np.uint8)}, r"the sample has \['mask'\]. A semantic mask"),
        ({"images": np.zeros((1, 8, 10, 3), np.uint8)}, r"the sample has \['images'\]"),
        ({"depth": np.zeros((8, 10, 3), np.uint8)}, r"the sample has \['depth'\]"),
        ({"keypoints": [[1, 1]]}, "keypoint_params"),
        ({"bboxes": None}, "needs 'bboxes'"),
        ({"image": np.zeros((8, 10, 3))}, "image must be uint8 or float32, but is float64"),
        ({"weights": ["a", "b", "c"]}, "weights of the boxes must be numbers"),
    ],
)
def test_a_sample_that_cannot_be_mixed_is_named(more, message):
    params = A.BboxParams("pascal_voc", label_fields=["weights"])
    mix = A.Compose([MixUp(p=1.0)], bbox_params=params, additional_targets={"depth": "image"})
    sample = {"image": np.zeros((8, 10, 3), np.uint8), "bboxes": OWN, "weights": [1.0] * 3, **more}
    if sample["bboxes"] is None:
        del sample["bboxes"]
    with pytest.raises(ValueError, match=message):
        mix(**sample, mixup_metadata={**partner_of(), "keypoints": []})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0}, "alpha .* is 0"),
        ({"alpha": (1, -1)}, r"alpha .* is \(1, -1\)"),
        ({"alpha": float("inf")}, "alpha .* is inf"),
        ({"alpha": (1, 2, 3)}, r"alpha must be .* one number or two, but it is \(1, 2, 3\)"),
        ({"alpha": "1"}, "alpha must be .*, but it is '1'"),
        ({"lam": 1.5}, "lam .* is 1.5"),
        ({"lam": float("nan")}, "lam .* is nan"),
        ({"lam": (0.6, 0.4)}, r"lam .* is \(0.6, 0.4\)"),
        ({"p": 2}, "p must be a probability .* is 2"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MixUp(**settings)


@pytest.mark.parametrize("settings", [{}, {"alpha": (1.0, 3.0), "lam": (0.2, 0.4), "fill": (1, 2, 3), "p": 0.25}])
def test_a_pipeline_comes_back_from_its_dict(settings):
    mix = pipeline(MixUp(**settings, metadata_key="mate"))
    (back,) = A.from_dict(json.loads(json.dumps(A.to_dict(mix))))
    assert repr(back).replace("[", "(").replace("]", ")") == repr(mix[0])
    assert all(f"{name}={value}" in repr(mix[0]) for name, value in settings.items())
    mix[0].set_random_seed(3)
    back.set_random_seed(3)
    assert back.draw_lam() == mix[0].draw_lam()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda mix: pickle.loads(pickle.dumps(mix))])
def test_a_copied_pipeline_draws_the_same(copied):
    mix = pipeline(MixUp(p=0.5), A.HorizontalFlip(p=0.5))
    run(mix, annotated(OWN), partners())
    other = copied(mix)
    for _ in range(5):
        one, two = (run(each, annotated(OWN), partners()) for each in (mix, other))
        assert one["weights"] == two["weights"]
        np.testing.assert_array_equal(one["image"], two["image"])


def test_a_strict_pipeline_takes_the_partner():
    mix = A.Compose([MixUp(lam=LAM, p=1.0)], bbox_params=A.BboxParams("coco", label_fields=["weights"]), strict=True)
    image, box = np.zeros((4, 4, 3), np.uint8), [[0, 0, 2, 2]]
    out = mix(image=image, bboxes=box, weights=[1.0], mixup_metadata={"image": image, "bboxes": box})
    assert out["weights"] == [0.75, 0.25]


def test_mixup_can_be_one_of_several():
    mix = pipeline(A.Sequential([A.OneOf([MixUp(lam=LAM, p=1.0)], p=1.0)], p=1.0))
    assert run(mix, annotated(OWN), partner_of())["weights"] == [0.75] * 3 + [0.25] * 2
