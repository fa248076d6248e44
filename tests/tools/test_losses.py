from unittest import mock

import pytest
import torch
from sections import losses
from torch import nn
from transformers.models.rt_detr.modeling_rt_detr import get_contrastive_denoising_training_group

from tests.conftest import DEVICES, assert_same

NAMES = list(losses.SECTION.cases)


def seeded(function):
    torch.manual_seed(0)
    return function()


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("RetinaNet", {"size": (640, 640)}, "2 x 76,725 anchors x 91 classes"),
        ("FasterRCNN", {"size": (800, 1344)}, "2 x 268,569 anchors, 2 x 512 proposals x 91 classes"),
        (
            "RTDetr",
            {"decoder_layers": 6, "num_queries": 300, "num_denoising": 100},
            "8 x (300 + 192 denoising) queries x 80 classes, 6 layers + encoder",
        ),
    ],
)
def test_sizes_are_those_of_what_is_computed(name, options, sizes, build):
    assert build(losses, name, **options).sizes == f"{sizes}, 16 boxes an image"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_stock_and_weighted_differ_by_the_weights_alone(name, device, build):
    runs = build(losses, name, device).runs
    model, _ = runs["stock"].args
    held = [*model.modules(), getattr(model, "loss_function", None)]
    assert not any(type(part).__module__.startswith("detmix") for part in held)
    stock = seeded(runs["stock"])
    assert torch.isfinite(stock)
    assert seeded(runs["weighted"]) < stock
    _, targets = runs["weighted"].args
    for target in targets:
        target["weights"].fill_(1)
    assert torch.equal(seeded(runs["weighted"]), stock)


def test_denoising_queries_are_those_of_the_model(build):
    run = build(losses, "RTDetr").runs["stock"]
    model, labels = run.args
    loss, config = model.loss_function, model.config
    model.loss_function = mock.Mock(side_effect=loss)
    run()
    given = model.loss_function.call_args.kwargs["denoising_meta_values"]
    embed = nn.Embedding(config.num_labels + 1, 4)
    *_, made = get_contrastive_denoising_training_group(
        labels, config.num_labels, config.num_queries, embed, config.num_denoising
    )
    assert_same(given, {**made, "dn_positive_idx": list(made["dn_positive_idx"])})


@pytest.mark.parametrize("name", NAMES)
def test_losses_run_backward_to_every_output(name, build, monkeypatch):
    gradients = []
    grad = torch.autograd.grad
    monkeypatch.setattr("torch.autograd.grad", lambda *args: gradients.append(grad(*args)))
    for run in build(losses, name).runs.values():
        seeded(run)
    for one, other in zip(*gradients, strict=True):
        assert one.any()
        assert not torch.equal(one, other)
