import logging

import pytest
import timm
import torch
from torch import nn
from torchvision import models
from torchvision.models.detection import FasterRCNN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detmix.datasets.coco.folder import CocoFolder
from detmix.training.backbones import TimmPyramid, build_pyramid, fit_state
from detmix.training.build import build_detector
from detmix.training.checkpoint import load_detector
from detmix.training.export import check_onnx, export_onnx
from detmix.training.predict import write_predictions
from tests.training.saving import save_checkpoint

LITE = "timm/tf_efficientnet_lite0"
STRIDES = (4, 8, 16, 32)


def trained(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", ["timm/resnet10t", LITE, "timm/convnext_atto", "timm/mobilenetv3_small_050"])
def test_any_model_with_the_strides_becomes_a_pyramid(name):
    pyramid, options = build_pyramid(name, STRIDES, 32, None)
    maps = pyramid(torch.rand(1, 3, 64, 96))
    assert [tuple(x.shape) for x in maps.values()] == [(1, 32, 64 // s, 96 // s) for s in STRIDES]
    config = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    assert options == {"image_mean": list(config.mean), "image_std": list(config.std)}


def test_a_detector_normalises_as_its_backbone_does():
    model = build_detector("FasterRCNN", 3, backbone=LITE, fpn_channels=32)
    assert (model.transform.image_mean, model.transform.image_std) == ([0.5] * 3, [0.5] * 3)
    own = build_detector("FasterRCNN", 3, backbone=LITE, fpn_channels=32, options={"image_mean": [0.1] * 3})
    assert own.transform.image_mean == [0.1] * 3


def full_state(name="tf_efficientnet_lite0"):
    torch.manual_seed(0)
    return {
        key: torch.rand_like(value.float()).to(value.dtype)
        for key, value in timm.create_model(name).state_dict().items()
    }


@pytest.mark.parametrize("renamed", [False, True])
def test_a_file_of_weights_reaches_the_backbone_and_other_names_are_told(renamed, tmp_path, caplog):
    state = full_state()
    given = {f"_{i}": value for i, value in enumerate(state.values())} if renamed else state
    torch.save(given, tmp_path / "lite0.pth")
    with caplog.at_level(logging.WARNING):
        pyramid, _ = build_pyramid(LITE, STRIDES, 32, None, weights=str(tmp_path / "lite0.pth"))
    for key, value in pyramid.body.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert ("fit in order and shape" in caplog.text) == renamed


def test_a_file_of_weights_reaches_a_resnet_of_torchvision(tmp_path):
    state = models.resnet18().state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "resnet.pth")
    pyramid, _ = build_pyramid("resnet18", STRIDES, 32, None, weights=str(tmp_path / "resnet.pth"))
    assert torch.equal(pyramid.body.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {key: value for key, value in s.items() if "blocks.0" not in key},
            "the file has .* tensors and the",
        ),
        (
            lambda s: {**s, "conv_stem.weight": torch.zeros(32, 4, 3, 3)},
            r"conv_stem.weight \(32, 4, 3, 3\) in the file and ",
        ),
        (lambda s: dict(reversed(s.items())) | {"more": torch.zeros(1)}, "must fit timm/tf_efficientnet_lite0, but"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error_that_names_both_sides(change, message, tmp_path):
    torch.save(change(full_state()), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        build_pyramid(LITE, STRIDES, 32, None, weights=str(tmp_path / "other.pth"))


def test_names_and_strides_that_there_are_not_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'resnet10' is none; did you mean timm/.*resnet10t"):
        build_pyramid("timm/resnet10", STRIDES, 32, None)
    with pytest.raises(ValueError, match=r"must have maps of strides 4, 8, 16, 32, but .* is not among its strides"):
        build_pyramid("timm/vit_tiny_patch16_224", STRIDES, 32, None)
    with pytest.raises(FileNotFoundError, match=r"there is no .*none\.pth"):
        build_pyramid(LITE, STRIDES, 32, None, weights=str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="trainable_layers must be given with backbone"):
        build_detector("fasterrcnn_resnet50_fpn", 3, trainable_layers=2)


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t", LITE, "timm/convnext_atto"])
def test_the_last_stages_are_trained_and_the_others_are_not(name):
    with torch.device("meta"):
        counts = [len(trained(build_pyramid(name, STRIDES, 32, None, trainable_layers=k)[0].body)) for k in range(6)]
        body = build_pyramid(name, STRIDES, 32, None)[0].body
    assert counts[0] == 0
    assert counts[5] == len(list(body.parameters()))
    assert counts == sorted(counts)
    assert 0 < counts[1] < counts[2] < counts[3] < counts[4]
    with pytest.raises(ValueError, match=r"trainable_layers must lie in 0\.\.5, but it is 6"):
        build_pyramid(name, STRIDES, 32, None, trainable_layers=6)


def test_two_trained_layers_of_a_resnet_are_its_last_two():
    pyramid, _ = build_pyramid("resnet18", STRIDES, 32, None, trainable_layers=2)
    assert {name.split(".")[0] for name in trained(pyramid.body)} == {"layer3", "layer4"}
    pyramid, _ = build_pyramid("timm/resnet10t", STRIDES, 32, None, trainable_layers=2)
    assert {name.split(".")[0] for name in trained(pyramid.body)} == {"layer3", "layer4"}


def test_a_checkpoint_gives_the_plain_torchvision_model_back(tmp_path):
    settings = {"backbone": LITE, "fpn_channels": 32, "trainable_layers": 2, "freeze_batch_norm": True}
    module = save_checkpoint(tmp_path / "last.ckpt", **settings, options={"min_size": 64, "max_size": 64})
    model, _ = load_detector(tmp_path / "last.ckpt")
    assert type(model) is FasterRCNN
    assert isinstance(model.backbone, TimmPyramid)
    images = [torch.rand(3, 48, 64)]
    with torch.inference_mode():
        (expected,), (found,) = module.model(images), model(images)
    assert len(found["boxes"])
    for key, value in found.items():
        assert torch.equal(value, expected[key])


def test_weights_load_into_torchvisions_class_by_hand(tmp_path):
    settings = {"backbone": LITE, "fpn_channels": 32, "options": {"min_size": 64, "max_size": 64}}
    module = save_checkpoint(tmp_path / "last.ckpt", **settings)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "model.")
    pyramid, options = build_pyramid(LITE, STRIDES, 32, LastLevelMaxPool())
    model = FasterRCNN(pyramid, 4, min_size=64, max_size=64, **options).eval()
    model.load_state_dict(state, strict=True)
    image = torch.rand(3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model([image])[0]["boxes"], module.model([image])[0]["boxes"])


def test_a_tag_of_timm_says_how_a_checkpoint_normalises(tmp_path, monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)  # it would download
    settings = {"backbone": "timm/mobilenetv3_large_100", "weights_backbone": "miil_in21k", "fpn_channels": 32}
    module = save_checkpoint(tmp_path / "last.ckpt", **settings, options={"min_size": 64, "max_size": 64})
    model, _ = load_detector(tmp_path / "last.ckpt")
    assert module.model.transform.image_mean == [0.0] * 3  # that of the tag; the first one's is ImageNet's
    assert model.transform.image_mean == [0.0] * 3


def test_equal_names_with_other_shapes_are_never_taken_by_order():
    own, state = {"a": torch.zeros(2), "b": torch.zeros(3)}, {"a": torch.zeros(3), "b": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"tensor 0 is a \(3,\) in the file and a \(2,\) in the model"):
        fit_state(own, state, "a model", "a.pth")


def test_a_detector_on_a_backbone_of_timm_exports_and_predicts(shapes, tmp_path):
    torch.manual_seed(0)
    options = {"min_size": 96, "max_size": 96}
    model = build_detector("FasterRCNN", 4, backbone=LITE, fpn_channels=32, options=options).eval()
    images = [torch.rand(3, 80, 96), torch.rand(3, 64, 90)]
    parity = check_onnx(export_onnx(model, ["circle", "square", "triangle"]), model, images)
    assert parity.holds
    assert parity.detections > 0
    dataset = CocoFolder(shapes, "annotations/instances_val.json")
    assert write_predictions(model, dataset, tmp_path, print, pictures=False) == list(dataset.image_ids)
    assert (tmp_path / "predictions.json").stat().st_size > 100


def test_the_tensor_that_does_not_fit_is_the_one_that_is_named():
    own = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"tensor 1 is b \(5,\) in the file and b \(3,\) in the model"):
        fit_state(own, {"c": torch.zeros(4), "b": torch.zeros(5), "a": torch.zeros(2)}, "a model", "a.pth")
    with pytest.raises(ValueError, match=r"tensor 2 is nothing in the file and c \(4,\) in the model"):
        fit_state(own, {"x": torch.zeros(2), "y": torch.zeros(3)}, "a model", "a.pth")


def test_a_name_that_both_know_never_goes_to_another_tensor():
    own, state = {"a": torch.zeros(2), "b": torch.zeros(2)}, {"b": torch.zeros(2), "c": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"tensor 0 is b \(2,\) in the file and a \(2,\) in the model"):
        fit_state(own, state, "a model", "a.pth")
