import contextlib
import functools
import io
import json
import types

import lightning as L
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from detmix.datasets.coco.folder import CocoFolder
from detmix.losses import weight_losses
from detmix.mixing.plan import Mix
from detmix.training.build import build_detector
from detmix.training.module import COCO_FIGURES, DetectorModule, NonFiniteLossError, lr_share
from detmix.training.records import read_record

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


def nan_batch():
    """A batch that makes the loss NaN, and the statistics of batch norms too."""
    images, targets = batch()
    images[0][0, 0, 0] = float("nan")
    return images, [target | {"image_id": 7 + i} for i, target in enumerate(targets)]


class Batches(torch.utils.data.Dataset):
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def fit(module, batches, tmp_path, **options):
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    loader = torch.utils.data.DataLoader(Batches(batches), batch_size=None)
    trainer.fit(module, loader)
    return trainer


TRAINED = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*batch_size.*"),
]


def with_marks(function):
    return functools.reduce(lambda marked, mark: mark(marked), TRAINED, function)


@with_marks
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(tmp_path):
    with pytest.raises(
        NonFiniteLossError, match=r"not finite at step 1, images \[7, 8\]: .*nan; see .*step_1_rank_0.json"
    ):
        fit(make(), [batch(), nan_batch()], tmp_path)
    assert read_record(tmp_path / "nonfinite/step_1_rank_0.json") == ([7, 8], [Mix(), Mix()])


@with_marks
def test_a_skipped_batch_leaves_no_trace(tmp_path):
    options = {"on_nonfinite": "skip", "optimizer": "AdamW", "lr": 0.01, "warmup_steps": 0, "schedule": "multistep"}
    module, wanted = make(**options), make(**options)
    with pytest.warns(UserWarning, match=r"The loss is not finite at step 1, images \[7, 8\].*The batch is skipped"):
        fit(module, [batch(), nan_batch(), batch(0.5)], tmp_path)
    fit(wanted, [batch(), batch(0.5)], tmp_path)
    assert module.skipped == 1
    assert all(
        torch.equal(value, wanted.state_dict()[key])
        for key, value in module.state_dict().items()
        if "num_batches_tracked" not in key
    )


@with_marks
def test_of_accumulated_batches_the_finite_ones_count(tmp_path):
    options = {"on_nonfinite": "skip", "lr": 0.01, "warmup_steps": 0}
    module, before = make(**options), make(**options).state_dict()
    with pytest.warns(UserWarning, match="The batch is skipped"):
        fit(module, [nan_batch(), batch()], tmp_path, accumulate_grad_batches=2)
    key = "model.head.classification_head.cls_logits.weight"
    assert not torch.equal(module.state_dict()[key], before[key])
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


@with_marks
def test_where_the_weights_are_not_finite_skipping_stops_too(tmp_path):
    module = make(on_nonfinite="skip")
    module.model.head.classification_head.cls_logits.bias.data.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="Skipping does not help: the parameters of the model are not finite"):
        fit(module, [batch()], tmp_path)


@with_marks
def test_a_batch_without_images_changes_nothing_but_the_count(tmp_path):
    module, before = make(lr=0.01, weight_decay=0.0), make().state_dict()
    trainer = fit(module, [([], [])], tmp_path)
    assert trainer.global_step == 1
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_frozen_parameters_are_not_trained():
    module = make(freeze=["backbone.body.conv1.*", "backbone.body.layer[12].*"])
    frozen = {name for name, p in module.model.named_parameters() if not p.requires_grad}
    prefixes = tuple(f"backbone.body.{name}" for name in ("conv1", "layer1", "layer2"))
    assert frozen == {name for name, _ in module.model.named_parameters() if name.startswith(prefixes)}
    with pytest.raises(
        ValueError, match=r"freeze must hold patterns of parameter names, but 'neck.\*' fits none of the .* such"
    ):
        make(freeze=["neck.*"])


@pytest.mark.parametrize("backbone", ["resnet18", "timm/mobilenetv3_small_050"])
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start")
@with_marks
def test_frozen_batch_norms_stay_as_they_were_loaded(backbone, tmp_path):
    module = make(freeze_batch_norm=True, backbone=backbone, detector="FasterRCNN", lr=0.01)
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    fit(module, [batch(), batch()], tmp_path)
    norms = {name for name, found in module.model.named_modules() if isinstance(found, nn.modules.batchnorm._BatchNorm)}
    assert len(norms) > 10
    changed = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    assert len(changed) > 10
    assert not {name for name in changed if name.rpartition(".")[0] in norms}


def test_weight_decay_may_leave_out_vectors():
    module = make(decay_vectors=False)
    module.trainer = types.SimpleNamespace(estimated_stepping_batches=100)
    decayed, others = module.configure_optimizers()["optimizer"].param_groups
    assert {p.ndim for p in others["params"]} == {1}
    assert 1 not in {p.ndim for p in decayed["params"]}
    assert (decayed["weight_decay"], others["weight_decay"]) == (1e-4, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(list(module.model.parameters()))


def test_milestones_are_shares_or_steps():
    rates = [lr_share(step, total=100, warmup=0, milestones=(0.5, 80)) for step in (49, 50, 79, 80)]
    assert rates == pytest.approx([1, 0.1, 0.1, 0.01])
