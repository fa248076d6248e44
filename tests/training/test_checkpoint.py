import pickle
import re

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum, detection
from torchvision.ops import FrozenBatchNorm2d

from detmix.cli.train import NOISE
from detmix.training.build import build_detector
from detmix.training.checkpoint import _rebuild, load_detector
from tests.conftest import assert_same
from tests.training.saving import CLASSES, SMALL, save_checkpoint

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in NOISE]
MOBILE = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    return path, save_checkpoint(path)


def test_the_detector_of_a_checkpoint_predicts_as_the_trained_one(saved):
    path, module = saved
    model, class_names = load_detector(path)
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 40)]
    with torch.no_grad():
        expected = module.model(images)
        assert_same(model(images), expected)
    assert all(len(found["boxes"]) for found in expected)
    assert class_names == CLASSES
    assert not model.training
    assert type(model.roi_heads) is detection.roi_heads.RoIHeads  # the losses are not weighted


def test_what_training_started_from_is_neither_downloaded_nor_read(monkeypatch, tmp_path):
    def trained(self, **_):
        state = models.mobilenet_v3_large().state_dict()
        return {key: value.uniform_(0.1, 0.4) if "running_var" in key else value for key, value in state.items()}

    options = {"box_score_thresh": 0.0, "rpn_score_thresh": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(WeightsEnum, "get_state_dict", trained)
        module = save_checkpoint(tmp_path / "best.ckpt", MOBILE, weights_backbone="DEFAULT", options=options)
    checkpoint = torch.load(tmp_path / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["weights"] = str(tmp_path / "gone.pth")
    torch.save(checkpoint, tmp_path / "best.ckpt")
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: pytest.fail("it would download"))
    model, _ = load_detector(tmp_path / "best.ckpt")
    images = [torch.rand(3, 60, 90)]
    with torch.no_grad():
        expected = module.model(images)
        assert_same(model(images), expected)
    assert len(expected[0]["boxes"])


def norms(model):
    kinds = nn.BatchNorm2d | FrozenBatchNorm2d
    return {name: (type(norm), norm.eps) for name, norm in model.named_modules() if isinstance(norm, kinds)}


def builders_and_weights():
    for name in models.list_models(module=detection):
        weights = [None, *models.get_model_weights(name).__members__]
        for start in [*({"weights": w} for w in weights), {"weights_backbone": "DEFAULT"}]:
            yield name, start


@pytest.mark.parametrize(("name", "start"), [*builders_and_weights()], ids=str)
def test_batch_norms_are_frozen_as_torchvision_froze_them(name, start, monkeypatch):
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
    for initialise in (name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")):
        monkeypatch.setattr(nn.init, initialise, lambda tensor, *_, **__: tensor)  # there are no values
    with torch.device("meta"):
        trained = build_detector(name, 4, **start)
        state = trained.state_dict()
        rebuilt = _rebuild({"detector": name, "num_classes": 4, **start}, state)
    assert norms(rebuilt) == norms(trained)
    assert rebuilt.state_dict().keys() == state.keys()


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    class Code:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    torch.save({"state_dict": {}, "hyper_parameters": Code()}, tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match=r"holds more than tensors and plain values.*could run any code"):
        load_detector(tmp_path / "best.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path, whole: None, "checkpoint must be a file, but there is no .*best.ckpt"),
        (lambda path, whole: path.mkdir(), "checkpoint must be a file, but there is no .*best.ckpt"),
        (lambda path, whole: path.write_bytes(b""), "best.ckpt is damaged or no checkpoint: "),
        (lambda path, whole: path.write_text("model: 3\n"), "best.ckpt is no checkpoint, or holds more"),
        (lambda path, whole: path.write_bytes(whole[: len(whole) // 2]), "best.ckpt is damaged or no checkpoint: "),
        (lambda path, whole: path.write_bytes(pickle.dumps(["a"])), "best.ckpt "),
        (lambda path, whole: torch.save([1], path), "hyper_parameters .* of a DetectorModule, but it holds list"),
        (lambda path, whole: torch.save({"state_dict": {}}, path), r"but it holds \['state_dict'\]"),
    ],
)
def test_what_is_no_checkpoint_is_said_to_be_none(write, message, saved, tmp_path):
    write(tmp_path / "best.ckpt", saved[0].read_bytes())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_detector(tmp_path / "best.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 9}, "Error.* size mismatch for roi_heads.box_predictor.cls_score.weight"),
        ({"num_classes": "four"}, ""),
        ({"detector": "yolo"}, "detector must be one of"),
        ({"options": [SMALL]}, "must be a mapping"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_an_error(change, message, saved, tmp_path):
    checkpoint = torch.load(saved[0], weights_only=True)
    checkpoint["hyper_parameters"] |= change
    torch.save(checkpoint, tmp_path / "best.ckpt")
    said = f"best.ckpt does not fit its own detector, {change.get('detector', 'FasterRCNN')!r}: "
    with pytest.raises(ValueError, match=f"{re.escape(said)}.*{message}"):
        load_detector(tmp_path / "best.ckpt")


def test_classes_without_names_are_numbers(tmp_path, saved):
    checkpoint = torch.load(saved[0], weights_only=True)
    checkpoint["hyper_parameters"]["class_names"] = None
    torch.save(checkpoint, tmp_path / "best.ckpt")
    assert load_detector(tmp_path / "best.ckpt")[1] == ("1", "2", "3")
