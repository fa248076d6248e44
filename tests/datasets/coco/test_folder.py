import contextlib
import copy
import gc
import io
import json
import pickle
import re

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection.transform import resize_boxes

from detmix.datasets.coco.folder import CocoFolder
from tests.datasets.coco.written import FILE, PIXELS, SIZE, TRIANGLE, annotation, compressed


def quiet(function, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


# What a sample holds.


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools.mask.decode
def test_samples_equal_torchvisions_and_pycocotools(content, write):
    root = write(content)
    dataset = CocoFolder(root, crowd=True)
    file = root / "annotations" / FILE
    theirs = quiet(CocoDetection, root / "images", file)
    theirs = wrap_dataset_for_transforms_v2(theirs, target_keys=["image_id", "boxes", "labels", "iscrowd", "area"])
    reference = quiet(COCO, file)
    assert len(dataset) == len(theirs) == 4
    for (image, target), (their_image, expected) in zip(dataset, theirs, strict=True):
        torch.testing.assert_close(image, tv_tensors.Image(their_image), rtol=0, atol=0)
        assert target["image_id"] == expected["image_id"]
        annotations = reference.imgToAnns[target["image_id"]]
        torch.testing.assert_close(target["boxes"], expected.get("boxes", target["boxes"][:0]))
        assert [dataset.category_ids[label - 1] for label in target["labels"]] == [
            a["category_id"] for a in annotations
        ]
        assert target["iscrowd"].tolist() == [a["iscrowd"] for a in annotations]
        assert target["area"].tolist() == [a["area"] for a in annotations]
        assert target["masks"].tolist() == [reference.annToMask(a).tolist() for a in annotations]
        assert target["keypoints"].flatten(1).tolist() == [a["keypoints"] for a in annotations]


def test_samples_have_the_documented_types(content, write):
    image, target = CocoFolder(write(content))[1]  # image 30
    assert type(image) is tv_tensors.Image
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, *SIZE))
    assert type(target["boxes"]) is tv_tensors.BoundingBoxes
    assert (target["boxes"].format.value, target["boxes"].canvas_size) == ("XYXY", SIZE)
    assert type(target["masks"]) is tv_tensors.Mask
    assert type(target["image_id"]) is int
    found = {key: (value.dtype, tuple(value.shape)) for key, value in target.items() if key != "image_id"}
    assert found == {
        "boxes": (torch.float32, (2, 4)),
        "labels": (torch.int64, (2,)),
        "masks": (torch.uint8, (2, *SIZE)),
        "keypoints": (torch.float32, (2, 2, 3)),
        "area": (torch.float32, (2,)),
        "iscrowd": (torch.int64, (2,)),
    }


def test_images_without_boxes_keep_every_shape_and_dtype(content, write):
    dataset = CocoFolder(write(content))
    empty, full = dataset[2][1], dataset[1][1]
    assert empty["image_id"] == 40
    for key in full.keys() - {"image_id"}:
        assert (type(empty[key]), empty[key].dtype) == (type(full[key]), full[key].dtype), key
        assert empty[key].shape == (0, *full[key].shape[1:]), key


def test_sparse_category_ids_become_labels_in_order_of_id(content, write):
    dataset = CocoFolder(write(content))
    assert dataset.category_ids == (3, 7, 90)
    assert dataset.class_names == ("early", "middle", "late")
    assert dataset.num_classes == 4
    assert [dataset[i][1]["labels"].tolist() for i in range(4)] == [[1], [3, 2], [], [3]]


def test_crowd_boxes_are_kept_on_request_only(content, write):
    root = write(content)
    assert CocoFolder(root)[0][1]["iscrowd"].tolist() == [0]
    assert CocoFolder(root, crowd=True)[0][1]["iscrowd"].tolist() == [0, 1]
    assert CocoFolder(root, crowd=np.bool_(True))[0][1]["iscrowd"].tolist() == [0, 1]


def test_missing_area_and_iscrowd_are_filled_in(content, write):
    for key in ("area", "iscrowd"):
        del content["annotations"][0][key]
    target = CocoFolder(write(content))[1][1]
    assert target["area"].tolist() == [10.5 * 8.25, 50.5]
    assert target["iscrowd"].tolist() == [0, 0]


