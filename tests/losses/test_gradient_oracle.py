"""Weighted gradients from stock losses alone: the gradients at the outputs of a stock head, scaled row by row.

The loss of a row reads the outputs of that row only, and normalisers do not depend on the outputs. So scaling the
gradient at a row's outputs by the weight of its box gives the gradient of the weighted loss. Nothing of detmix's losses
takes part in this.
"""

import pytest
import torch

from tests.losses.tiny import COUNTS, batch, gradients, losses_on, split, tiny, weighted_copy

WEIGHTS = {
    "mixed": [0.25, 0.75, 0.5, 0.125, 0.875],
    "with zeros": [0.0, 1.0, 0.3, 0.0, 1.0],
    "above one": [3.0, 0.1, 2.5, 1.0, 0.7],
}


def rows_of(targets, matched_idxs):
    """The weight of each row, box by box."""
    rows = torch.ones(len(matched_idxs), len(matched_idxs[0]))
    for i, (target, matched) in enumerate(zip(targets, matched_idxs, strict=True)):
        for box, weight in enumerate(target["weights"].tolist()):
            rows[i, matched == box] = weight
    return rows


def scaled_gradients(model, images, targets):
    """The gradients of a stock model, scaled where they leave its loss."""
    owner = getattr(model, "head", None) if hasattr(getattr(model, "head", None), "compute_loss") else model
    stock, seen = owner.compute_loss, []

    def compute_loss(targets, head_outputs, anchors, matched_idxs):
        outputs = {name: output.detach().requires_grad_() for name, output in head_outputs.items()}
        losses = stock(targets, outputs, anchors, matched_idxs)
        sum(losses.values()).backward()
        rows = rows_of(targets, matched_idxs)
        seen.extend((head_outputs[name], output.grad * rows[..., None]) for name, output in outputs.items())
        return losses

    owner.compute_loss = compute_loss
    model.zero_grad()
    losses_on(model, images, targets)
    assert len(seen) >= 2
    torch.autograd.backward(*zip(*seen, strict=True))
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", ["retinanet", "fcos", "ssd", "ssdlite"])
def test_weighted_gradients_are_stock_gradients_scaled_row_by_row(name, kind):
    images, targets = batch(split(WEIGHTS[kind], COUNTS))
    stock = tiny(name)
    weighted = weighted_copy(stock)
    found = gradients(weighted, losses_on(weighted, images, targets))
    expected = scaled_gradients(stock, images, targets)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)
    plain_model = tiny(name)
    plain = gradients(plain_model, losses_on(plain_model, images, targets))
    assert any(not torch.allclose(plain[parameter], expected[parameter], rtol=1e-2) for parameter in expected)
