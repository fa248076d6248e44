import contextlib
import io
import json
import types

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detmix.datasets.coco import CocoFolder
from detmix.losses import weight_losses
from detmix.training.detectors import build_detector
from detmix.training.module import COCO_FIGURES, DetectorModule

SMALL = {"detector": "FCOS", "backbone": "resnet18", "fpn_channels": 32, "options": {"min_size": 64, "max_size": 64}}


def make(**options):
    torch.manual_seed(0)
    return DetectorModule(num_classes=4, class_names=["circle", "square", "triangle"], **{**SMALL, **options})


def logged(module, monkeypatch):
    """The figures a module logs, caught as they are logged."""
    figures = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: figures.update({name: float(value)}))
    monkeypatch.setattr(
        module, "log_dict", lambda values, **_: figures.update({k: float(v) for k, v in values.items()})
    )
    return figures


def batch(weights=None):
    torch.manual_seed(1)
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([2])} for _ in range(2)]
    if weights is not None:
        targets = [target | {"weights": torch.tensor([weights])} for target in targets]
    return [torch.rand(3, 64, 64) for _ in targets], targets


def test_every_loss_term_is_logged_and_the_loss_is_their_sum(monkeypatch):
    module = make()
    figures = logged(module, monkeypatch)
    loss = module.training_step(batch(), 0)
    terms = {"train/classification", "train/bbox_regression", "train/bbox_ctrness"}
    assert figures.keys() == terms | {"train/loss"}
    assert sum(figures[term] for term in terms) == pytest.approx(loss.item())
    assert loss.requires_grad


@pytest.mark.parametrize("weighted", [True, False])
def test_weights_count_if_the_losses_are_weighted(weighted, monkeypatch):
    module = make(weighted=weighted)
    logged(module, monkeypatch)
    full, none = module.training_step(batch(1.0), 0), module.training_step(batch(0.0), 0)
    assert (none < full) if weighted else (none == full)


def test_the_twelve_figures_and_class_aps_are_those_of_pycocotools(shapes, monkeypatch):
    data = CocoFolder(shapes, "annotations/instances_train.json", crowd=True)
    module = make()
    figures = logged(module, monkeypatch)
    samples, records = [data[i] for i in range(len(data))], []
    for index, (_, target) in enumerate(samples):
        rng = torch.Generator().manual_seed(index)
        boxes = target["boxes"].as_subclass(torch.Tensor)
        wrong = torch.randint(1, 4, (len(boxes),), generator=rng)
        prediction = {
            "boxes": boxes + torch.rand(boxes.shape, generator=rng) * 6,
            "labels": torch.where(torch.rand(len(boxes), generator=rng) < 0.7, target["labels"], wrong),
            "scores": torch.rand(len(boxes), generator=rng),
        }
        records += data.to_coco(target["image_id"], prediction)
        monkeypatch.setattr(module.model, "forward", lambda _, prediction=prediction: [prediction])
        module.validation_step(([samples[index][0]], [target]), index)
    module.on_validation_epoch_end()

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(shapes / "annotations/instances_train.json")
        evaluation = COCOeval(truth, truth.loadRes(records), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    for name, expected in zip(COCO_FIGURES, evaluation.stats, strict=True):
        assert figures[f"val/{name}"] == pytest.approx(expected, abs=1e-6), name
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # IoUs x recalls x classes
    for k, name in enumerate(data.class_names):
        assert figures[f"val/AP/{name}"] == pytest.approx(precision[:, :, k].mean(), abs=1e-6), name
    assert 0.05 < figures["val/AP"] < 0.95


@pytest.mark.parametrize(("schedule", "expected"), [("cosine", [1.0, 0.5, 0.0]), ("multistep", [1.0, 0.1, 0.01])])
def test_the_learning_rate_rises_and_falls_as_told(schedule, expected):
    module = make(lr=0.1, warmup_steps=10, schedule=schedule, milestones=(0.5, 0.8))
    module._trainer = types.SimpleNamespace(estimated_stepping_batches=110)
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(111):
        rates.append(optimizer.param_groups[0]["lr"] / 0.1)
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.001)
    assert rates[5] == pytest.approx(0.5005)
    assert rates[10] == pytest.approx(expected[0])
    assert rates[60] == pytest.approx(expected[1], abs=1e-6)
    assert rates[110] == pytest.approx(expected[2], abs=1e-6)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_optimizer_trains_what_needs_gradients(optimizer):
    module = make(optimizer=optimizer)
    module._trainer = types.SimpleNamespace(estimated_stepping_batches=10)
    for parameter in module.model.backbone.parameters():
        parameter.requires_grad_(False)
    built = module.configure_optimizers()["optimizer"]
    assert type(built).__name__ == optimizer
    assert {id(p) for p in built.param_groups[0]["params"]} == {id(p) for p in module.model.head.parameters()}


def test_masks_are_judged_for_mask_rcnn(monkeypatch):
    module = make(detector="MaskRCNN")
    figures = logged(module, monkeypatch)
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 10:40, 10:40] = 1
    target = {"boxes": torch.tensor([[10.0, 10, 40, 40]]), "labels": torch.tensor([1]), "masks": mask}
    prediction = {**target, "scores": torch.tensor([0.9]), "masks": mask[:, None] * 0.9}
    monkeypatch.setattr(module.model, "forward", lambda _: [prediction])
    module.validation_step(([torch.rand(3, 64, 64)], [target]), 0)
    module.on_validation_epoch_end()
    assert figures["val/AP"] == figures["val/segm_AP"] == pytest.approx(1)


def test_its_state_dict_is_that_of_the_plain_torchvision_model():
    module = make()
    state = {key.removeprefix("model."): value for key, value in module.state_dict().items()}
    plain = build_detector("FCOS", 4, backbone="resnet18", fpn_channels=32)
    plain.load_state_dict(state, strict=True)
    assert type(plain.head) is not type(module.model.head)
    assert type(weight_losses(plain).head) is type(module.model.head)


def test_hyperparameters_are_plain_enough_for_a_safe_checkpoint():
    json.dumps(dict(make().hparams))
