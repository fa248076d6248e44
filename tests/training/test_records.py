import json
from pathlib import Path

import pytest

from detmix.training.records import read_record, write_record
from tests.training.mixes import PLAN, mixed


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
