import json
import types

import albumentations as A
import pytest
import torch

from detmix import MixUp
from detmix.datasets.coco import CocoFolder
from detmix.training.data import DetectionData


def make_trainer(epoch=0, start=0, world_size=1, rank=0, training=True):
    """What the data module asks of a trainer that is to train a batch of an epoch."""
    progress = types.SimpleNamespace(current=types.SimpleNamespace(started=epoch + (start > 0), processed=epoch))
    batches = types.SimpleNamespace(current=types.SimpleNamespace(ready=start))
    loop = types.SimpleNamespace(epoch_progress=progress, epoch_loop=types.SimpleNamespace(batch_progress=batches))
    options = {"world_size": world_size, "global_rank": rank, "training": training}
    return types.SimpleNamespace(current_epoch=epoch, fit_loop=loop, **options)


def on_device(data, batch, training=True, epoch=0):
    """What the hook makes of a batch when Lightning calls it."""
    data.trainer = make_trainer(epoch, training=training)
    return data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)


def make(shapes, **options):
    data = DetectionData(str(shapes), **{"batch_size": 4, "num_workers": 0, **options})
    data.setup("fit")
    return data


def test_a_training_batch_is_mixed_and_scaled(shapes):
    data = make(shapes, mixup=MixUp())
    images, targets = on_device(data, next(iter(data.train_dataloader())))
    assert len(images) == len(targets) == 4
    assert all(image.dtype == torch.float32 and 0.2 < image.max() <= 1 for image in images)
    assert all(target["partner"] >= 0 and 0 < target["lam"] < 1 for target in targets)
    assert any(len(set(target["weights"].tolist())) == 2 for target in targets)


def test_mixing_starts_and_stops_with_its_epochs(shapes):
    data = make(shapes, mixup=MixUp(start=1, stop=3))
    batch = next(iter(data.train_dataloader()))
    mixed = [on_device(data, batch, epoch=epoch)[1][0]["lam"] < 1 for epoch in range(5)]
    assert mixed == [False, True, True, False, False]


def test_validation_images_are_neither_mixed_nor_augmented(shapes):
    data = make(shapes, mixup=MixUp(), augment=[A.Resize(8, 8)])
    images, targets = on_device(data, next(iter(data.val_dataloader())), training=False)
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        stored, annotated = CocoFolder(shapes, "annotations/instances_val.json", crowd=True)[index]
        assert torch.equal((image * 255).round().to(torch.uint8), stored)
        assert "lam" not in target
        assert torch.equal(target["boxes"], annotated["boxes"])


def test_augmentation_reaches_training_images(shapes):
    data = make(shapes, augment=[A.Resize(40, 56)])
    images, targets = next(iter(data.train_dataloader()))
    assert {tuple(image.shape) for image in images} == {(3, 40, 56)}
    assert all(target["boxes"].canvas_size == (40, 56) for target in targets)


def test_crowd_boxes_are_for_evaluation_only(shapes):
    data = make(shapes)
    assert not data.train_set._iscrowd.any()
    crowded = json.loads((shapes / "annotations/instances_val.json").read_text())["annotations"]
    assert data.val_set._iscrowd.sum() == sum(annotation["iscrowd"] for annotation in crowded) > 0


def test_without_a_root_the_embedded_shapes_are_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("detmix.training.data.draw_shapes.__defaults__", None)
    monkeypatch.setattr("detmix.training.data.draw_shapes.__kwdefaults__", {"num_train": 4, "num_val": 2, "seed": 0})
    data = DetectionData(batch_size=2, num_workers=0)
    assert data.class_names == ("circle", "square", "triangle")
    assert data.num_classes == 4
    assert (tmp_path / "data/shapes/annotations/instances_train.json").is_file()


def test_splits_of_different_categories_are_an_error(shapes, tmp_path):
    content = json.loads((shapes / "annotations/instances_val.json").read_text())
    content["categories"][0]["name"] = "ellipse"
    (tmp_path / "val.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"must have the same categories, but have \('circle',.* and \('ellipse',"):
        make(shapes, val_annotations=str(tmp_path / "val.json"))


def test_a_batch_larger_than_the_data_is_an_error(shapes):
    with pytest.raises(ValueError, match="batch_size must be at most the 8 training images, but is 9"):
        make(shapes, batch_size=9).train_dataloader()


def test_a_label_out_of_range_is_named_before_it_reaches_the_device(shapes):
    data = make(shapes)
    images, targets = next(iter(data.train_dataloader()))
    index = next(i for i, target in enumerate(targets) if len(target["boxes"]))
    targets[index]["labels"][0] = 4
    with pytest.raises(ValueError, match=f"label 0 of target {index} must be a class from 1 to 3 .* it is 4"):
        on_device(data, (images, targets))
