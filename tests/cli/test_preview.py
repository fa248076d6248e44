import json
import re

import PIL.Image
import pytest

from detmix.cli.train import NOISE
from detmix.training.records import read_record
from tests.cli.commands import DEMO, command, failure
from tests.conftest import draw_truncated

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in NOISE),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # of Lightning's use
]


def test_preview_draws_without_training(shapes, monkeypatch, tmp_path, capsys):
    output = tmp_path / "deep/preview.png"
    line = f"--config {DEMO} --data.root {shapes} --num_images 6 --output {output}"
    assert command(monkeypatch, "preview.py", line) == 0
    assert capsys.readouterr().out == f"Drew {output}; {output.with_suffix('.json')} records the mixes\n"
    with PIL.Image.open(output) as picture:
        assert picture.mode == "RGB"
    said = failure(monkeypatch, capsys, f"--config {DEMO} --data.root {shapes} --num_images 9", "preview.py")
    assert "batch_size must be at most the 8 training images, but it is 9" in said


PLAIN = "--data.augment []"


def preview(monkeypatch, shapes, output, options):
    """What the preview drew and recorded, as bytes."""
    command(
        monkeypatch, "preview.py", f"--config {DEMO} --data.root {shapes} --num_images 8 --output {output} {options}"
    )
    return output.read_bytes(), output.with_suffix(".json").read_bytes()


@pytest.mark.parametrize(
    "mixup",
    [
        "",
        "--data.mixup null",
        "--data.mixup.p 1 --data.mixup.scale [0.5,1.5] --data.mixup.fill [114,0,30]",
        "--data.mixup.p 1 --data.mixup.min_weight 0.4",
        "--data.mixup.p 1 --data.mixup.box_weights ones",
    ],
)
def test_a_preview_without_augmentation_is_replayed_bit_for_bit(mixup, shapes, monkeypatch, tmp_path):
    drawn = preview(monkeypatch, shapes, tmp_path / "first.png", f"{PLAIN} {mixup}")
    again = f"{PLAIN} {mixup} --seed_everything 7 --num_images 2 --replay {tmp_path / 'first.json'}"
    assert preview(monkeypatch, shapes, tmp_path / "second.png", again) == drawn
    ids, plan = read_record(tmp_path / "first.json")
    assert sorted(ids) == list(range(1, 9))
    assert any(mix.partner >= 0 for mix in plan) == (mixup != "--data.mixup null")


def test_a_replay_mixes_the_images_as_they_are_on_disk(shapes, monkeypatch, tmp_path):
    preview(monkeypatch, shapes, tmp_path / "augmented.png", "")
    replay = f"--replay {tmp_path / 'augmented.json'}"
    drawn = preview(monkeypatch, shapes, tmp_path / "replayed.png", replay)
    assert drawn == preview(monkeypatch, shapes, tmp_path / "plain.png", f"{PLAIN} {replay}")
    assert drawn[0] != (tmp_path / "augmented.png").read_bytes()


def test_a_replay_fills_and_drops_boxes_as_the_config_says(shapes, monkeypatch, tmp_path):
    preview(monkeypatch, shapes, tmp_path / "first.png", "--data.mixup.p 1")
    options = ("", "--data.mixup.fill 255", "--data.mixup.min_weight 0.5")
    drawn = {
        preview(monkeypatch, shapes, tmp_path / "again.png", f"--replay {tmp_path / 'first.json'} {option}")[0]
        for option in options
    }
    assert len(drawn) == len(options)


def test_a_preview_shows_the_mixes_of_a_schedule_that_starts_later(shapes, monkeypatch, tmp_path):
    schedule = "--data.mixup.p 1 --data.mixup.start 2 --data.mixup.ramp 3 --data.mixup.stop 9"
    preview(monkeypatch, shapes, tmp_path / "preview.png", schedule)
    _, plan = read_record(tmp_path / "preview.json")
    assert all(mix.partner >= 0 for mix in plan)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, r"No such file or directory: '.*record.json'"),
        ("{", "record.json is not valid json"),
        ("[3]", "record.json must hold the record of a mixed batch"),
        (
            {"image_id": 99},
            "image_id of sample 0 of .*record.json is 99, which is not one of the 8 images of .*train.json",
        ),
        (
            {"partner": 1},
            "partner of sample 0 of .*record.json must be the index of one of the 1 samples, or -1, but it is 1",
        ),
    ],
)
def test_a_mistake_in_a_replay_is_one_line(record, message, shapes, monkeypatch, capsys, tmp_path):
    path = tmp_path / "record.json"
    if isinstance(record, dict):
        sample = {"image_id": 1, "partner_image_id": None, "partner": -1, "lam": 1.0, "shares": [1.0, 0.0]}
        path.write_text(json.dumps([sample | {"placement": None} | record]))
    elif record is not None:
        path.write_text(record)
    with pytest.raises(SystemExit) as exit_info:
        preview(monkeypatch, shapes, tmp_path / "preview.png", f"--replay {path}")
    assert exit_info.value.code == 2
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "Seed set" not in line)
    assert re.match(f"error: .*{message}", said)
    assert not (tmp_path / "preview.png").exists()


def test_a_preview_leaves_out_or_names_what_cannot_be_read(monkeypatch, tmp_path, capsys):
    root = draw_truncated(tmp_path, "train_00001", num_train=2)
    line = f"--config {DEMO} --data.root {root} --num_images 2 --output {tmp_path / 'preview.png'}"
    said = failure(monkeypatch, capsys, line, "preview.py")
    assert re.fullmatch(r".*train_00001.png cannot be decoded: .+", said)
    with pytest.warns(UserWarning, match=r"image 2 is skipped: .*train_00001.png cannot be decoded"):
        command(monkeypatch, "preview.py", f"{line} --data.unreadable skip")
    assert read_record(tmp_path / "preview.json")[0] == [1]
    record = (tmp_path / "preview.json").read_text()
    (tmp_path / "other.json").write_text(record.replace('"image_id": 1', '"image_id": 2'))
    replay = f"{line} --data.unreadable skip --replay {tmp_path / 'other.json'}"
    said = failure(monkeypatch, capsys, replay, "preview.py")
    assert re.fullmatch(r".*train_00001.png cannot be decoded: .+", said)


def test_a_preview_of_nothing_that_can_be_read_is_one_line(monkeypatch, tmp_path, capsys):
    root = draw_truncated(tmp_path, "train_00000", num_train=1)
    line = f"--config {DEMO} --data.root {root} --num_images 1 --data.unreadable skip --output {tmp_path / 'p.png'}"
    with pytest.warns(UserWarning, match="image 1 is skipped"):
        said = failure(monkeypatch, capsys, line, "preview.py")
    assert said == "none of the 1 images of the batch can be read."
    assert not (tmp_path / "p.png").exists()
