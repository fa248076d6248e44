import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from detmix.cli import check as check_dataset
from tests.datasets.coco.defective import FILE, SPOILERS, make_content, write

ROOT = Path(__file__).parents[2]


def command(monkeypatch, capsys, line):
    monkeypatch.setattr("sys.argv", ["check_dataset.py", *shlex.split(line)])
    status = check_dataset.main()
    return status, capsys.readouterr().out.splitlines()


def failure(monkeypatch, capsys, line):
    with pytest.raises(SystemExit) as exit_info:
        command(monkeypatch, capsys, line)
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert not out  # seen before anything was checked
    (said,) = err.splitlines()
    assert said.startswith("error: ")
    return said


def spoil(root, *names):
    content = make_content()
    write(root, content)
    for name in names:
        SPOILERS[name][0](content, root)
    return write(root, content, files=False)


def test_a_sound_set_exits_0(monkeypatch, capsys, tmp_path):
    root = spoil(tmp_path)
    assert command(monkeypatch, capsys, str(root)) == (
        0,
        [f"{root / FILE}: 6 images, 12 annotations, 2 categories", "  no errors"],
    )


@pytest.mark.parametrize(("name", "status"), [("grey", 0), ("box clipped", 0), ("empty box", 1), ("undecodable", 1)])
def test_only_errors_exit_1(monkeypatch, capsys, tmp_path, name, status):
    assert command(monkeypatch, capsys, str(spoil(tmp_path, name)))[0] == status


def test_defects_are_counted_with_ids_and_the_first_in_words(monkeypatch, capsys, tmp_path):
    root = spoil(tmp_path, "grey")
    content = json.loads((root / FILE).read_text())
    for row in range(4, 12):
        content["annotations"][row]["area"] = -row
    content["annotations"][0]["bbox"] = [5, 5, 0, 4]
    (root / FILE).write_text(json.dumps(content))
    _, lines = command(monkeypatch, capsys, str(root))
    expected = "expected a finite number from 0 up."
    assert lines[1:] == [
        "  error: 8 annotations: area not a finite number from 0 up; ids 31, 32, 41, 42, 51, 52, 61, 62",
        *(f"    'area' of annotation {number} is -{row}, {expected}" for row, number in ((4, 31), (5, 32), (6, 41))),
        "  error: 1 annotation: box of zero or negative width or height; ids 11",
        "    x, y, width, height of the first: annotation 11 of 1.png: [5.0, 5.0, 0.0, 4.0] (left out).",
        "  warning: 1 image: grey, read as RGB; ids 3",
        f"    {root}/images/3.png is of mode L.",
        "  lost to these errors: 1 annotation",
    ]


def test_the_report_holds_every_defect_with_all_ids(monkeypatch, capsys, tmp_path):
    root = spoil(tmp_path / "set", "grey", "box NaN")
    status, _ = command(monkeypatch, capsys, f"{root} --json {tmp_path}/report.json")
    (record,) = json.loads((tmp_path / "report.json").read_text())
    assert status == 1
    assert (record["annotations"], record["images"]) == (str(root / FILE), str(root / "images"))
    assert record["counts"] == {"images": 6, "annotations": 12, "categories": 2}
    assert record["lost"] == {"images": 0, "annotations": 1, "categories": 0}
    found = {d["kind"]: (d["severity"], d["table"], d["rows"], d["ids"]) for d in record["defects"]}
    assert found == {"box NaN": ("error", "annotations", [4], [31]), "grey": ("warning", "images", [2], [3])}


def test_every_split_is_checked_and_cleaned(monkeypatch, capsys, tmp_path):
    root = spoil(tmp_path / "set", "empty box")
    (root / "annotations/instances_val.json").write_text(json.dumps(make_content()))
    status, lines = command(monkeypatch, capsys, f"{root} --fix {tmp_path}/clean")
    assert status == 1
    assert [line for line in lines if line.startswith(str(root))] == [
        f"{root}/annotations/instances_{split}.json: 6 images, 12 annotations, 2 categories"
        for split in ("train", "val")
    ]
    assert lines[-1] == f"Wrote {tmp_path}/clean; {tmp_path}/clean/removed.json lists 1 record removed or changed."
    status, lines = command(monkeypatch, capsys, f"{tmp_path}/clean --workers 2")
    assert status == 0
    assert lines[0] == f"{tmp_path}/clean/annotations/instances_train.json: 6 images, 11 annotations, 2 categories"


def test_files_and_folders_are_named_as_for_the_reader(monkeypatch, capsys, tmp_path):
    root = spoil(tmp_path, "polygon")
    (root / "images").rename(root / "pictures")
    (root / FILE).rename(root / "mine.json")
    line = f"{root} --annotations mine.json --images pictures"
    assert command(monkeypatch, capsys, line)[0] == 1
    assert command(monkeypatch, capsys, f"{line} --no-masks")[0] == 0
    assert command(monkeypatch, capsys, f"{line} --masks")[0] == 1


def test_each_mistake_is_one_line(monkeypatch, capsys, tmp_path):
    root = spoil(tmp_path / "set")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (root / "broken.json").write_text('{"images": ')
    for line, said in {
        "": "the following arguments are required: ROOT",
        f"{tmp_path}/nowhere": "nowhere is not a folder",
        f"{tmp_path}/full": "has no annotations/instances_*.json; name the files with --annotations",
        f"{root} --annotations other.json": "other.json is missing; json files there: ",
        f"{root} --annotations broken.json": "broken.json is not valid json",
        f"{root} --images pictures": "pictures is not a folder",
        f"{root} --fix {tmp_path}/full": "full exists already",
        f"{root} --fix {root}/clean": "is inside",
        f"{root} --json {tmp_path}/nowhere/report.json": "cannot be written; is its folder there?",
        f"{root} --json {tmp_path}/full": "expected a file, but",
        f"{root} --workers 0": "expected a whole number of at least 1, but it is '0'",
    }.items():
        assert said in failure(monkeypatch, capsys, line), line


def test_names_that_the_terminal_does_not_know_are_escaped(tmp_path):
    root = spoil(tmp_path)
    content = json.loads((root / FILE).read_text())
    (root / "images/3.png").rename(root / "images/\N{SNOWMAN}.jpg")
    content["images"][2]["file_name"] = "\N{SNOWMAN}.jpg"
    (root / FILE).write_text(json.dumps(content))
    line = [sys.executable, ROOT / "tools/check_dataset.py", root]
    env = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(line, capture_output=True, env=env, check=True)
    assert b"\\u2603.jpg is PNG, not JPEG" in ran.stdout
