import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch

from detmix.datasets import shapes
from detmix.datasets.coco.folder import CocoFolder
from detmix.datasets.shapes import draw_shapes

SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A set of 40 images a split, which holds every kind of image."""
    return draw_shapes(tmp_path_factory.mktemp("shapes") / "set", num_train=40, num_val=40)


@pytest.fixture(params=SPLITS)
def split(drawn, request):
    return CocoFolder(drawn, f"annotations/instances_{request.param}.json", crowd=True, masks=True, keypoints=True)


def digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def targets(dataset):
    return [dataset[i][1] for i in range(len(dataset))]


# The same set for the same arguments.


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    first, second = (draw_shapes(tmp_path / name, num_train=6, num_val=3) for name in ("first", "second"))
    assert digests(first) == digests(second)
    assert len(digests(first)) == 6 + 3 + 2 + 1  # images, annotations, marker


def test_another_seed_gives_other_bytes(tmp_path):
    first, second = (draw_shapes(tmp_path / str(seed), num_train=6, num_val=3, seed=seed) for seed in (0, 1))
    first, second = digests(first), digests(second)
    assert first.keys() == second.keys()
    assert not set(first.values()) & set(second.values())


def test_no_image_occurs_twice(drawn):
    images = [digest for name, digest in digests(drawn).items() if name.endswith(".png")]
    assert len(set(images)) == 80


def test_a_longer_set_begins_with_the_shorter(tmp_path, drawn):
    short = digests(draw_shapes(tmp_path / "short", num_train=3, num_val=2) / "images")
    assert short.items() <= digests(drawn / "images").items()


# What is in it.


def test_classes_are_balanced_and_keypoints_named(drawn):
    for name in SPLITS:
        content = json.loads((drawn / "annotations" / f"instances_{name}.json").read_text())
        assert [category["name"] for category in content["categories"]] == ["circle", "square", "triangle"]
        for category in content["categories"]:
            assert category["keypoints"] == ["center", "top", "right", "bottom", "left"]
            assert category["skeleton"] == [[1, 2], [1, 3], [1, 4], [1, 5]]
        labels = [annotation["category_id"] for annotation in content["annotations"]]
        assert min(np.bincount(labels)[1:]) > len(labels) / 5


def test_images_are_portrait_landscape_and_square_of_96_to_128_pixels(split):
    shapes_ = {tuple(split[i][0].shape[-2:]) for i in range(len(split))}
    assert {np.sign(height - width) for height, width in shapes_} == {-1, 0, 1}
    assert all(96 <= side <= 128 for shape in shapes_ for side in shape)


def test_empty_and_crowded_images_and_crowd_annotations_are_present(split):
    numbers = [len(target["boxes"]) for target in targets(split)]
    assert numbers.count(0) == 2  # 5 % of 40
    assert sum(8 <= number <= 13 for number in numbers) == 4
    crowds = [int(target["iscrowd"].sum()) for target in targets(split)]
    assert 1 <= sum(crowds) <= 3
    assert max(crowds) == 1


def test_boxes_and_areas_are_those_of_the_visible_masks(split):
    for target in targets(split):
        for box, area, mask in zip(target["boxes"].tolist(), target["area"], target["masks"], strict=True):
            rows, columns = torch.where(mask)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert area == mask.sum()


def test_no_pixel_is_of_two_objects(split):
    assert all(target["masks"].sum(0).max() <= 1 for target in targets(split) if len(target["masks"]))


def test_every_object_stands_out_from_what_it_covers(drawn):
    """Nothing is drawn without an annotation, so pixels differ strongly only where masks meet."""
    dataset = CocoFolder(drawn)
    for image, target in (dataset[i] for i in range(len(dataset))):
        for mask in target["masks"].bool():
            grown = torch.nn.functional.max_pool2d(mask[None].float(), 7, 1, 3)[0].bool() & ~target["masks"].bool().any(
                0
            )
            if grown.sum() > 100:  # enough background around it
                inside, outside = (image[:, where].float().mean(1) for where in (mask, grown))
                assert (inside - outside).abs().max() > 25


def test_objects_are_at_least_30_percent_visible(tmp_path, monkeypatch):
    full = []
    annotate = shapes._annotate

    def record(shape, visible):
        full.append((visible.sum(), shape.area))
        return annotate(shape, visible)

    monkeypatch.setattr(shapes, "_annotate", record)
    draw_shapes(tmp_path / "set", num_train=24, num_val=1)
    shares = np.array([visible / area for visible, area in full])
    assert 0.5 <= shares.min() < 0.65  # some are hidden a good deal
    assert shares.max() < 1.35


def test_objects_are_20_to_70_pixels_wide(split):
    sides = [
        (box[2:] - box[:2]).max()
        for target in targets(split)
        for box in target["boxes"][(target["iscrowd"] == 0) & (target["keypoints"][..., 2] == 2).all(1)]
    ]
    assert 16 < min(sides) < 24
    assert 50 < max(sides) < 85


def test_keypoints_are_inside_the_image_and_seen_only_on_the_mask(split):
    for image, target in (split[i] for i in range(len(split))):
        height, width = image.shape[-2:]
        for triplets, mask, crowd in zip(target["keypoints"], target["masks"], target["iscrowd"], strict=True):
            assert triplets.shape == (5, 3)
            if crowd:
                assert not triplets.any()
            for x, y, v in triplets.tolist():
                assert (v == 0 and x == y == 0) or (v in (1, 2) and 0 <= x < width and 0 <= y < height)
                if v:
                    near = mask[max(int(y) - 1, 0) : int(y) + 2, max(int(x) - 1, 0) : int(x) + 2].any()
                    assert bool(near) == (v == 2)


def test_rim_keypoints_touch_the_sides_of_unhidden_boxes(split):
    compared = 0
    for target in targets(split):
        whole = (target["keypoints"][..., 2] == 2).all(1) & (target["iscrowd"] == 0)
        for box, points in zip(target["boxes"][whole].tolist(), target["keypoints"][whole].tolist(), strict=True):
            _, top, right, bottom, left = points
            found = [left[0], top[1], right[0], bottom[1]]
            assert np.abs(np.subtract(found, box)).max() < 3
            compared += 1
    assert compared > 20


def test_all_visibilities_occur(split):
    found = torch.cat([target["keypoints"][target["iscrowd"] == 0][..., 2].flatten() for target in targets(split)])
    assert set(found.tolist()) == {0, 1, 2}


def test_colour_says_nothing_of_the_class(drawn):
    dataset = CocoFolder(drawn)
    colours = {1: [], 2: [], 3: []}
    for image, target in (dataset[i] for i in range(len(dataset))):
        for label, mask in zip(target["labels"].tolist(), target["masks"].bool(), strict=True):
            colours[label].append(image[:, mask].float().mean(1))
    means = torch.stack([torch.stack(values).mean(0) for values in colours.values()])
    deviation = torch.cat([torch.stack(values) for values in colours.values()]).std(0)
    assert ((means - means.mean(0)).abs() < deviation / 2).all()


# Used again, drawn anew, refused.


def test_a_set_that_is_there_is_used_again(tmp_path, monkeypatch):
    root = draw_shapes(str(tmp_path / "deep" / "set"), num_train=2, num_val=1)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    monkeypatch.setattr(shapes, "_draw_image", lambda *_: pytest.fail("drawn again"))
    assert draw_shapes(root, num_train=2, num_val=1) == root
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize("change", [{"num_train": 3}, {"num_val": 2}, {"seed": 1}])
def test_a_set_of_other_arguments_is_drawn_anew(tmp_path, change):
    arguments = {"num_train": 2, "num_val": 1, **change}
    draw_shapes(tmp_path / "set", num_train=2, num_val=1)
    assert digests(draw_shapes(tmp_path / "set", **arguments)) == digests(draw_shapes(tmp_path / "other", **arguments))
    assert {path.name for path in tmp_path.iterdir()} == {"set", "other"}


def test_a_set_of_another_version_is_drawn_anew(tmp_path, monkeypatch):
    root = draw_shapes(tmp_path / "set", num_train=2, num_val=1)
    monkeypatch.setattr(shapes, "_VERSION", 99)
    assert '"version": 99' in (draw_shapes(root, num_train=2, num_val=1) / shapes._MARKER).read_text()


@pytest.mark.parametrize("damage", ["missing image", "cut image", "cut json", "cut marker"])
def test_a_damaged_set_is_drawn_anew(tmp_path, damage):
    root = draw_shapes(tmp_path / "set", num_train=2, num_val=1)
    whole = digests(root)
    if damage == "missing image":
        (root / "images" / "val_00000.png").unlink()
    else:
        cut = {"cut image": "images/val_00000.png", "cut json": "annotations/instances_train.json"}
        path = root / cut.get(damage, shapes._MARKER)
        path.write_bytes(path.read_bytes()[:-5])
    assert digests(draw_shapes(root, num_train=2, num_val=1)) == whole


def test_an_interrupted_drawing_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(PIL.Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            draw_shapes(tmp_path / "set", num_train=2, num_val=1)
    assert not list(tmp_path.iterdir())
    assert len(CocoFolder(draw_shapes(tmp_path / "set", num_train=2, num_val=1))) == 2


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "set").mkdir()
    assert len(CocoFolder(draw_shapes(tmp_path / "set", num_train=2, num_val=1))) == 2


def test_files_that_appear_during_the_drawing_are_left_alone(tmp_path, monkeypatch):
    root, split = tmp_path / "set", shapes._draw_split

    def interfere(*arguments):
        split(*arguments)
        root.mkdir(exist_ok=True)
        (root / "notes.txt").write_text("mine")

    monkeypatch.setattr(shapes, "_draw_split", interfere)
    with pytest.raises(FileExistsError, match=r"such as notes.txt"):
        draw_shapes(root, num_train=2, num_val=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "notes.txt"]


def test_a_folder_of_others_is_refused_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_draw_image", lambda *_: pytest.fail("drawn before it is refused"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"root .* holds 1 files .* did not make, such as images/holiday.png"):
        draw_shapes(tmp_path, num_train=2, num_val=1)
    assert digests(tmp_path).keys() == {"images/holiday.png"}


def test_a_set_without_its_marker_is_refused(tmp_path):
    root = draw_shapes(tmp_path / "set", num_train=2, num_val=1)
    (root / shapes._MARKER).unlink()
    with pytest.raises(FileExistsError, match="draw_shapes did not make"):
        draw_shapes(root, num_train=2, num_val=1)


def test_an_outdated_set_with_files_of_others_is_refused_and_left_alone(tmp_path):
    root = draw_shapes(tmp_path / "set", num_train=2, num_val=1)
    (root / "notes.txt").write_text("mine")
    before = digests(root)
    assert draw_shapes(root, num_train=2, num_val=1) == root  # as it is, it serves
    with pytest.raises(FileExistsError, match=r"holds 1 files .* such as notes.txt"):
        draw_shapes(root, num_train=3, num_val=1)
    assert digests(root) == before


def test_a_file_is_refused(tmp_path):
    (tmp_path / "set").write_text("mine")
    with pytest.raises(FileExistsError, match=r"root .*set is a file, expected a folder"):
        draw_shapes(tmp_path / "set")


@pytest.mark.parametrize(("name", "value", "least"), [("num_train", 0, 1), ("num_val", 0, 1), ("seed", -1, 0)])
def test_numbers_out_of_range_are_named(tmp_path, name, value, least):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected at least {least}"):
        draw_shapes(tmp_path / "set", **{name: value})


def test_another_process_may_finish_first(tmp_path, monkeypatch):
    """Both see nothing at ``root`` and draw; the other moves its set there just before ours."""
    other = draw_shapes(tmp_path / "other", num_train=2, num_val=1)
    checksum, root = shapes._checksum, tmp_path / "set"

    def slow(path):
        if path.suffix == ".tmp" and not root.exists():
            shutil.copytree(other, root)
        return checksum(path)

    monkeypatch.setattr(shapes, "_checksum", slow)
    draw_shapes(root, num_train=2, num_val=1)
    assert digests(root) == digests(other)
    assert {path.name for path in tmp_path.iterdir()} == {"set", "other"}


@pytest.mark.parametrize("outdated", [False, True])
def test_two_drawings_at_once_leave_one_whole_set(tmp_path, outdated):
    arguments = {"num_train": 4, "num_val": 2}
    whole = digests(draw_shapes(tmp_path / "other", **arguments))
    for attempt in range(4):
        root = tmp_path / str(attempt)
        if outdated:
            draw_shapes(root, num_train=1, num_val=1, seed=5)
        with ThreadPoolExecutor(3) as pool:
            drawn = [pool.submit(draw_shapes, root, **arguments) for _ in range(3)]
        assert [future.result() for future in drawn] == [root] * 3
        assert digests(root) == whole
    assert {path.name for path in tmp_path.iterdir()} == {"other", "0", "1", "2", "3"}
