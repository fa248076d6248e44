import types

import numpy as np
import PIL.Image
import pytest
import torch

from detmix.mixing.plan import Mix
from detmix.training.callbacks import PREDICTION, Pictures, ProgressLines, draw_curves, write_samples
from detmix.training.records import read_record
from tests.training.mixes import PLAN, mixed


def pixels(path):
    with PIL.Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


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


def test_progress_is_a_line_for_each_epoch_and_for_each_minute(capsys):
    trainer = types.SimpleNamespace(current_epoch=0, max_epochs=3, num_training_batches=9, progress_bar_metrics={})
    lines = ProgressLines(seconds=0.0)
    lines.on_train_epoch_start(trainer, None)
    trainer.progress_bar_metrics = {"train/loss": torch.tensor(0.5)}
    lines.on_train_batch_end(trainer, None, None, None, 1)
    lines.seconds = 60.0
    lines.on_train_batch_end(trainer, None, None, None, 2)
    trainer.progress_bar_metrics["val/AP"] = 0.25
    lines.on_train_epoch_end(trainer, None)
    lines.disable()
    lines.on_train_epoch_end(trainer, None)
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 1 of 3, batch 2 of 9: train/loss 0.500, 0 s",
        "Epoch 1 of 3: train/loss 0.500, val/AP 0.250, 0 s",
    ]
