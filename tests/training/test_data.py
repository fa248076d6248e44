import io
import json
import types
import warnings

import albumentations as A
import pytest
import torch

from detmix import MixUp
from detmix.datasets.coco.folder import CocoFolder
from detmix.training.data import DetectionData
from tests.conftest import assert_same, draw_truncated


def make_trainer(epoch=0, start=0, world_size=1, rank=0, training=True):
    """What the data module asks of a trainer that is to train a batch of an epoch."""
    progress = types.SimpleNamespace(current=types.SimpleNamespace(started=epoch + (start > 0), processed=epoch))
    batches = types.SimpleNamespace(current=types.SimpleNamespace(ready=start))
    loop = types.SimpleNamespace(epoch_progress=progress, epoch_loop=types.SimpleNamespace(batch_progress=batches))
    options = {"world_size": world_size, "global_rank": rank, "training": training}
    return types.SimpleNamespace(current_epoch=epoch, fit_loop=loop, num_training_batches=2, **options)


def on_device(data, batch, training=True, epoch=0):
    """What the hook makes of a batch when Lightning calls it."""
    data.trainer = make_trainer(epoch, training=training)
    return data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)


def make(shapes, **options):
    data = DetectionData(str(shapes), **{"batch_size": 4, "num_workers": 0, **options})
    data.setup("fit")
    return data


def ids(batches):
    return [[target["image_id"] for target in targets] for _, targets in batches]


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
    with pytest.raises(ValueError, match="batch_size must be at most the 8 training images, but it is 9"):
        make(shapes, batch_size=9).train_dataloader()


def test_a_label_out_of_range_is_named_before_it_reaches_the_device(shapes):
    data = make(shapes)
    images, targets = next(iter(data.train_dataloader()))
    index = next(i for i, target in enumerate(targets) if len(target["boxes"]))
    targets[index]["labels"][0] = 4
    with pytest.raises(ValueError, match=f"label 0 of target {index} must be a class from 1 to 3 .* it is 4"):
        on_device(data, (images, targets))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images_are_left_out_named_once_and_counted_by_split(num_workers, tmp_path, recwarn):
    root = draw_truncated(tmp_path, "train_00001", "val_00001", "val_00006", num_val=7)
    data = make(root, num_workers=num_workers, unreadable="skip", batch_size=8, mixup=MixUp(p=1.0))
    warnings.simplefilter("always")
    for _ in range(2):
        images, targets = on_device(data, next(iter(data.train_dataloader())))
        assert len(images) == 7
        assert sorted(target["image_id"] for target in targets) == [1, 3, 4, 5, 6, 7, 8]
        assert all(target["partner"] in range(7) for target in targets)
        _, targets = on_device(data, next(iter(data.val_dataloader())), training=False)
        assert [target["image_id"] for target in targets] == [1, 3, 4, 5, 6]
    # Both splits have an image 2.
    assert data.skipped == {("train", 2), ("val", 2), ("val", 7)}
    said = [str(warning.message).rsplit(":", 1)[0] for warning in recwarn]
    assert said == [
        f"image {image_id} is skipped: {root / 'images' / name}.png cannot be decoded"
        for image_id, name in [(2, "train_00001"), (2, "val_00001"), (7, "val_00006")]
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_an_error_by_default(num_workers, tmp_path):
    data = make(draw_truncated(tmp_path, "train_00001", num_val=7), num_workers=num_workers, batch_size=8)
    with pytest.raises(OSError, match=r"train_00001.png cannot be decoded"):
        next(iter(data.train_dataloader()))


def test_a_batch_of_unreadable_images_is_an_empty_one(tmp_path):
    data = make(
        draw_truncated(tmp_path, "val_00000", "val_00001", num_val=7), batch_size=2, unreadable="skip", mixup=MixUp()
    )
    batch = next(iter(data.val_dataloader()))
    for training in (True, False):
        data.skipped = {("train", 1), ("train", 2), ("val", 1), ("val", 2)}
        assert on_device(data, batch, training) == ([], [])


def test_one_image_left_of_a_batch_is_not_mixed(tmp_path):
    data = make(draw_truncated(tmp_path, "val_00001", num_val=7), batch_size=2, unreadable="skip", mixup=MixUp(p=1.0))
    data.skipped = {("train", 2)}
    (stored, _), _ = batch = next(iter(data.val_dataloader()))
    (image,), (target,) = on_device(data, batch)
    assert target["lam"] == 1
    assert torch.equal((image * 255).round().to(torch.uint8), stored)


def test_what_is_saved_is_restored(shapes):
    data = make(shapes, mixup=MixUp(p=0.5), seed=3, unreadable="skip")
    data.trainer = make_trainer(epoch=2, start=1)
    data._epoch = 2
    data.mixup.set_epoch(2)
    data.skipped = {("val", 7), ("train", 2), ("val", 2)}
    state = data.state_dict()
    assert state["skipped"] == [("train", 2), ("val", 2), ("val", 7)]
    assert (state["epoch"], state["batch"]) == (2, 1)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other = make(shapes, mixup=MixUp(p=0.5))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.skipped == data.skipped
    assert other.mixup.get_extra_state() == data.mixup.get_extra_state() != MixUp(p=0.5).get_extra_state()
    wanted = make(shapes, seed=3).train_dataloader()
    wanted.batch_sampler.sampler.set_epoch(2)
    assert ids(other.train_dataloader()) == ids(wanted)[1:]
    other.trainer = make_trainer(epoch=2, start=1)
    other._epoch = 2
    assert other.state_dict() == state


def shares(root, loader, world_size, **options):
    """The image ids in the batches of each rank."""
    found = []
    for rank in range(world_size):
        data = make(root, **options)
        data.trainer = make_trainer(world_size=world_size, rank=rank)
        found.append(ids(getattr(data, loader)()))
    return found


def test_ranks_share_out_the_training_set_but_for_the_remainder(tmp_path):
    root = draw_truncated(tmp_path, num_train=11, num_val=7)
    first, second = shares(root, "train_dataloader", 2, batch_size=2)
    assert [len(batch) for batch in first + second] == [2] * 4  # 5 of 11 images each, in whole batches
    seen = [image_id for batch in first + second for image_id in batch]
    assert len(set(seen)) == len(seen) == 8
    assert set(seen) < set(range(1, 12))


def test_ranks_draw_other_mixes(shapes):
    drawn = []
    for rank in (0, 1, 0):
        data = make(shapes, mixup=MixUp(p=1.0))
        batch = next(iter(data.train_dataloader()))
        data.trainer = make_trainer(world_size=2, rank=rank)
        _, targets = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
        drawn.append([target["lam"] for target in targets])
    assert drawn[0] == drawn[2]
    assert not set(drawn[0]) & set(drawn[1])


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [
        (1, [[[1, 2], [3, 4], [5, 6], [7]]]),
        (3, [[[1, 2], [3, 4]], [[5, 6]], [[7]]]),
        (6, [[[1, 2]], [[3, 4]], [[5, 6]], [[7]], [[]], [[]]]),  # a process without images still takes part
    ],
)
def test_ranks_validate_whole_batches_in_order_each_image_once(world_size, expected, tmp_path):
    assert shares(draw_truncated(tmp_path, num_val=7), "val_dataloader", world_size, batch_size=2) == expected


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_no_batch(num_workers, shapes):
    augment = [A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=1)]
    found, wanted = (
        list(make(shapes, num_workers=number, augment=augment).train_dataloader()) for number in (num_workers, 0)
    )
    assert ids(found) == ids(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)
