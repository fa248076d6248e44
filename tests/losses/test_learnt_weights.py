"""Weights that are learnt: their gradients, against finite differences of the losses of whole detectors."""

import pytest
import torch
import torch.nn.functional as F

from detmix.losses import weighted
from tests.losses.tiny import losses_of, split, tiny, weighted_copy

WEIGHTS = torch.tensor([0.3, 0.8, 1.7, 0.9, 0.4])


@pytest.mark.parametrize("name", ["retinanet", "fcos", "ssd", "fasterrcnn", "maskrcnn", "keypointrcnn"])
def test_learnt_weights_have_the_gradients_of_the_loss(name):
    model = weighted_copy(tiny(name))

    def total(weights):
        return sum(losses_of(model, split(weights)).values())

    weights = WEIGHTS.clone().requires_grad_()
    (found,) = torch.autograd.grad(total(weights), weights)
    with torch.no_grad():
        steps = 0.25 * torch.eye(len(WEIGHTS))  # a loss is affine in the weights
        expected = torch.stack([(total(WEIGHTS + step) - total(WEIGHTS - step)) / 0.5 for step in steps])
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(
    "loss",
    [
        F.binary_cross_entropy_with_logits,
        lambda x, y, **kw: F.binary_cross_entropy(x.sigmoid(), y, **kw),
        lambda x, y, **kw: F.binary_cross_entropy_with_logits(x, y, torch.tensor([1.0, 2.0, 3.0]), **kw),
        F.mse_loss,
        lambda x, y, **kw: F.cross_entropy(x, y.argmax(1), **kw),
        lambda x, y, **kw: F.cross_entropy(x, y, **kw),
    ],
)
def test_learnt_weights_have_the_gradients_of_a_loss_function(loss, reduction):
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(4, 3, generator=rng).double().requires_grad_(), torch.rand(4, 3, generator=rng).double()
    weights = torch.rand(4, 1, generator=rng).double().requires_grad_()

    def total(x, weights):
        out = loss(weighted(x, weights), y, reduction=reduction)
        return out.sum() if reduction == "none" else out

    assert torch.autograd.gradcheck(total, (x, weights))
