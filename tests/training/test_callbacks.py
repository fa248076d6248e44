import json
import types
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from detmix.mixing.batch import mixup_batch
from detmix.mixing.plan import Mix, Placement
from detmix.training.callbacks import PREDICTION, Pictures, draw_curves, write_samples
from detmix.training.records import read_record, write_record

PLAN = [
    Mix(2, 0.1, (0.1, 0.9)),
    Mix(),
    Mix(0, 1 / 3, (1.0, 0.0), Placement(1.25, 0.1, 0.7)),
    Mix(1, 2**-24, (2**-24, 1 - 2**-24)),
]


def pixels(path):
    with PIL.Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def mixed(sample, plan=PLAN):
    """Images and targets of samples 0, 1, ... as a plan mixes them; sample i has image id 10 * i."""
    images, targets = zip(*(sample(2, (50, 40 + i), seed=i) for i in range(len(plan))), strict=True)
    targets = [target | {"image_id": 10 * i} for i, target in enumerate(targets)]
    return mixup_batch(list(images), targets, plan)


def test_curves_show_losses_and_aps(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text(
        "epoch,step,train/loss,val/AP,val/AR1,val/AP/cat\n0,1,2.5,,,\n0,2,1.5,,,\n0,2,,0.3,0.4,0.2\n1,4,,0.5,0.6,0.4\n"
    )
    draw_curves(log, tmp_path / "both.png")
    log.write_text("epoch,step,train/loss\n0,1,2.5\n0,2,1.5\n")
    draw_curves(log, tmp_path / "losses.png")
    log.write_text("epoch,step\n")
    draw_curves(log, tmp_path / "none.png")
    half = pixels(tmp_path / "none.png").shape[1] // 2
    ink = {
        (name, side): (pixels(tmp_path / f"{name}.png")[:, part].std(2) > 60).any()  # coloured, as curves are
        for name in ("both", "losses", "none")
        for side, part in (("left", slice(half)), ("right", slice(half, None)))
    }
    assert {key for key, found in ink.items() if found} == {("both", "left"), ("both", "right"), ("losses", "left")}


def test_the_classes_of_a_large_dataset_stay_out_of_the_legend(tmp_path):
    header = ",".join(f"val/AP/class {k}" for k in range(21))
    (tmp_path / "metrics.csv").write_text(f"epoch,step,val/AP,{header}\n" + "0,1,0.5" + ",0.1" * 21 + "\n")
    draw_curves(tmp_path / "metrics.csv", tmp_path / "many.png")
    (tmp_path / "metrics.csv").write_text("epoch,step,val/AP,val/AP/class 0\n0,1,0.5,0.1\n")
    draw_curves(tmp_path / "metrics.csv", tmp_path / "few.png")
    assert (pixels(tmp_path / "many.png") < 50).sum() < (pixels(tmp_path / "few.png") < 50).sum()  # less black text


def test_a_log_without_rows_draws_empty_axes(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step\n")
    draw_curves(tmp_path / "metrics.csv", tmp_path / "deep/curves.png")
    assert pixels(tmp_path / "deep/curves.png").size


def test_samples_are_drawn_side_by_side(tmp_path):
    target = {"boxes": torch.tensor([[10.0, 10, 40, 40]]), "labels": torch.tensor([1])}
    write_samples([torch.zeros(3, 50, 50)] * 3, [target] * 3, ["cat"], tmp_path / "samples.png")
    drawn = pixels(tmp_path / "samples.png")
    assert drawn.shape[1] > 2.9 * drawn.shape[0]


@pytest.mark.parametrize(("score", "drawn"), [(0.9, True), (0.2, False)])
def test_predictions_below_the_least_score_are_left_out(score, drawn, tmp_path):
    callback = Pictures(num_images=1, min_score=0.3)
    trainer = types.SimpleNamespace(log_dir=str(tmp_path), sanity_checking=False, loggers=[])
    module = types.SimpleNamespace(class_names=["cat"])
    callback.setup(trainer, module, "fit")
    truth = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    found = {"boxes": torch.tensor([[10.0, 10, 40, 40]]), "labels": torch.tensor([1]), "scores": torch.tensor([score])}
    callback.on_validation_batch_end(trainer, module, [found, found], ([torch.zeros(3, 50, 50)] * 2, [truth] * 2))
    callback.on_validation_end(trainer, module)
    picture = pixels(tmp_path / "pictures/predictions.png")
    color = np.array([int(PREDICTION[i : i + 2], 16) for i in (1, 3, 5)])
    assert (abs(picture - color).sum(2) == 0).any() == drawn
    assert picture.shape[1] == 2 * (picture.shape[0] - 1)  # one pair, framed by 2 pixels, though there were two images


def test_a_record_holds_the_images_and_the_plan_to_the_last_digit(sample, tmp_path):
    _, targets = mixed(sample)
    write_record(targets, tmp_path / "deep/mixed.json")
    assert read_record(tmp_path / "deep/mixed.json") == ([0, 10, 20, 30], PLAN)
    samples = json.loads((tmp_path / "deep/mixed.json").read_text())
    assert [s["partner_image_id"] for s in samples] == [20, None, 0, 10]
    assert len((tmp_path / "deep/mixed.json").read_text().splitlines()) == 4 + 2  # a line each, to read
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["mixed.json"]


def test_an_interrupted_write_leaves_the_record_that_was_there(sample, monkeypatch, tmp_path):
    _, targets = mixed(sample)
    write_record(targets, tmp_path / "mixed.json")
    before = (tmp_path / "mixed.json").read_bytes()

    def fill_the_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fill_the_disk)  # after all was written aside
    with pytest.raises(OSError, match="no space left"):
        write_record(targets[:2], tmp_path / "mixed.json")
    assert (tmp_path / "mixed.json").read_bytes() == before


def test_the_first_mixed_batch_of_a_training_is_drawn_in_part_and_recorded_whole(sample, tmp_path):
    callback = Pictures(num_images=1)
    trainer, module = types.SimpleNamespace(log_dir=str(tmp_path)), types.SimpleNamespace(class_names=["a", "b", "c"])
    callback.setup(trainer, module, "fit")
    plans = [[Mix()] * 4, PLAN, PLAN[::-1]]
    written = []
    for plan in plans:
        callback.on_train_batch_start(trainer, module, mixed(sample, plan), 0)
        written.append({path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()})
    assert set(written[0]) == {"train.png"}
    assert set(written[1]) == {"train.png", "mixed.png", "mixed.json"}
    assert written[2] == written[1]
    assert read_record(tmp_path / "pictures/mixed.json") == ([0, 10, 20, 30], PLAN)
    assert pixels(tmp_path / "pictures/mixed.png").shape[1] < 500  # one sample


def test_the_first_batch_that_has_images_is_drawn(sample, tmp_path):
    trainer, module = types.SimpleNamespace(log_dir=str(tmp_path)), types.SimpleNamespace(class_names=["a", "b", "c"])
    callback = Pictures()
    callback.setup(trainer, module, "fit")
    callback.on_train_batch_start(trainer, module, ([], []), 0)  # none could be read
    assert not (tmp_path / "pictures").exists()
    callback.on_train_batch_start(trainer, module, mixed(sample), 1)
    assert (tmp_path / "pictures/mixed.png").is_file()


def test_a_partner_from_outside_the_batch_and_a_target_without_an_id_are_recorded_all_the_same(sample, tmp_path):
    _, targets = mixed(sample)
    targets[0]["partner"] = 4711  # an index in a dataset, as MixUpDataset writes it
    del targets[1]["image_id"]
    write_record(targets, tmp_path / "mixed.json")
    samples = json.loads((tmp_path / "mixed.json").read_text())
    assert [(s["image_id"], s["partner"], s["partner_image_id"]) for s in samples] == [
        (0, 4711, None),
        (None, -1, None),
        (20, 0, 0),
        (30, 1, None),
    ]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"image_id": "7"}, "image_id of sample 1 .* must be a whole number, but it is '7'"),
        ({"image_id": True}, "image_id of sample 1 .* must be a whole number, but it is True"),
        ({"partner": 4}, "partner of sample 1 .* index of one of the 4 samples, or -1, but it is 4"),
        ({"partner": -2}, "partner of sample 1 .* or -1, but it is -2"),
        ({"partner": 0.0}, "partner of sample 1 .* or -1, but it is 0.0"),
        ({"partner": 3}, "partner_image_id of sample 1 .* must be 30, that of its partner, but it is None"),
        ({"partner_image_id": 30}, "partner_image_id of sample 1 .* must be None, .* but it is 30"),
        ({"lam": 1.5}, r"lam of sample 1 .* must be a number in \[0, 1\], but it is 1.5"),
        ({"lam": None}, "lam of sample 1 .* but it is None"),
        ({"lam": float("nan")}, "lam of sample 1 .* but it is nan"),
        ({"shares": [1.0]}, r"shares of sample 1 .* must be two numbers in \[0, 1\], but it is \[1.0\]"),
        ({"shares": 0.5}, "shares of sample 1 .* but it is 0.5"),
        ({"shares": [0.5, "0.5"]}, "shares of sample 1 .* but it is"),
        ({"placement": [1.0, 0.5]}, "placement of sample 1 .* must be null, or a positive number and two in"),
        ({"placement": [0.0, 0.5, 0.5]}, "placement of sample 1"),
        ({"placement": [1.0, 0.5, 1.5]}, "placement of sample 1"),
        ({"placement": [float("inf"), 0.5, 0.5]}, "placement of sample 1"),
        ({"placement": 3}, "placement of sample 1"),
    ],
)
def test_a_mistake_in_a_record_is_named(mistake, message, sample, tmp_path):
    _, targets = mixed(sample)
    write_record(targets, tmp_path / "mixed.json")
    samples = json.loads((tmp_path / "mixed.json").read_text())
    (tmp_path / "mixed.json").write_text(json.dumps([samples[0], samples[1] | mistake, *samples[2:]]))
    with pytest.raises(ValueError, match=message):
        read_record(tmp_path / "mixed.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{", "mixed.json is not valid json: Expecting"),
        (b"\xff", "mixed.json is not valid json: 'utf-8' codec"),
        (b"{}", "mixed.json must hold the record of a mixed batch, a list of one object per sample"),
        (b"[]", "must hold the record"),
        (b"[1]", "must hold the record"),
        (
            b'[{"image_id": 1, "lam": 1}]',
            r"sample 0 .* must hold \['partner_image_id', 'partner', 'shares', 'placement'\]",
        ),
    ],
)
def test_what_is_no_record_is_named(content, message, tmp_path):
    (tmp_path / "mixed.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_record(tmp_path / "mixed.json")
