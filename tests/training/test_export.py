import json
import re

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detmix.losses import weight_losses
from detmix.training import export
from detmix.training.export import Parity, check_onnx, export_onnx, write_onnx
from tests.losses.tiny import DETECTORS, tiny

# Portrait, landscape, shrunk and grown; with 97 and 200 float32 is a pixel off: 200 * float32(96 / 200) is under 96.
SIZES = ((80, 120), (97, 64), (64, 97), (200, 130), (31, 90))
NAMES = {
    "maskrcnn": ["boxes", "labels", "scores", "masks"],
    "keypointrcnn": ["boxes", "labels", "scores", "keypoints", "keypoints_scores"],
}


def detector(name):
    model = tiny(name).eval()
    model.score_thresh = 0.3 if name == "retinanet" else getattr(model, "score_thresh", None)
    if model.transform.fixed_size is None:  # the padded sizes differ between images
        model.transform.min_size, model.transform.max_size = (64,), 96
    return model


def images(sizes=SIZES):
    rng = torch.Generator().manual_seed(2)
    return [torch.rand(3, *size, generator=rng) for size in sizes]


@pytest.fixture(scope="module")
def exported():
    """Detectors and their ONNX models, each exported once."""
    made = {}

    def exported(name):
        if name not in made:
            model = detector(name)
            # That its losses were weighted changes nothing.
            made[name] = model, export_onnx(weight_losses(detector(name)), ["a", "b", "c"])
        return made[name]

    return exported


@pytest.mark.parametrize("name", DETECTORS)
def test_onnxruntime_finds_what_torch_finds_in_images_of_all_sizes(name, exported):
    model, content = exported(name)
    parity = check_onnx(content, model, images())
    assert parity.images == len(SIZES)
    assert parity.detections > 50
    assert parity.unmatched == 0
    tolerances = {"boxes": 5e-3, "scores": 5e-5, "masks": 1e-4, "keypoints": 1e-3, "keypoints_scores": 1e-3}
    assert all(value < tolerances[key] for key, value in parity.differences.items()), parity
    names = NAMES.get(name, ["boxes", "labels", "scores"])
    assert parity.differences.keys() == {key for key in names if key != "labels"}
    assert parity.holds


@pytest.mark.parametrize("name", ["maskrcnn", "keypointrcnn", "fcos", "ssd"])
def test_an_image_without_objects_is_exported_too(name, exported):
    model = detector(name)
    stop = getattr(model, "roi_heads", model)
    stop.score_thresh = 1.0
    content = export_onnx(model, ["a", "b", "c"])
    parity = check_onnx(content, model, images())
    assert parity[:2] == (len(SIZES), 0)
    assert parity.holds


def test_a_graph_traced_where_nothing_is_found_finds_what_there_is(monkeypatch):
    model = detector("fasterrcnn")
    with torch.no_grad():
        for parameter in model.roi_heads.box_predictor.parameters():
            parameter.mul_(10)  # scores that differ between images
        black, others = (model(batch) for batch in ([torch.zeros(3, 64, 80)], images()))
    model.roi_heads.score_thresh = float(black[0]["scores"].max()) + 1e-4
    assert all(found["scores"].max() > model.roi_heads.score_thresh for found in others)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, generator: torch.zeros(size))
        content = export_onnx(model, ["a", "b", "c"])
    parity = check_onnx(content, model, images())
    assert parity.detections
    assert parity.holds


def test_a_detector_is_left_as_it_was(exported):
    model = detector("fcos").train()
    export_onnx(model, ["a", "b", "c"])
    assert model.training
    assert type(model.transform) is GeneralizedRCNNTransform


@pytest.mark.parametrize("name", ["fcos", "maskrcnn"])
def test_the_model_says_what_goes_in_and_comes_out(name, exported):
    model, content = exported(name)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type, entry.shape) == ("image", "tensor(float)", [3, "height", "width"])
    outputs = {output.name: output.shape for output in session.get_outputs()}
    assert list(outputs) == NAMES.get(name, ["boxes", "labels", "scores"])
    assert outputs["boxes"] == ["detections", 4]
    assert outputs["labels"] == outputs["scores"] == ["detections"]
    described = session.get_modelmeta().custom_metadata_map
    assert json.loads(described["class_names"]) == ["a", "b", "c"]
    assert described["detector"] == type(model).__name__
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda model: model.roi_heads.box_predictor.cls_score.bias.add_(torch.tensor([0.0, 0.1, 0, 0])), "scores"),
        (lambda model: model.roi_heads.box_predictor.bbox_pred.bias.add_(1e-2), "boxes"),
        (lambda model: model.roi_heads.mask_predictor.mask_fcn_logits.bias.add_(0.5), "masks"),
    ],
)
def test_another_detector_is_not_at_parity(change, key, exported):
    _, content = exported("maskrcnn")
    model = detector("maskrcnn")
    with torch.no_grad():
        change(model)
    parity = check_onnx(content, model, images())
    assert not parity.holds
    assert parity.unmatched or parity.differences[key] > export.TOLERANCES[key]