def test_a_crowd_flag_may_be_a_bool(content, write):
    content["annotations"][0]["iscrowd"] = True
    assert CocoFolder(write(content), crowd=True)[1][1]["iscrowd"].tolist() == [1, 0]


def test_changing_a_sample_leaves_the_dataset_alone(content, write):
    dataset = CocoFolder(write(content))
    first = dataset[1][1]
    before = copy.deepcopy(first)
    for value in first.values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    again = dataset[1][1]
    assert all(torch.equal(again[key], before[key]) for key in before.keys() - {"image_id"})


def test_transforms_are_called_with_the_finished_sample(content, write):
    root = write(content)
    image, target = CocoFolder(root, transforms=lambda image, target: (image.shape, sorted(target)))[0]
    assert image == (3, *SIZE)
    assert target == ["area", "boxes", "image_id", "iscrowd", "keypoints", "labels", "masks"]


def test_indices_count_from_either_end_and_stop_there(content, write):
    dataset = CocoFolder(write(content))
    assert dataset[np.int64(3)][1]["image_id"] == dataset[-1][1]["image_id"] == 50
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 4 images"):
            dataset[index]


def test_objects_of_an_image_keep_the_order_of_the_file(content, write):
    content["annotations"] = [annotation(number, (30, 10)[number % 2], area=number) for number in range(100, 0, -1)]
    areas = [CocoFolder(write(content))[i][1]["area"].tolist() for i in range(2)]
    assert areas == [list(range(99, 0, -2)), list(range(100, 0, -2))]


# Masks and keypoints: given, required, never.


@pytest.mark.parametrize(("key", "name"), [("segmentation", "masks"), ("keypoints", "keypoints")])
@pytest.mark.parametrize("nothing", [[], None, "absent"])
def test_masks_and_keypoints_are_given_when_every_kept_annotation_has_one(content, write, key, name, nothing):
    lacking = content["annotations"][3]  # the crowd
    lacking[key] = nothing
    if nothing == "absent":
        del lacking[key]
    root = write(content)
    assert name in CocoFolder(root)[0][1]
    assert name not in CocoFolder(root, crowd=True)[0][1]
    assert name not in CocoFolder(root, **{name: False})[0][1]
    with pytest.raises(ValueError, match=rf"{FILE}: {name}=True, but annotation 4 has no '{key}'"):
        CocoFolder(root, crowd=True, **{name: True})


def test_without_annotations_masks_and_keypoints_come_only_when_required(content, write):
    content["annotations"] = []
    content["categories"][0]["keypoints"] = ["a", "b"]
    root = write(content)
    assert not {"masks", "keypoints"} & set(CocoFolder(root)[0][1])
    target = CocoFolder(root, masks=True, keypoints=True)[0][1]
    assert (target["masks"].shape, target["keypoints"].shape) == ((0, *SIZE), (0, 2, 3))


def test_a_dataset_may_have_no_images(content, write):
    dataset = CocoFolder(write({**content, "images": [], "annotations": []}))
    assert len(dataset) == 0


def rle(**keys):
    return {**compressed(PIXELS), **keys}


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, "6"]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [[1, 2, 3, 4, 5, 2e5]],
        [TRIANGLE],
        "polygon",
        rle(size=[30, 20]),
        rle(counts=None),
        rle(counts=""),
        rle(counts="abc"),
        rle(counts="05"),  # ends early
        rle(counts="Oib0"),  # -1 and 601
        rle(counts="P" * 13 + "0hb0"),  # 0 in 14 characters, more than 64 bits, and 600
        rle(counts=compressed(PIXELS)["counts"] + "1"),
        rle(counts=compressed(PIXELS)["counts"][:-1] + "é"),
        rle(counts="\ud800"),
        rle(counts=[]),
        rle(counts=[599]),
        rle(counts=[-1, 601]),
        rle(counts=[300.0, 300.0]),
    ],
)
def test_bad_segmentations_are_named_unless_masks_are_off(content, write, segmentation):
    content["annotations"][2]["segmentation"] = segmentation
    root = write(content)
    shown = re.escape(repr(segmentation)[:60])
    with pytest.raises(ValueError, match=rf"{FILE}: 'segmentation' of annotation 3 is {shown}.*20 x 30 pixels"):
        CocoFolder(root)
    CocoFolder(root, masks=False)


