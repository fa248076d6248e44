"""The two halves together, on torchvision's own builders."""

import copy

import pytest
import torch
from torchvision import models, tv_tensors

import detmix
from tests.conftest import make_sample

DETECTORS = {
    "retinanet_resnet50_fpn": {"min_size": 96, "max_size": 128},
    "fcos_resnet50_fpn": {"min_size": 96, "max_size": 128},
    "ssd300_vgg16": {},
    "ssdlite320_mobilenet_v3_large": {},
    "fasterrcnn_resnet50_fpn": {"min_size": 96, "max_size": 128},
    "maskrcnn_resnet50_fpn": {"min_size": 96, "max_size": 128},
    "keypointrcnn_resnet50_fpn": {"min_size": 96, "max_size": 128, "num_keypoints": 3},
}
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("name", DETECTORS)]


def build(name):
    torch.manual_seed(0)
    return models.get_model(name, weights=None, weights_backbone=None, num_classes=4, **DETECTORS[name]).train()


def batch():
    samples = [make_sample(n, size, seed=n) for n, size in ((3, (96, 128)), (0, (90, 70)), (2, (80, 120)))]
    return [image.float() / 255 for image, _ in samples], [target for _, target in samples]


def losses_and_gradients(model, images, targets):
    torch.manual_seed(1)  # of samplers and dropout
    losses = model(images, targets)
    model.zero_grad()
    sum(losses.values()).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()} | gradients


def assert_same_bits(results, expected):
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


def test_unit_and_missing_weights_keep_every_bit_of_losses_and_gradients(name):
    images, targets = batch()
    stock = build(name)
    model = detmix.weight_losses(copy.deepcopy(stock))
    expected = losses_and_gradients(stock, images, targets)
    assert_same_bits(losses_and_gradients(model, images, targets), expected)
    for target in targets:
        target["weights"] = torch.ones(len(target["boxes"]))
    assert_same_bits(losses_and_gradients(model, images, targets), expected)


def test_a_mixed_batch_of_tv_tensors_gives_the_losses_of_plain_tensors(name):
    images, targets = detmix.MixUp()(*batch())
    plain = [
        {k: v.as_subclass(torch.Tensor) if isinstance(v, torch.Tensor) else v for k, v in t.items()} for t in targets
    ]
    assert isinstance(targets[0]["boxes"], tv_tensors.BoundingBoxes)
    model = detmix.weight_losses(build(name))
    mixed = losses_and_gradients(copy.deepcopy(model), images, targets)
    assert_same_bits(
        mixed, losses_and_gradients(copy.deepcopy(model), [i.as_subclass(torch.Tensor) for i in images], plain)
    )
    unweighted = [{k: v for k, v in target.items() if k != "weights"} for target in plain]
    stock = losses_and_gradients(model, images, unweighted)
    assert all(mixed[term] < stock[term] for term in stock if not term.startswith("gradient"))
