import json
import os
import warnings
from collections import defaultdict

import numpy as np
import PIL.Image
import pytest

from detmix.datasets.coco import repair as clean
from detmix.datasets.coco.check import check_folder
from detmix.datasets.coco.defects import KINDS
from detmix.datasets.coco.folder import CocoFolder
from detmix.datasets.coco.repair import CURES, write_clean
from tests.datasets.coco.defective import FILE, SPOILERS, encoded, make_content, oriented, picture, write


def spoilt(root, name):
    content = make_content()
    write(root, content)
    SPOILERS[name][0](content, root)
    return write(root, content, files=False)


def found_in(check):
    groups = defaultdict(list)
    for defect in check.defects:
        groups[defect.kind, defect.section] += defect.ids
        assert len(defect.rows) == len(defect.ids)
    return dict(groups)


def lost_annotations(check):
    records = check.table.records["annotations"]
    return [records[row].get("id") for row in np.flatnonzero(check.lost["annotations"])]


def tree(root):
    return {str(path.relative_to(root)): path.is_file() and path.read_bytes() for path in root.rglob("*")}


def test_a_sound_set_has_no_defect(tmp_path):
    check = check_folder(write(tmp_path, make_content()))
    assert (check.defects, check.errors, lost_annotations(check)) == ([], [], [])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", SPOILERS)
def test_each_defect_is_found_and_nothing_else(tmp_path, name, workers):
    _, expected, lost = SPOILERS[name]
    check = check_folder(spoilt(tmp_path, name), workers=workers)
    assert found_in(check) == expected
    assert lost_annotations(check) == lost


def test_every_kind_of_defect_has_a_test():
    tested = {kind for _, expected, _ in SPOILERS.values() for kind, _ in expected}
    assert tested | {"no segmentation", "no keypoints"} == KINDS.keys()


@pytest.mark.parametrize("name", SPOILERS)
def test_training_refuses_and_leaves_out_what_the_checker_calls_errors(tmp_path, name):
    check = check_folder(spoilt(tmp_path, name))
    training = {KINDS[defect.kind].training for defect in check.defects}
    assert bool(check.errors) == bool(training & {"refuses", "leaves out"})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        if "refuses" in training:
            with pytest.raises((ValueError, OSError)) as refused:
                [*CocoFolder(tmp_path, crowd=True)]
            said_first = next(d for d in check.errors if KINDS[d.kind].training == "refuses").message.rstrip(".")
            assert str(refused.value).startswith(said_first)
        else:
            samples = [*CocoFolder(tmp_path, crowd=True)]
            total = sum(len(target["boxes"]) for _, target in samples)
            assert total == len(check.table.records["annotations"]) - len(lost_annotations(check))
            assert len(said) == any(d.kind in ("empty box", "box outside", "box clipped") for d in check.defects)


@pytest.mark.parametrize("name", SPOILERS)
def test_a_cleaned_copy_has_no_errors_and_all_else(tmp_path, name):
    root = spoilt(tmp_path / "spoilt", name)
    before = tree(root)
    check = check_folder(root)
    listed = write_clean([check], root, tmp_path / "clean")
    assert tree(root) == before
    again = check_folder(tmp_path / "clean")
    assert again.errors == []
    assert not {defect.kind for defect in again.defects} & CURES.keys()
    lost = lost_annotations(check)
    kept = [record["id"] for record in json.loads((tmp_path / "clean" / FILE).read_text())["annotations"]]
    assert len(kept) == len(check.table.records["annotations"]) - len(lost)
    assert len(set(kept)) == len(kept)
    (entries,) = json.loads(listed.read_text()).values()
    removed = [entry for entry in entries if entry["what"] == "removed"]
    assert [entry["id"] for entry in removed if entry["table"] == "annotations"] == lost
    original = {table: json.loads((root / FILE).read_text())[table] for table in ("images", "annotations")}
    # json tells NaN from NaN by its text
    assert all(
        json.dumps(entry["record"]) in map(json.dumps, original[entry["table"]])
        for entry in entries
        if entry["table"] in original
    )
    samples = [*CocoFolder(tmp_path / "clean", crowd=True)]
    assert sum(len(target["boxes"]) for _, target in samples) == len(kept)