@pytest.mark.parametrize("seed", range(20))
def test_compressed_masks_of_any_pixels_are_accepted(content, write, seed):
    rng = np.random.default_rng(seed)
    pixels = (rng.random(SIZE) < rng.choice([0, 0.02, 0.5, 0.98, 1])).astype(np.uint8)
    content["annotations"][2]["segmentation"] = compressed(pixels)
    assert CocoFolder(write(content))[1][1]["masks"][1].tolist() == pixels.tolist()


@pytest.mark.parametrize("names", [None, [], ["a", "b"]])
@pytest.mark.parametrize("points", [[1, 2, 2], [1, 2, 2, 3, 4, 2, 5], [1, 2, 2, 3, 4, None], "points"])
def test_keypoints_of_wrong_length_are_named_unless_keypoints_are_off(content, write, names, points):
    if names is not None:
        for category in content["categories"]:
            category["keypoints"] = names
    content["annotations"][2]["keypoints"] = points
    root = write(content)
    shown = re.escape(repr(points))
    with pytest.raises(ValueError, match=rf"{FILE}: 'keypoints' of annotation 3 is {shown}.*list of 6 finite numbers"):
        CocoFolder(root)
    CocoFolder(root, keypoints=False)


@pytest.mark.parametrize("points", [5, [1], [1, 2]])
def test_the_first_keypoints_are_checked_too(content, write, points):
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0]["keypoints"] = points
    with pytest.raises(ValueError, match=rf"{FILE}: 'keypoints' of annotation 1 is .*expected a list of 3 finite"):
        CocoFolder(write(content))


def test_categories_with_different_numbers_of_keypoints_are_refused(content, write):
    content["categories"][0]["keypoints"] = ["a", "b"]
    content["categories"][1]["keypoints"] = ["a", "b", "c"]
    with pytest.raises(ValueError, match=rf"{FILE}: categories have \[2, 3\] keypoints.*keypoints=False"):
        CocoFolder(write(content))


# Structural faults are errors that name file and place.


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root .*nowhere is not a folder"):
        CocoFolder(tmp_path / "nowhere")


def test_a_missing_json_lists_those_that_are_there(content, write):
    root = write(content)
    with pytest.raises(FileNotFoundError, match=rf"instances_val.json is missing; json files there: .*{FILE}"):
        CocoFolder(root, "annotations/instances_val.json")
    (root / "annotations" / FILE).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{FILE} is missing; there is no json file"):
        CocoFolder(root)


def test_a_missing_images_folder_is_named(content, write):
    with pytest.raises(FileNotFoundError, match=r"images .*pictures is not a folder"):
        CocoFolder(write(content), images="pictures")


def test_invalid_json_is_placed_by_line_and_column(write):
    with pytest.raises(ValueError, match=rf"{FILE} is not valid json: .* in line 2, column 11"):
        CocoFolder(write(None, '{\n"images": }'))


def test_a_json_of_other_bytes_is_named(content, write):
    root = write(content)
    (root / "annotations" / FILE).write_bytes(b'{"images": "\xff"}')
    with pytest.raises(ValueError, match=rf"{FILE} is not valid json: .*0xff"):
        CocoFolder(root)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"images": ' + "1" * 5000 + "}"], ids=["nested", "long"])
def test_what_the_json_parser_cannot_bear_is_named(write, text):
    with pytest.raises(ValueError, match=rf"{FILE} is not valid json: "):
        CocoFolder(write(None, text))


def test_a_list_given_twice_is_named_rather_than_half_read(content, write):
    text = json.dumps(content)[:-1] + ', "annotations": []}'
    with pytest.raises(ValueError, match=rf"{FILE} has 'annotations' more than once"):
        CocoFolder(write(content, text))
    content["info"] = {"annotations": 5, "images": "annotations"}
    assert len(CocoFolder(write(content))) == 4


def test_reading_leaves_the_garbage_collector_as_it_was(content, write):
    CocoFolder(write(content))
    assert gc.isenabled()


