import pytest
import torch
from torchvision import models
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from detmix.losses import weight_losses
from detmix.training.build import build_detector, list_detectors


def sample(size=96):
    target = {"boxes": torch.tensor([[8.0, 8, 60, 70]]), "labels": torch.tensor([2])}
    more = {"masks": torch.ones(1, size, size, dtype=torch.uint8), "keypoints": torch.full((1, 17, 3), 30.0)}
    return torch.rand(3, size, size), target | more | {"weights": torch.tensor([0.5])}


@pytest.mark.parametrize("name", list_detectors())
def test_every_detector_trains_by_name(name):
    on_pyramid = {"backbone": "resnet18", "fpn_channels": 32} if name.isalpha() else {}
    options = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 96}
    if "rcnn" in name.lower():  # few proposals, which take little time
        options |= {"box_batch_size_per_image": 16, "rpn_post_nms_top_n_train": 50}
    model = weight_losses(build_detector(name, 3, **on_pyramid, options=options))
    images, targets = zip(*(sample(), sample()), strict=True)
    losses = model.train()(list(images), list(targets))
    assert len(losses) >= 2
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())


@pytest.mark.parametrize("name", ["FCOS", "FasterRCNN"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_a_pyramid_is_that_of_torchvisions_own_builder(name, backbone):
    builder = {"FCOS": detection.fcos_resnet50_fpn, "FasterRCNN": detection.fasterrcnn_resnet50_fpn}[name]
    with torch.device("meta"):  # only shapes and names are looked at
        own = build_detector(name, 3, backbone=backbone)
        stock = builder(weights=None, weights_backbone=None, num_classes=3)
    if backbone == "resnet50":
        assert list(own.state_dict()) == list(stock.state_dict())
        assert [v.shape for v in own.state_dict().values()] == [v.shape for v in stock.state_dict().values()]
    images = torch.empty(1, 3, 96, 96, device="meta")
    assert [f.shape[-2:] for f in own.backbone(images).values()] == [
        f.shape[-2:] for f in stock.backbone(images).values()
    ]


def test_names_nobody_knows_are_named():
    with pytest.raises(ValueError, match=r"detector must be one of .*fcos_resnet50_fpn, .*FCOS.*, but it is 'yolo'"):
        build_detector("yolo", 3)
    with pytest.raises(ValueError, match=r"backbone must be timm/NAME or one of resnet101, .*, but it is 'vgg16'"):
        build_detector("FCOS", 3, backbone="vgg16")
    with pytest.raises(ValueError, match=r"backbone must be given with FCOS.* detector is 'FCOS' and backbone is None"):
        build_detector("FCOS", 3)
    with pytest.raises(ValueError, match=r"backbone must be given .* 'fcos_resnet50_fpn' and backbone is 'resnet18'"):
        build_detector("fcos_resnet50_fpn", 3, backbone="resnet18")
    with pytest.raises(FileNotFoundError, match=r"there is no missing\.pth"):
        build_detector("FCOS", 3, backbone="resnet18", weights="missing.pth")


def test_a_weights_file_for_other_classes_gives_all_that_fits(tmp_path, caplog):
    make = lambda classes, **more: build_detector("FCOS", classes, backbone="resnet18", fpn_channels=32, **more)  # noqa: E731
    trained = make(5)
    torch.save({"state_dict": {f"model.{k}": v for k, v in trained.state_dict().items()}}, tmp_path / "best.ckpt")
    model = make(5, weights=str(tmp_path / "best.ckpt"))
    assert not caplog.messages
    model = make(3, weights=str(tmp_path / "best.ckpt"))
    count = len(list(model.parameters()))
    head = "head.classification_head.cls_logits"
    assert caplog.messages == [
        f"2 of {count} parameters stay as initialised, because weights has none of their name and shape: "
        f"{head}.weight, {head}.bias"
    ]
    state, source = model.state_dict(), trained.state_dict()
    differ = [key for key in state if state[key].shape != source[key].shape]
    assert differ == ["head.classification_head.cls_logits.weight", "head.classification_head.cls_logits.bias"]
    assert all(torch.equal(state[key], source[key]) for key in state if key not in differ)


def test_of_many_parameters_that_stay_as_initialised_some_are_named(tmp_path, caplog):
    torch.save({}, tmp_path / "empty.pth")
    model = build_detector("FCOS", 3, backbone="resnet18", fpn_channels=32, weights=str(tmp_path / "empty.pth"))
    names = [name for name, _ in model.named_parameters()]
    (message,) = caplog.messages
    assert message.startswith(f"{len(names)} of {len(names)} parameters stay as initialised")
    assert message.endswith(f": {', '.join(names[:8])} and {len(names) - 8} more")


def test_named_weights_keep_their_backbone_and_give_a_new_head(tmp_path, monkeypatch):
    # The weights cannot be downloaded in a test: a state dict of the right shapes stands in for the file.
    stock = models.get_model("fcos_resnet50_fpn", weights=None, weights_backbone=None).state_dict()
    source = {key: value for key, value in stock.items() if not key.endswith("num_batches_tracked")}
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(source))
    model = build_detector("fcos_resnet50_fpn", 3, weights="DEFAULT")
    state = model.state_dict()
    kept = [key for key in source if key.startswith(("backbone.", "head.regression_head."))]
    assert all(torch.equal(state[key], source[key]) for key in kept)
    assert any(isinstance(module, FrozenBatchNorm2d) for module in model.backbone.modules())
    assert model.head.classification_head.num_classes == 3