def test_all_defects_at_once_are_found_and_cleaned(tmp_path):
    """Each spoils a set of its own, whose images and annotations are moved into one json."""
    whole = {"images": [], "annotations": [], "categories": make_content()["categories"]}
    root = tmp_path / "spoilt"
    names = [n for n, (_, found, _) in SPOILERS.items() if all(table != "categories" for _, table in found)]
    # Unused masks make all unused, and a link out of its part stays inside the whole.
    names = [name for name in names if "unused" not in name and name != "link"]
    for number, name in enumerate(names):
        part = make_content()
        write(root / "images" / str(number), part)
        SPOILERS[name][0](part, root / "images" / str(number))
        for table, key in (("images", "id"), ("annotations", "image_id")):
            for record in part[table]:
                if isinstance(record, dict) and type(record.get(key)) is int:
                    record[key] += 1000 * number
        for record in part["annotations"]:
            if isinstance(record, dict) and type(record.get("id")) is int:
                record["id"] += 1000 * number
        for record in part["images"]:
            if isinstance(record, dict) and isinstance(record.get("file_name"), str):
                record["file_name"] = f"{number}/images/{record['file_name']}"
        for table in ("images", "annotations"):
            whole[table] += part[table]
    write(root, whole, files=False)
    check = check_folder(root)
    expected = {kind for name in names for kind, _ in SPOILERS[name][1]}
    assert {kind for kind, _ in found_in(check)} == expected
    assert len(lost_annotations(check)) == sum(len(SPOILERS[name][2]) for name in names)
    write_clean([check], root, tmp_path / "clean")
    assert check_folder(tmp_path / "clean").errors == []


def test_a_jpeg_with_another_behind_it_is_a_jpeg(tmp_path):
    content = make_content()
    content["images"][2]["file_name"] = "3.jpg"
    root = write(tmp_path, content)
    picture(0).save(root / "images/3.jpg", "MPO", save_all=True, append_images=[picture(1)])
    assert check_folder(root).defects == []


@pytest.mark.parametrize(("key", "name"), [("segmentation", "masks"), ("keypoints", "keypoints")])
def test_masks_and_keypoints_are_required_or_left_alone_as_by_the_reader(tmp_path, key, name):
    content = make_content()
    del content["annotations"][0][key]
    content["annotations"][4][key] = [1]
    root = write(tmp_path / "set", content)
    kinds = {f"no {key}": [11], ("polygon" if name == "masks" else "keypoints"): [31]}
    required = check_folder(root, **{name: True})
    assert found_in(required) == {(kind, "annotations"): ids for kind, ids in kinds.items()}
    assert found_in(check_folder(root, **{name: False})) == {}
    write_clean([required], root, tmp_path / "clean")
    assert check_folder(tmp_path / "clean", **{name: True}).errors == []
    assert len(json.loads((tmp_path / "clean" / FILE).read_text())["annotations"]) == 10


def test_what_is_left_is_checked_anew(tmp_path):
    """Annotation 11 alone has no mask, so masks were not in use; without it they are."""
    content = make_content()
    del content["annotations"][0]["segmentation"]
    content["annotations"][0]["category_id"] = 99
    content["annotations"][4]["segmentation"] = [[1, 2]]
    root = write(tmp_path / "set", content)
    write_clean([check_folder(root)], root, tmp_path / "clean")
    assert check_folder(tmp_path / "clean").errors == []


def test_crowd_boxes_are_checked(tmp_path):
    content = make_content()
    content["annotations"][4] |= {"iscrowd": 1, "bbox": [5, 5, 0, 4]}
    assert found_in(check_folder(write(tmp_path, content))) == {("empty box", "annotations"): [31]}


# What a cure makes of a record.


def cured(tmp_path, content):
    root = write(tmp_path / "set", content)
    write_clean([check_folder(root)], root, tmp_path / "clean")
    return json.loads((tmp_path / "clean" / FILE).read_text())


@pytest.mark.parametrize(("box", "clipped"), [([25, 5, 9, 4], [25, 5, 5, 4]), ([-3, -2, 8, 30], [0, 0, 5, 20])])
def test_boxes_are_clipped_to_their_image(tmp_path, box, clipped):
    content = make_content()
    content["annotations"][4]["bbox"] = box
    expected = make_content()
    expected["annotations"][4]["bbox"] = clipped
    assert cured(tmp_path, content) == expected


def test_another_annotation_of_the_same_id_gets_a_new_one(tmp_path):
    content = make_content()
    content["annotations"].append({**content["annotations"][4], "area": 41})
    expected = make_content()
    expected["annotations"].append({**expected["annotations"][4], "area": 41, "id": 63})
    assert cured(tmp_path, content) == expected