def found(boxes, labels, scores):
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels), "scores": torch.tensor(scores)}


class Fixed(nn.Module):
    """A detector that finds the same in every image."""

    score_thresh, detections_per_img = 0.05, 3

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction

    def forward(self, images):
        return [self.prediction for _ in images]


def compare(first, second, monkeypatch):
    """The parity where torch finds the first, and onnxruntime the second, in one image."""

    class Session:
        def __init__(self, *_, **__): ...

        def get_outputs(self):
            return [type("Output", (), {"name": key}) for key in second]

        def run(self, *_):
            return [value.numpy() for value in second.values()]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return check_onnx(b"", Fixed(first), images(SIZES[:1]))


BOX, OTHER = [1.0, 2, 9, 9], [20.0, 2, 30, 9]
ONE = found([BOX, OTHER], [1, 2], [0.9, 0.8])


@pytest.mark.parametrize(
    ("first", "second", "unmatched", "holds"),
    [
        (ONE, ONE, 0, True),
        (ONE, found([OTHER, BOX], [2, 1], [0.8, 0.9]), 0, True),
        (ONE, found([BOX, OTHER], [1, 1], [0.9, 0.8]), 2, False),
        (ONE, found([BOX], [1], [0.9]), 1, False),
        (found([BOX], [1], [0.9]), ONE, 1, False),
        (found([], [], []), ONE, 2, False),
        (ONE, found([BOX, [20.5, 2, 30, 9]], [1, 2], [0.9, 0.8]), 2, False),
        (ONE, found([BOX, [20.05, 2, 30, 9]], [1, 2], [0.9, 0.8]), 0, True),
        (ONE, found([BOX, OTHER], [1, 2], [0.9, 0.81]), 0, False),
        (ONE, found([BOX, OTHER, OTHER], [1, 2, 3], [0.9, 0.8, 0.0501]), 0, True),  # at the threshold
        (ONE, found([BOX, OTHER, OTHER], [1, 2, 3], [0.9, 0.8, 0.06]), 1, False),
        (  # both are full, and the last is as good as another
            found([BOX, OTHER, BOX], [1, 2, 3], [0.9, 0.8, 0.7]),
            found([BOX, OTHER, OTHER], [1, 2, 3], [0.9, 0.8, 0.7]),
            0,
            True,
        ),
        (found([BOX, BOX], [1, 1], [0.9, 0.5]), found([BOX, BOX], [1, 1], [0.5, 0.9]), 0, True),
        (found([BOX], [1], [0.9]), found([BOX, BOX], [1, 1], [0.9, 0.9]), 1, False),
        (found([BOX, BOX], [1, 1], [0.9, 0.9]), found([BOX], [1], [0.9]), 1, False),
    ],
)
def test_detections_have_one_counterpart_each(first, second, unmatched, holds, monkeypatch):
    parity = compare(first, second, monkeypatch)
    assert (parity.unmatched, parity.holds) == (unmatched, holds)
    assert parity.detections == len(first["scores"])


@pytest.mark.parametrize(("moved", "holds"), [(0, True), (1, True), (2, False)])
def test_masks_may_be_a_pixel_apart(moved, holds, monkeypatch):
    masks = torch.zeros(2, 1, 16, 16)
    masks[:, :, 4:9, 4:9] = 0.9
    other = masks.roll((moved, -moved), (2, 3))
    parity = compare(ONE | {"masks": masks}, ONE | {"masks": other}, monkeypatch)
    assert (parity.unmatched, parity.holds) == (0, holds)
    wrong = compare(ONE | {"masks": masks}, ONE | {"masks": other * 0.95}, monkeypatch)
    assert not wrong.holds


def test_no_detector_no_export(monkeypatch):
    with pytest.raises(ValueError, match="model must be a detector of torchvision, but it is a Linear"):
        export_onnx(nn.Linear(2, 2), [])

    def refuse(*_, **__):
        raise torch.onnx.errors.OnnxExporterError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    said = f"FCOS cannot be exported by torch {torch.__version__}: no such operator"
    with pytest.raises(ValueError, match=re.escape(said)):
        export_onnx(detector("fcos"), [])


def test_a_model_is_written_into_a_folder_that_is_made(tmp_path):
    write_onnx(b"onnx", tmp_path / "deep/model.onnx")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.onnx"]
    assert (tmp_path / "deep/model.onnx").read_bytes() == b"onnx"


def test_parity_needs_each_difference_within_its_tolerance():
    assert Parity(1, 1, {"boxes": 0.1, "scores": 1e-3}, 0).holds
    assert not Parity(1, 1, {"boxes": 0.11, "scores": 0.0}, 0).holds
    assert not Parity(1, 1, {"boxes": float("nan")}, 0).holds
    assert not Parity(1, 1, {}, 1).holds
