import json
import re
import shutil
import sys

import onnxruntime
import pytest

from detmix.cli import export as export_onnx
from detmix.cli.train import NOISE
from detmix.datasets.shapes import draw_shapes
from detmix.training import export
from detmix.training.export import Parity
from tests.training.saving import CLASSES, save_checkpoint

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in NOISE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint and images."""
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder / "best.ckpt")
    draw_shapes(folder / "shapes", num_train=1, num_val=2)
    (folder / "text.png").write_text("no image")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys, tmp_path):
    """The function ``run(line)`` gives exit status, output and errors; ``model.onnx`` is written into tmp_path."""
    monkeypatch.chdir(folder)

    def run(line):
        monkeypatch.setattr("sys.argv", ["export_onnx.py", "--output", str(tmp_path / "model.onnx"), *line.split()])
        try:
            status = export_onnx.main()
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


def test_a_detector_is_compared_and_written(run, tmp_path):
    status, out, err = run("best.ckpt --check shapes/images")
    assert (status, err) == (0, "")
    compared, *differences, wrote = out.splitlines()
    assert re.fullmatch(r"Compared [1-9]\d* detections in 3 images, onnxruntime to torch", compared)
    assert [line.split(":")[0].strip() for line in differences] == ["boxes", "scores"]
    assert all(re.search(r"largest difference \d\.\d\de-\d\d, tolerance \d", line) for line in differences)
    assert wrote == f"Wrote {tmp_path / 'model.onnx'}"
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == list(CLASSES)


@pytest.fixture
def quick(monkeypatch):
    """The export and the check replaced: ``quick(parity)`` sets what the check returns, by default that all is well."""
    monkeypatch.setattr(export, "export_onnx", lambda *_: b"onnx")

    def quick(parity=None):
        def check(content, model, images):
            number = len(list(images))
            return Parity(number, 5, {"boxes": 0.0}, 0) if parity is None else parity

        monkeypatch.setattr(export, "check_onnx", check)

    quick()
    return quick


@pytest.mark.parametrize(
    ("options", "images"), [("", 16), ("--check shapes/images", 3), ("--check shapes/images/val_00000.png", 1)]
)
def test_the_comparison_is_on_the_images_that_are_given_or_on_drawn_ones(options, images, run, quick, tmp_path):
    status, out, _ = run(f"best.ckpt {options}")
    assert status == 0
    assert f"Compared 5 detections in {images} images" in out
    assert (tmp_path / "model.onnx").read_bytes() == b"onnx"


@pytest.mark.parametrize(
    ("parity", "message"),
    [
        (
            Parity(2, 9, {"boxes": 3.0, "scores": 0.0}, 0),
            "Not written: the predictions differ, and 0 detections have no counter",
        ),
        (
            Parity(2, 9, {"boxes": 0.0, "scores": 0.0}, 4),
            "Not written: the predictions differ, and 4 detections have no counter",
        ),
        (Parity(2, 0, {"boxes": 0.0, "scores": 0.0}, 0), "Not written: nothing was found to compare; give images"),
    ],
)
def test_nothing_is_written_without_parity(parity, message, run, quick, tmp_path):
    quick(parity)
    status, out, err = run("best.ckpt --check shapes/images")
    assert status == 1
    assert err.startswith(message)
    assert out.startswith(f"Compared {parity.detections} detections in 2 images")
    assert not list(tmp_path.iterdir())


def test_without_a_check_nothing_is_compared(run, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "check_onnx", lambda *_: pytest.fail("it compared"))
    assert run("best.ckpt --no_check") == (0, f"Wrote {tmp_path / 'model.onnx'}\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("none.ckpt", "checkpoint must be a file, but there is no none.ckpt."),
        ("text.png", "checkpoint text.png is no checkpoint, or holds more than tensors and plain values"),
        ("best.ckpt --check none.png", "images must be files or folders, but there is no none.png."),
        ("best.ckpt --check text.png", "text.png cannot be read: "),
        ("best.ckpt --no_check --output text.png/model.onnx", "text.png"),
        ("best.ckpt --no_check --check shapes/images", "argument --check: not allowed with argument --no_check"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(line, message, run, quick, tmp_path):
    status, out, err = run(line)
    assert (status, out) == (2, "")
    assert re.search(f"error: .*{message}", err.splitlines()[-1])
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_packages_that_are_missing_are_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "detmix.training.export", None)
    status, _, err = run("best.ckpt")
    assert (status, err) == (2, "error: detmix.training.export is missing; install it by pip install detmix[export].\n")


def test_an_older_file_stays_where_there_is_no_parity(run, quick, folder, tmp_path):
    shutil.copy(folder / "text.png", tmp_path / "model.onnx")
    quick(Parity(1, 1, {}, 1))
    assert run("best.ckpt --check shapes/images")[0] == 1
    assert (tmp_path / "model.onnx").read_text() == "no image"