def test_a_list_of_results_is_recognised(write):
    with pytest.raises(ValueError, match=rf"{FILE} holds a list \(detection results have this form\), expected .*dict"):
        CocoFolder(write([{"image_id": 1}]))


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_json_that_is_not_coco_names_what_is_missing(content, write, key):
    root = write(content)
    for broken, message in (
        ({k: v for k, v in content.items() if k != key}, f"{FILE} has no '{key}', expected a list"),
        ({**content, key: {}}, f"{FILE} '{key}' is a dict, expected a list"),
        ({**content, key: [*content[key], 5]}, rf"{FILE}: {key}\[{len(content[key])}\] is 5, expected a dict"),
    ):
        (root / "annotations" / FILE).write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            CocoFolder(root)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("images", "id"),
        ("images", "file_name"),
        ("images", "height"),
        ("categories", "name"),
        ("annotations", "image_id"),
        ("annotations", "category_id"),
        ("annotations", "id"),
    ],
)
def test_missing_fields_are_named(content, write, kind, key):
    root = write(content)
    del content[kind][1][key]
    (root / "annotations" / FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{FILE}: {kind}\[1\], {{.*, has no '{key}'"):
        CocoFolder(root)


@pytest.mark.parametrize("value", ["5", 5.0, None, True, 2**70])
def test_ids_other_than_ints_are_named(content, write, value):
    content["annotations"][1]["id"] = value
    with pytest.raises(
        ValueError, match=rf"{FILE}: 'id' of annotations\[1\] is {re.escape(repr(value))}, expected an int"
    ):
        CocoFolder(write(content))


@pytest.mark.parametrize(("kind", "again"), [("images", 50), ("annotations", 5), ("categories", 7)])
def test_duplicate_ids_are_named(content, write, kind, again):
    content[kind].append({**content[kind][-1], "id": again})
    with pytest.raises(ValueError, match=rf"{FILE}: 1 ids of '{kind}' occur more than once: {again}\."):
        CocoFolder(write(content))


@pytest.mark.parametrize(
    ("key", "known"), [("image_id", "4 known ids: 10, 30, 40, 50"), ("category_id", "3 known ids: 3, 7, 90")]
)
@pytest.mark.parametrize("value", [0, 35, 1000])
def test_unknown_images_and_categories_are_named(content, write, key, known, value):
    for row in (2, 4):
        content["annotations"][row][key] = value
    expected = rf"{FILE}: '{key}' of annotation 3 is {value}, .* {known} \(1 more"
    with pytest.raises(ValueError, match=expected):
        CocoFolder(write(content))


def test_long_lists_of_ids_are_cut_short(content, write):
    content["categories"] += [{"id": number, "name": "more"} for number in range(100, 120)]
    content["annotations"][0]["category_id"] = 1
    with pytest.raises(ValueError, match=r"known ids: 3, 7, 90, 100, .*, 106 and 13 more"):
        CocoFolder(write(content))


@pytest.mark.parametrize("size", [0, -20])
def test_images_without_size_are_named(content, write, size):
    content["images"][1]["height"] = size
    with pytest.raises(ValueError, match=rf"{FILE}: image 50 \(50.png\) has height, width \[{size}, 30\]"):
        CocoFolder(write(content), check_files=False)


def test_a_transform_that_fails_is_no_unreadable_image(content, write):
    def fail(image, target):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        CocoFolder(write(content), unreadable="skip", transforms=fail)[0]


def test_unreadable_is_one_of_two_words(content, write):
    with pytest.raises(ValueError, match="unreadable is 'ignore', expected 'raise' or 'skip'"):
        CocoFolder(write(content), unreadable="ignore")


BAD_BOXES = [
    None,
    5,
    "1,2,3,4",
    {"x": 1},
    [],
    [1, 2, 3],
    [1, 2, 3, 4, 5],
    [1, 2, 3, "4"],
    [1, 2, 3, None],
    [1, 2, 3, [4]],
]
BAD_BOXES += [
    [1, 2, 3, float("nan")],
    [1, 2, float("inf"), 4],
    [-float("inf"), 2, 3, 4],
    [1, 2, 3, True],
    [1, 2, 10**400, 3],
]


@pytest.mark.parametrize("box", BAD_BOXES, ids=lambda box: repr(box)[:25])
def test_boxes_other_than_four_finite_numbers_are_named(content, write, box):
    content["annotations"][3]["bbox"] = box
    shown = re.escape(repr(box)[:60])
    with pytest.raises(
        ValueError, match=rf"{FILE}: 'bbox' of annotation 4 is {shown}.*expected a list of 4 finite numbers"
    ):
        CocoFolder(write(content))


@pytest.mark.parametrize(
    ("key", "value"), [("area", -1.0), ("area", "5"), ("area", float("inf")), ("iscrowd", 2), ("iscrowd", [1])]
)
def test_areas_and_crowd_flags_are_checked(content, write, key, value):
    content["annotations"][2][key] = value
    with pytest.raises(ValueError, match=rf"{FILE}: '{key}' of annotation 3 is {re.escape(repr(value))}, expected"):
        CocoFolder(write(content))


# Defective boxes are left out with one warning.

DEFECTS = [[5, 5, 0, 4], [5, 5, 4, -1], [30, 5, 4, 4], [5, 20, 4, 4], [-4, 5, 4, 4], [5, -9, 4, 4], [5, 5, 1e-9, 4]]
DEFECTS += [[5, 5, 4, 0.0099], [29.995, 5, 4, 4]]  # which resized float32 may round to nothing


@pytest.mark.parametrize("box", DEFECTS, ids=str)
def test_defective_boxes_are_left_out_with_a_warning(content, write, box):
    content["annotations"][2]["bbox"] = box
    shown = rf"annotation 3 of 30.png: {re.escape(str([float(v) for v in box]))} \(left out\)"
    with pytest.warns(
        UserWarning, match=rf"{FILE}: of 4 boxes, 1 are left out .* 0 are clipped .*first 1: {shown}"
    ) as found:
        dataset = CocoFolder(write(content))
    assert len(found) == 1
    assert found[0].filename == __file__
    target = dataset[1][1]
    assert target["labels"].tolist() == [3]
    assert all(len(target[key]) == 1 for key in ("boxes", "masks", "keypoints", "area", "iscrowd"))


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ([-2, 5, 9, 4], [0, 5, 7, 9]),
        ([5, -1.5, 4, 9], [5, 0, 9, 7.5]),
        ([25, 5, 9, 4], [25, 5, 30, 9]),
        ([5, 15, 4, 9], [5, 15, 9, 20]),
    ],
)
def test_boxes_over_the_edge_are_clipped_with_a_warning(content, write, box, clipped):
    content["annotations"][2]["bbox"] = box
    with pytest.warns(UserWarning, match=r"0 are left out .* 1 are clipped .* annotation 3 of 30.png: .* \(clipped\)"):
        dataset = CocoFolder(write(content))
    assert dataset[1][1]["boxes"][1].tolist() == clipped


def test_thin_boxes_are_kept_and_stay_sound_when_resized(content, write):
    content["images"][3] |= {"width": 6000, "height": 8000}
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 5900, (500, 2)).tolist()
    content["annotations"] = [annotation(n, 30, bbox=[*corner, 0.011, 0.011]) for n, corner in enumerate(corners)]
    boxes = CocoFolder(write(content), check_files=False, masks=False, keypoints=False)._boxes
    assert len(boxes) == 500
    for size in ((800, 600), (1066, 800), (61, 46)):
        resized = resize_boxes(torch.tensor(boxes), [8000, 6000], size)
        assert (resized[:, 2:] > resized[:, :2]).all()


