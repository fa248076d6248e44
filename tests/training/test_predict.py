import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.transforms.v2 import functional as TF

from detmix.datasets.coco.folder import CocoFolder
from detmix.training.files import write_json
from detmix.training.predict import (
    draw_prediction,
    list_images,
    make_content,
    predict,
    write_predictions,
)
from detmix.visualize import draw_sample
from tests.conftest import assert_same
from tests.losses.tiny import tiny


class Perfect(nn.Module):
    """A detector that finds what the annotations say, images of one batch in their order."""

    def __init__(self, dataset):
        super().__init__()
        self.targets = iter([target for _, target in dataset])

    def forward(self, images):
        targets = [next(self.targets) for _ in images]
        keys = ("boxes", "labels", "masks", "keypoints")
        return [
            {key: target[key].as_subclass(torch.Tensor).float() for key in keys if key in target}
            | {"labels": target["labels"], "scores": torch.full((len(target["labels"]),), 0.9)}
            for target in targets
        ]


@pytest.fixture
def renumbered(shapes, tmp_path):
    """The validation split, its category ids 9, 5, 4 and its image ids 60, 50, ..."""
    content = json.loads((shapes / "annotations/instances_val.json").read_text())
    categories, images = {1: 9, 2: 5, 3: 4}, {row["id"]: 70 - 10 * row["id"] for row in content["images"]}
    for category in content["categories"]:
        category["id"] = categories[category["id"]]
    for image in content["images"]:
        image["id"] = images[image["id"]]
    for annotation in content["annotations"]:
        annotation["image_id"] = images[annotation["image_id"]]
        annotation["category_id"] = categories[annotation["category_id"]]
    (tmp_path / "val.json").write_text(json.dumps(content))
    return CocoFolder(shapes, tmp_path / "val.json")


@pytest.mark.parametrize(
    ("kind", "batch_size", "num_workers"),
    [("bbox", 1, 0), ("bbox", 4, 0), ("bbox", 4, 1), ("segm", 4, 0), ("keypoints", 1, 0)],
)
def test_a_perfect_detector_scores_an_ap_of_1_in_coco_evaluation(kind, batch_size, num_workers, renumbered, tmp_path):
    options = {"batch_size": batch_size, "num_workers": num_workers}
    ids = write_predictions(Perfect(renumbered), renumbered, tmp_path / "out", pytest.fail, pictures=False, **options)
    assert ids == [10, 20, 30, 40, 50, 60]
    truth = COCO(str(renumbered.annotations_file))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "out/predictions.json")), kind)
    if kind == "keypoints":
        evaluation.params.kpt_oks_sigmas = np.full(5, 0.05)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


@pytest.mark.parametrize("name", ["fasterrcnn", "maskrcnn", "keypointrcnn", "fcos"])
def test_predictions_are_the_models_own_of_each_image_alone(name, renumbered, tmp_path):
    model = tiny(name).eval()
    found = list(predict(model, renumbered, pytest.fail))
    assert [image_id for _, image_id, _ in found] == [10, 20, 30, 40, 50, 60]
    for (image, _, prediction), (pixels, _) in zip(found, renumbered, strict=True):
        assert torch.equal(image, pixels)
        with torch.no_grad():
            expected = model([TF.to_dtype(pixels.as_subclass(torch.Tensor), torch.float32, scale=True)])[0]
        objects = expected["labels"] != 0
        assert objects.all() == (name != "fcos")  # which scores the background as it does the classes
        assert_same(prediction, {key: value[objects] for key, value in expected.items()})
    write_predictions(model, renumbered, tmp_path / "out", pytest.fail, pictures=False)
    records = [record for _, image_id, prediction in found for record in renumbered.to_coco(image_id, prediction)]
    assert json.loads((tmp_path / "out/predictions.json").read_text()) == records
    assert records


@pytest.fixture
def folder(shapes, tmp_path):
    """A folder of images with a damaged one, one that is no image, and a text."""
    names = ["b/cat.png", "cat.png", "dog.png"]
    for name, source in zip(names, sorted((shapes / "images").glob("val*")), strict=False):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / "images" / name)
    with PIL.Image.open(tmp_path / "images/cat.png") as picture:
        picture.save(tmp_path / "images/cat.jpg")
    whole = (tmp_path / "images/dog.png").read_bytes()
    (tmp_path / "images/broken.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images/text.png").write_text("no image")
    (tmp_path / "images/notes.txt").write_text("no image")
    return tmp_path / "images"


