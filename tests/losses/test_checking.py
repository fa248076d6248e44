"""`check_weighting` on every detector, and on detectors that are broken on purpose."""

import copy
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import fcos
from torchvision.ops import sigmoid_focal_loss

import detmix.losses.heads as heads
from detmix.losses import check_weighting, match_weights, weight_losses, weighted
from tests.losses import tiny_transformers
from tests.losses.tiny import DETECTORS, batch, tiny


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_of_torchvision_pass(name):
    model = weight_losses(tiny(name))
    report = check_weighting(model, batch())
    assert {term.name for term in report.terms} == set(model(*batch()))
    assert all(term.one == term.stock and term.zero < term.between < term.one for term in report.terms)
    assert str(report).count("  ok") == len(report.terms)


@pytest.mark.parametrize("name", tiny_transformers.MODELS)
def test_detectors_of_transformers_pass(name):
    model = weight_losses(tiny_transformers.build(name))
    found = check_weighting(model, tiny_transformers.inputs(model, tiny_transformers.labels()))
    left = [term for term in found.terms if "bbox" in term.name or "giou" in term.name]
    assert left
    assert all(term.zero == 0 for term in left if term.one)


def test_nothing_of_a_model_changes():
    model = weight_losses(tiny("ssdlite")).eval()
    model.head.train()
    before = copy.deepcopy(model)
    model.backbone.fine.weight.grad = torch.ones_like(model.backbone.fine.weight)
    images, targets = batch(weights=[torch.rand(3), torch.rand(2), torch.rand(0)])
    state = torch.get_rng_state()
    check_weighting(model, (images, targets))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert bool((model.backbone.fine.weight.grad == 1).all())
    assert "weights" in targets[0]


def script_without_check(monkeypatch):
    """The focal loss in TorchScript, as a call in C++ that no check sees."""
    scripted = torch.jit.script(sigmoid_focal_loss)
    call = type(scripted).__call__.__wrapped__
    monkeypatch.setattr(fcos, "sigmoid_focal_loss", lambda x, y, reduction: call(scripted, x, y, 0.25, 2.0, reduction))


def leave_an_output_out(monkeypatch):
    stock = fcos.FCOSHead.compute_loss

    def compute_loss(self, targets, outputs, *args):
        plain = outputs["bbox_ctrness"].as_subclass(torch.Tensor)
        return stock(self, targets, outputs | {"bbox_ctrness": plain}, *args)

    monkeypatch.setattr(fcos.FCOSHead, "compute_loss", compute_loss)


def drop_an_index(monkeypatch):
    """The second image's boxes lose their weights between the matches and the rows."""
    stock, calls = heads.weigh_rows, []

    def weigh_rows(weights, matched_idxs):
        calls.append(0)
        rows = stock(weights, matched_idxs)
        return torch.ones_like(rows) if len(calls) % 3 == 2 else rows

    monkeypatch.setattr(heads, "weigh_rows", weigh_rows)


def apply_weights_twice(monkeypatch):
    stock = heads.weigh_rows
    monkeypatch.setattr(heads, "weigh_rows", lambda *args: stock(*args) ** 2)


def forget_the_gradient(monkeypatch):
    stock = fcos.FCOSHead.compute_loss

    def compute_loss(self, targets, outputs, *args):
        losses = stock(self, targets, outputs, *args)
        plain = {name: x.as_subclass(torch.Tensor) for name, x in outputs.items()}
        for name, loss in stock(self, targets, plain, *args).items():
            losses[name] = loss + (losses[name] - loss).detach()
        return losses

    monkeypatch.setattr(fcos.FCOSHead, "compute_loss", compute_loss)


def round_at_one(monkeypatch):
    stock = heads.weigh_rows
    monkeypatch.setattr(heads, "weigh_rows", lambda *args: stock(*args) * (1 + 1e-6))


BROKEN = {
    script_without_check: "classification ignores weights",
    leave_an_output_out: "bbox_ctrness ignores weights",
    drop_an_index: r"bbox_regression is 0\.\d+ at weights of 0, where nothing must be left of it",
    apply_weights_twice: r"bbox_regression is 0\.26\d+ at weights of 0\.5, where a line from 0 to 1 is at 0\.52",
    forget_the_gradient: "bbox_ctrness ignores weights in its gradient",
    round_at_one: r"bbox_regression is 1\.042\d+ at weights of 1, where the stock loss is 1\.042",
}