def test_boxes_a_pixel_over_the_edge_are_clipped_silently(content, write):
    content["annotations"][2]["bbox"] = [-0.75, -1, 31.5, 22]
    assert CocoFolder(write(content))[1][1]["boxes"][1].tolist() == [0, 0, 30, 20]


def test_one_warning_counts_all_and_names_the_first_ten(content, write):
    content["annotations"] += [annotation(100 + n, 30, bbox=[5, 5, -1, 4]) for n in range(11)]
    content["annotations"] += [annotation(200, 30, bbox=[25, 5, 9, 4])]
    with pytest.warns(UserWarning, match=r"of 16 boxes, 11 are left out .* 1 are clipped .* first 10: ") as found:
        CocoFolder(write(content))
    assert re.findall(r"annotation (\d+) of", str(found[0].message)) == [str(100 + n) for n in range(10)]


# Results.


def evaluate(root, results, kind="bbox"):
    truth = quiet(COCO, root / "annotations" / FILE)
    evaluation = COCOeval(truth, quiet(truth.loadRes, json.loads(json.dumps(results))), kind)
    quiet(evaluation.evaluate)
    quiet(evaluation.accumulate)
    quiet(evaluation.summarize)
    return evaluation.stats


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_ground_truth_as_prediction_scores_ap_1(content, write, kind):
    root = write(content)
    dataset = CocoFolder(root, crowd=True)
    results = []
    for _, target in dataset:
        prediction = {**target, "masks": target["masks"][:, None].float(), "scores": torch.ones(len(target["boxes"]))}
        results += dataset.to_coco(target["image_id"], prediction)
    assert len(results) == 5  # the crowd's too: evaluation has to ignore it
    if kind == "bbox":  # loadRes fills boxes from masks where both are given
        results = [{key: record[key] for key in ("image_id", "category_id", "bbox", "score")} for record in results]
    assert evaluate(root, results, kind)[:2].tolist() == [1, 1]
    assert {record["category_id"] for record in results} == {3, 7, 90}
    for record in results:
        record["category_id"] = 3
    assert evaluate(root, results, kind)[0] < 1