def test_images_are_found_in_folders_once_and_sorted(folder):
    names = ["b/cat.png", "broken.png", "cat.jpg", "cat.png", "dog.png", "text.png"]
    assert list_images([folder]) == [folder / name for name in names]
    assert list_images([folder / "dog.png", folder, folder / "b/../dog.png"]) == list_images([folder])
    assert list_images([folder], leave_out=folder / "b") == [folder / name for name in names[1:]]
    assert list_images([folder / "notes.txt"]) == [folder / "notes.txt"]
    with pytest.raises(FileNotFoundError, match=r"images must be files or folders, but there is no .*none"):
        list_images([folder, folder / "none"])
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"hold \.jpg, .*, but there are none in .*empty"):
        list_images([folder / "empty"])


def test_what_cannot_be_read_is_named_and_the_others_go_on(folder, tmp_path):
    said = []
    table = make_content(list_images([folder]), ["a", "b", "c"], said.append)
    assert [(row["id"], Path(row["file_name"]).name) for row in table["images"]] == [
        *((1, "cat.png"), (2, "broken.png"), (3, "cat.jpg"), (4, "cat.png"), (5, "dog.png"))
    ]
    assert len(said) == 1
    assert "text.png cannot be read" in said[0]
    write_json(table, tmp_path / "images.json")
    dataset = CocoFolder(table["info"]["images_folder"], tmp_path / "images.json", ".", check_files=False)
    ids = write_predictions(tiny("fasterrcnn").eval(), dataset, tmp_path / "out", said.append, batch_size=2)
    assert ids == [1, 3, 4, 5]
    assert len(said) == 2
    assert "broken.png cannot be decoded" in said[1]
    assert {record["image_id"] for record in json.loads((tmp_path / "out/predictions.json").read_text())} == set(ids)
    pictures = {path.relative_to(tmp_path / "out/pictures").as_posix() for path in tmp_path.glob("out/pictures/**/*.*")}
    assert pictures == {"b/cat.png", "cat.png", "cat_4.png", "dog.png"}


@pytest.mark.parametrize("name", ["../../outside.png", "/absolute.png"])
def test_names_that_lead_out_of_the_folder_of_images_are_refused(name, shapes, tmp_path):
    image = json.loads((shapes / "annotations/instances_val.json").read_text())["images"][0]
    table = {"images": [image | {"file_name": name}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "val.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"which leads out of|which is not relative to"):
        CocoFolder(shapes, tmp_path / "val.json")


def test_only_what_scores_enough_is_drawn_with_the_best_on_top():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    boxes = torch.tensor([[8.0, 8, 40, 40], [8, 8, 40, 40], [20, 20, 60, 60]])
    prediction = {"boxes": boxes, "labels": torch.tensor([1, 2, 3]), "scores": torch.tensor([0.9, 0.5, 0.1])}
    drawn = [draw_prediction(image, prediction, list("abc"), min_score=score, size=64) for score in (0.05, 0.3, 0.95)]
    assert torch.equal(drawn[2], draw_sample(image, {"boxes": boxes[:0]}, size=64))
    assert drawn[0][:, 59:61, 59:61].any()
    assert not drawn[1][:, 59:61, 59:61].any()
    assert drawn[1][:, 40, 40].tolist() == [31, 119, 180]  # the first class's blue, over the second's orange


@pytest.mark.parametrize("key", ["masks", "keypoints"])
def test_masks_and_keypoints_are_drawn(key):
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    found = {"boxes": torch.tensor([[8.0, 8, 56, 56]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., 30:34, 30:34] = 0.9
    more = {"masks": masks, "keypoints": torch.tensor([[[32.0, 32, 1]]])}[key]
    assert not draw_prediction(image, found, ["a"], size=64)[:, 32, 32].any()
    assert draw_prediction(image, found | {key: more}, ["a"], size=64)[:, 32, 32].any()
    assert not draw_prediction(image, found | {key: more}, ["a"], size=64, min_score=0.95).any()


def test_a_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json([1], tmp_path / "deep/out.json")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)  # after all was written aside
    with pytest.raises(OSError, match="disk full"):
        write_json([1, 2, 3], tmp_path / "deep/out.json")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out.json"]
    assert json.loads((tmp_path / "deep/out.json").read_text()) == [1]