@pytest.mark.parametrize("break_it", BROKEN)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_broken_detector_fails_by_the_name_of_its_loss(break_it, monkeypatch):
    break_it(monkeypatch)
    with pytest.raises(RuntimeError, match=BROKEN[break_it]) as error:
        check_weighting(weight_losses(tiny("fcos")), batch())
    assert str(error.value).startswith("FCOS does not use target['weights']: ")
    assert "at 0.5" in str(error.value)  # the table


def test_a_replaced_head_fails():
    model = weight_losses(tiny("fcos"))
    model.head = tiny("fcos").head
    with pytest.raises(RuntimeError, match=r"head|classification ignores weights"):
        check_weighting(model, batch())


def test_a_stock_detector_fails_with_all_its_losses():
    with pytest.raises(RuntimeError) as error:
        check_weighting(tiny("fasterrcnn"), batch())
    assert str(error.value).count(" ignores weights") == 2 * 4  # in the message and in the table


def test_losses_without_weights_on_purpose_are_named():
    model = weight_losses(tiny("fcos"), terms=["bbox_regression"])
    with pytest.raises(RuntimeError, match="classification ignores weights; bbox_ctrness ignores weights"):
        check_weighting(model, batch())
    report = check_weighting(model, batch(), unweighted=["classification", "bbox_ctrness"])
    assert [term.name for term in report.terms if term.one != term.zero] == ["bbox_regression"]
    with pytest.raises(ValueError, match=r"unweighted must name losses of \['bbox_ctrness', .*but it holds 'giou'"):
        check_weighting(model, batch(), unweighted=["giou"])


def row_losses(model, given):
    images, targets = given["images"], given["targets"]
    rows = match_weights(targets[0], torch.tensor([0, -1]))
    return weighted(model(images), rows[:, None]).square().sum()


def test_losses_of_any_origin_and_any_batch_are_checked():
    given = {"images": torch.rand(2, 3), "targets": [{"boxes": torch.rand(1, 4)}]}
    linear = nn.Linear(3, 2)
    assert check_weighting(linear, given, losses=row_losses).terms[0].name == "loss"
    parts = check_weighting(linear, given, losses=lambda *x: (row_losses(*x).repeat(2), "items"), weight=0.25)
    assert [term.name for term in parts.terms] == ["loss[0]", "loss[1]"]
    assert "at 0.25" in str(parts)
    output = SimpleNamespace(loss_dict={"a": row_losses(linear, given)})
    with pytest.raises(RuntimeError, match="a ignores weights"):
        check_weighting(linear, given, losses=lambda *_: output)


def counted(model, given):
    return {"box": row_losses(model, given), "objects": torch.tensor(3.0)}


def test_a_count_needs_no_weights():
    given = {"images": torch.rand(2, 3), "targets": [{"boxes": torch.rand(1, 4)}]}
    assert [term.fault for term in check_weighting(nn.Linear(3, 2), given, losses=counted).terms] == ["", ""]


MISTAKES = [
    ({"weight": 1.0}, None, ValueError, "weight must lie between 0 and 1, but it is 1.0"),
    ({}, torch.rand(3), TypeError, "batch must be .* It is a Tensor without them"),
    ({}, {"images": 1}, TypeError, "batch must be .* It is a dict without them"),
    ({}, batch(counts=(0, 0)), ValueError, "batch must hold a box"),
    ({"losses": lambda *_: 3}, None, TypeError, "must be a tensor or a mapping of tensors, but the model returned int"),
    ({"losses": lambda *_: {"a": torch.rand(2, 2)}}, None, TypeError, r"The loss a must be a number, but .* \(2, 2\)"),
    ({"losses": lambda *_: torch.tensor(time.perf_counter())}, None, ValueError, "same when a batch is run twice"),
]


@pytest.mark.parametrize(("options", "given", "kind", "message"), MISTAKES)
def test_mistakes_are_named(options, given, kind, message):
    with pytest.raises(kind, match=message):
        check_weighting(tiny("fcos"), batch() if given is None else given, **options)


def test_dropout_draws_the_same_at_all_weights():
    def losses(model, given):
        return F.dropout(row_losses(model, given).expand(50), 0.5).sum()

    given = {"images": torch.rand(2, 3), "targets": [{"boxes": torch.rand(1, 4)}]}
    check_weighting(nn.Linear(3, 2), given, losses=losses)
