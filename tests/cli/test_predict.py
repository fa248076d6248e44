import json
import re
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch

from detmix.cli import predict
from detmix.cli.train import NOISE
from detmix.datasets.shapes import draw_shapes
from tests.training.saving import save_checkpoint

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in NOISE]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return draw_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=2, num_val=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    save_checkpoint(path)
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """The function ``run(*arguments)`` gives exit status, output and errors; it runs in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["predict.py", "--device", "cpu", *map(str, arguments)])
        try:
            status = predict.main()
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


def read(path):
    return json.loads(Path(path).read_text())


def written(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_folder_and_a_file_are_predicted_on(run, checkpoint, shapes, tmp_path):
    shutil.copytree(shapes / "images", tmp_path / "images")
    shutil.copy(shapes / "images/val_00000.png", tmp_path / "one.png")
    status, out, err = run(checkpoint, "images", "one.png")
    assert (status, out, err) == (0, "Predicted on 6 images; the results are in predictions\n", "")
    names = [f"images/{name}.png" for name in ("train_00000", "train_00001", "val_00000", "val_00001", "val_00002")]
    names.append("one.png")
    assert written("predictions") == {"predictions.json", "images.json", *(f"pictures/{name}" for name in names)}
    table = read("predictions/images.json")
    assert [(row["id"], row["file_name"]) for row in table["images"]] == [*enumerate(names, 1)]
    assert table["categories"] == [
        {"id": k, "name": name} for k, name in enumerate(("circle", "square", "triangle"), 1)
    ]
    results = read("predictions/predictions.json")
    assert {record["image_id"] for record in results} == set(range(1, 7))
    of = {k: [r["bbox"] for r in results if r["image_id"] == k] for k in (3, 6)}
    assert of[3] == of[6]  # one picture twice
    for row in table["images"]:
        with PIL.Image.open(row["file_name"]) as picture:
            assert picture.size == (row["width"], row["height"])


def test_a_second_run_does_not_read_the_pictures_of_the_first(run, checkpoint, shapes, tmp_path):
    shutil.copy(shapes / "images/val_00000.png", tmp_path / "one.png")
    for _ in range(2):
        assert run(checkpoint, ".")[:2] == (0, "Predicted on 1 images; the results are in predictions\n")


def test_with_annotations_images_and_ids_are_those_of_the_json(run, checkpoint, shapes, tmp_path):
    content = read(shapes / "annotations/instances_val.json")
    for row in [*content["images"], *content["annotations"]]:
        row["id" if "file_name" in row else "image_id"] += 100
    for row in content["categories"]:
        row["id"] *= 10
    for row in content["annotations"]:
        row["category_id"] *= 10
    (tmp_path / "val.json").write_text(json.dumps(content))
    status, _, _ = run(checkpoint, shapes / "images", "--annotations", "val.json", "--output", "deep/out")
    assert status == 0
    results = read("deep/out/predictions.json")
    assert {record["image_id"] for record in results} == {row["id"] for row in content["images"]}
    assert {record["category_id"] for record in results} <= {10, 20, 30}
    names = {f"pictures/{row['file_name']}" for row in content["images"]}
    assert written("deep/out") == {"predictions.json", *names}


def test_min_score_is_of_the_pictures_and_no_pictures_means_none(run, checkpoint, shapes):
    image = shapes / "images/val_00000.png"
    run(checkpoint, image, "--output", "all", "--min_score", "0")
    run(checkpoint, image, "--output", "none", "--min_score", "1")
    run(checkpoint, image, "--output", "json", "--no_pictures", "--batch_size", "2")
    assert read("all/predictions.json") == read("none/predictions.json") == read("json/predictions.json")
    assert Path("all/pictures/val_00000.png").read_bytes() != Path("none/pictures/val_00000.png").read_bytes()
    assert written("json") == {"predictions.json", "images.json"}


def test_files_that_cannot_be_read_are_named_and_the_status_is_1(run, checkpoint, shapes, tmp_path):
    whole = (shapes / "images/val_00000.png").read_bytes()
    (tmp_path / "images").mkdir()
    for name, data in (("half.png", whole[: len(whole) // 2]), ("text.png", b"no image"), ("whole.png", whole)):
        (tmp_path / "images" / name).write_bytes(data)
    status, out, err = run(checkpoint, "images")
    assert (status, out) == (1, "Predicted on 1 images; the results are in predictions\n")
    first, second = err.splitlines()
    assert re.match("images/text.png cannot be read: ", first)
    assert re.match("images/half.png cannot be decoded: ", second)
    assert [row["id"] for row in read("predictions/images.json")["images"]] == [3]
    assert {record["image_id"] for record in read("predictions/predictions.json")} == {3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none.ckpt images", "checkpoint must be a file, but there is no none.ckpt."),
        ("text.ckpt images", "checkpoint text.ckpt is no checkpoint, or holds more than tensors and plain values"),
        ("half.ckpt images", "checkpoint half.ckpt is damaged or no checkpoint: "),
        ("best.ckpt none", "images must be files or folders, but there is no none."),
        ("best.ckpt empty", r"images must be .*, but there are none in empty."),
        ("best.ckpt text.ckpt", "none of 1 files can be read."),
        ("best.ckpt images --device bad", "device must be one of this machine, but is 'bad': "),
        ("best.ckpt images --device cuda:99", "device must be one of this machine, but is 'cuda:99': "),
        ("best.ckpt images --device meta", "device must be one of this machine, but is 'meta'"),
        ("best.ckpt images --output text.ckpt", ".*text.ckpt"),
        ("best.ckpt images --output text.ckpt/out", ".*text.ckpt"),
        ("best.ckpt images --annotations none.json", "annotations .*none.json is missing"),
        ("best.ckpt images --annotations text.ckpt", ".*text.ckpt is not valid json"),
        ("best.ckpt images --annotations other.json", "annotations must have the classes of the checkpoint, circle, "),
        ("best.ckpt images/a.png --annotations val.json", "with --annotations, images must be the one folder"),
        ("best.ckpt images empty --annotations val.json", "with --annotations, images must be the one folder"),
        ("best.ckpt images --min_score high", "argument --min_score: invalid float value: 'high'"),
        (
            "best.ckpt images --batch_size 0",
            "argument --batch_size: expected a whole number of at least 1, but it is '0'",
        ),
        (
            "best.ckpt images --num_workers -1",
            "argument --num_workers: expected a whole number of at least 0, but it is '-1'",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, run, checkpoint, shapes, tmp_path):
    (tmp_path / "best.ckpt").symlink_to(checkpoint)
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "half.ckpt").write_bytes(checkpoint.read_bytes()[:1000])
    for name in ("images", "empty"):
        (tmp_path / name).mkdir()
    shutil.copy(shapes / "images/val_00000.png", tmp_path / "images/a.png")
    shutil.copy(shapes / "annotations/instances_val.json", tmp_path / "val.json")
    other = read("val.json") | {"categories": [{"id": k, "name": f"other {k}"} for k in (1, 2, 3)]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    status, out, err = run(*arguments.split())
    assert (status, out) == (2, "")
    said = err.splitlines()[-1]
    assert re.search(f"error: {message}", said)
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("predictions.json"))


def test_help_says_what_comes_out(run):
    status, out, _ = run("--help")
    assert status == 0
    for word in ("predictions.json", "images.json", "--annotations", "exit status is then 1"):
        assert word in " ".join(out.split())


def test_memory_that_runs_out_is_a_mistake_too(run, checkpoint, shapes, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB")

    monkeypatch.setattr("detmix.training.predict.write_predictions", refuse)
    assert run(checkpoint, shapes / "images")[::2] == (2, "error: Tried to allocate 2 GiB\n")