def test_an_area_that_is_none_is_deleted(tmp_path):
    content = make_content()
    content["annotations"][4]["area"] = "40"
    expected = make_content()
    del expected["annotations"][4]["area"]
    assert cured(tmp_path, content) == expected


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_an_image_is_stored_as_its_orientation_means_it(tmp_path, orientation):
    content = make_content()
    content["images"][2]["file_name"] = "3.jpg"
    root = write(tmp_path / "set", content)
    smooth = picture(size=(3, 2)).resize((20, 30), PIL.Image.Resampling.BILINEAR)
    (root / "images/3.jpg").write_bytes(encoded(smooth, "JPEG", exif=oriented(orientation), quality=95))
    write_clean([check_folder(root)], root, tmp_path / "clean")
    with PIL.Image.open(tmp_path / "clean/images/3.jpg") as stored:
        assert stored.getexif().get(0x0112, 1) == 1
        pixels = np.array(stored).astype(int)
    turns = {
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
    assert pixels.shape == (20, 30, 3)
    assert abs(pixels - turns[orientation](np.array(smooth).astype(int))).mean() < 4


# Where the copy goes.


def test_images_are_linked_or_where_that_fails_copied(tmp_path, monkeypatch):
    root = write(tmp_path / "set", make_content())
    checks = [check_folder(root)]
    write_clean(checks, root, tmp_path / "linked")
    assert os.path.samefile(tmp_path / "linked/images/3.png", root / "images/3.png")

    def fail(source, target):
        raise OSError("another disk")

    monkeypatch.setattr(clean.os, "link", fail)
    write_clean(checks, root, tmp_path / "copied")
    assert not os.path.samefile(tmp_path / "copied/images/3.png", root / "images/3.png")
    assert tree(tmp_path / "copied") == tree(tmp_path / "linked")


def test_a_link_becomes_the_file_it_leads_to(tmp_path):
    root = spoilt(tmp_path / "set", "link")
    write_clean([check_folder(root)], root, tmp_path / "clean")
    assert not (tmp_path / "clean/images/3.png").is_symlink()


def test_nothing_is_written_over(tmp_path):
    root = write(tmp_path / "set", make_content())
    checks = [check_folder(root)]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    before = tree(tmp_path)
    for out, message in (("full", "exists already"), ("full/file", "exists already"), ("set/in", "is inside")):
        with pytest.raises((ValueError, OSError), match=message):
            write_clean(checks, root, tmp_path / out)
    assert tree(tmp_path) == before


def test_several_annotations_files_share_their_images(tmp_path):
    root = write(tmp_path / "set", make_content())
    (root / "annotations/instances_val.json").write_text((root / FILE).read_text())
    checks = [check_folder(root, f"annotations/instances_{split}.json") for split in ("train", "val")]
    listed = write_clean(checks, root, tmp_path / "clean")
    assert [*json.loads(listed.read_text())] == [FILE, "annotations/instances_val.json"]
    assert tree(tmp_path / "clean").keys() == tree(root).keys() | {"removed.json"}
    with pytest.raises(ValueError, match="must have different names in the copy"):
        write_clean([checks[0], checks[0]], root, tmp_path / "other")


def test_folders_elsewhere_are_copied_by_their_names(tmp_path):
    root = write(tmp_path / "set", make_content())
    (root / "images").rename(tmp_path / "pictures")
    check = check_folder(root, images="../pictures")
    write_clean([check], root, tmp_path / "clean")
    assert check_folder(tmp_path / "clean", images="pictures").defects == []


# A file name cannot leave the folder of images.

LEAVING = ["../1.png", "a/../../1.png", "/tmp/1.png", "C:\\1.png", "C:1.png", "..\\1.png", "\\1.png"]
LEAVING += ["//host/s/1.png", ".."]


@pytest.mark.parametrize("name", [*LEAVING, "", "a\0.png", "\ud800.png"])
def test_a_file_name_that_leads_out_is_refused(tmp_path, name):
    content = make_content()
    content["images"][2]["file_name"] = name
    root = write(tmp_path, content)
    with pytest.raises(ValueError, match=r"train.json: 'file_name' of images\[2\] is .*(which|expected a file name)"):
        CocoFolder(root, check_files=False)
    assert found_in(check_folder(root)) == {("file name", "images"): [3]}


@pytest.mark.parametrize("name", ["a/3.png", "a..b/3.png", "a b/ü.png", "...png", "12:30.png"])
def test_a_file_name_may_be_any_inside(tmp_path, name):
    content = make_content()
    root = write(tmp_path, content)
    (root / "images" / name).parent.mkdir(exist_ok=True)
    (root / "images/3.png").rename(root / "images" / name)
    content["images"][2]["file_name"] = name
    assert check_folder(write(root, content, files=False)).errors == []
    assert len([*CocoFolder(root)]) == 6