def test_results_hold_plain_numbers_and_original_ids(content, write):
    dataset = CocoFolder(write(content))
    prediction = {
        "boxes": torch.tensor([[1.5, 2, 4, 8]], requires_grad=True),
        "labels": torch.tensor([3]),
        "scores": torch.tensor([0.5]),
        "keypoints": torch.tensor([[[1.0, 2, 1], [3, 4, 1]]]),
    }
    expected = {
        "image_id": 30,
        "category_id": 90,
        "bbox": [1.5, 2, 2.5, 6],
        "score": 0.5,
        "keypoints": [1, 2, 1, 3, 4, 1],
    }
    results = dataset.to_coco(np.int64(30), prediction)
    assert json.loads(json.dumps(results)) == [expected]


def test_masks_above_a_half_become_run_lengths(content, write):
    dataset = CocoFolder(write(content))
    soft = torch.where(torch.from_numpy(PIXELS) > 0, 0.6, 0.5)[None, None]
    prediction = {"boxes": torch.ones(1, 4), "labels": torch.tensor([1]), "scores": torch.ones(1), "masks": soft}
    (result,) = dataset.to_coco(30, prediction)
    assert result["segmentation"] == compressed(PIXELS)


def test_no_prediction_gives_no_results(content, write):
    empty = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64), "scores": torch.empty(0)}
    assert CocoFolder(write(content)).to_coco(30, empty) == []


def test_predictions_that_do_not_fit_are_refused(content, write):
    dataset = CocoFolder(write(content))
    good = {"boxes": torch.ones(2, 4), "labels": torch.tensor([1, 3]), "scores": torch.ones(2)}
    for label in (0, 4):
        with pytest.raises(ValueError, match=rf"prediction\['labels'\] holds {label}, expected 1 to 3"):
            dataset.to_coco(30, {**good, "labels": torch.tensor([1, label])})
    with pytest.raises(ValueError, match=r"'labels': \(2,\)}, expected boxes \(N, 4\), labels and scores"):
        dataset.to_coco(30, {key: good[key] for key in ("boxes", "labels")})
    with pytest.raises(ValueError, match=r"'scores': \(3,\)}, expected boxes"):
        dataset.to_coco(30, {**good, "scores": torch.ones(3)})
    with pytest.raises(ValueError, match=rf"image_id 31 is not one of the 4 images of .*{FILE}"):
        dataset.to_coco(31, good)


# Processes.


def test_a_pickled_dataset_gives_the_same_samples(content, write):
    dataset = CocoFolder(write(content), crowd=True)
    copied = pickle.loads(pickle.dumps(dataset))
    for (image, target), (other_image, other) in zip(dataset, copied, strict=True):
        assert torch.equal(image, other_image)
        assert all(torch.equal(torch.as_tensor(target[key]), torch.as_tensor(other[key])) for key in target)


def test_spawned_workers_give_the_same_samples(content, write):
    dataset = CocoFolder(write(content))
    loaded = list(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn"))
    assert [target["image_id"] for _, target in loaded] == [10, 30, 40, 50]
    for (image, target), (other_image, other) in zip(dataset, loaded, strict=True):
        assert torch.equal(image, other_image)
        assert torch.equal(target["masks"], other["masks"])
