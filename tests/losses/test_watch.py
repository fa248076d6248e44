"""Heads and loss functions that are replaced in a weighted model, labels that count from 0, and TorchScript."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.fcos import FCOSHead

from detmix import WeightedCriterion, weight_losses
from detmix.losses.heads import WeightedRows
from detmix.losses.watch import HeadWatch
from tests.losses.tiny import (
    CLASSES,
    EVERY,
    ONES,
    WEIGHTS,
    assert_same_bits,
    batch,
    gradients,
    losses_of,
    losses_on,
    split,
    tiny,
    weighted_copy,
)
from tests.losses.tiny_transformers import build, forward

HEADS = {"retinanet": "head", "fcos": "head", "fasterrcnn": "roi_heads", "maskrcnn": "rpn"}


@pytest.mark.parametrize("name", HEADS)
def test_a_replaced_head_is_named_at_the_next_step_with_weights(name):
    stock, attribute = tiny(name), HEADS[name]
    model = weighted_copy(stock)
    expected = losses_of(model, WEIGHTS)
    setattr(model, attribute, copy.deepcopy(getattr(stock, attribute)))
    head = type(getattr(stock, attribute)).__name__
    message = (
        rf"{attribute} of {type(stock).__name__} was a Weighted{head} and is now a {head}, .*weight_losses\(model\)"
    )
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match=message):
            losses_of(other, WEIGHTS)
        assert_same_bits(losses_of(other), losses_of(stock))
        other.eval()(*batch(WEIGHTS))
        assert_same_bits(losses_of(weight_losses(other.train()), WEIGHTS), expected)


def test_a_replaced_head_is_named_where_targets_come_by_name():
    model = weight_losses(tiny("fcos"))
    model.head = FCOSHead(32, 1, CLASSES)
    images, targets = batch(WEIGHTS)
    with pytest.raises(RuntimeError, match="head of FCOS was a WeightedFCOSHead and is now a FCOSHead"):
        model(images, targets=tuple(targets))
    model.head = None
    with pytest.raises(RuntimeError, match="head of FCOS was a WeightedFCOSHead and is now a NoneType"):
        model(images, targets)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        return self.model(*args)


@pytest.mark.parametrize("wrap", [Wrapper, lambda model: Wrapper(Wrapper(model))])
def test_a_detector_that_is_its_own_head_is_named_in_its_wrapper(wrap):
    outer = weight_losses(wrap(tiny("ssd")))
    inner = outer.model if isinstance(outer.model, Wrapper) else outer
    inner.model = tiny("ssd")
    with pytest.raises(RuntimeError, match="model of Wrapper was a WeightedSSD and is now a SSD"):
        losses_of(outer, WEIGHTS)


def test_a_head_replaced_in_a_wrapped_detector_is_named():
    outer = weight_losses(Wrapper(tiny("retinanet")))
    outer.model.head = copy.deepcopy(tiny("retinanet").head)
    with pytest.raises(RuntimeError, match="head of RetinaNet was a WeightedRetinaNetHead"):
        losses_of(outer, WEIGHTS)


def test_parts_of_a_head_and_a_weighted_head_may_be_replaced():
    model = weight_losses(tiny("fasterrcnn"))
    model.roi_heads.box_predictor = FastRCNNPredictor(64, CLASSES)
    model.rpn = copy.deepcopy(model.rpn)
    zero = losses_of(model, split(torch.zeros(5)))
    assert not zero["loss_box_reg"]
    assert losses_of(model, ONES)["loss_box_reg"]

    class Own(WeightedRows, FCOSHead):
        pass

    model = weight_losses(tiny("fcos"))
    model.head = Own(32, 1, CLASSES)
    assert losses_of(model, WEIGHTS) != losses_of(model, ONES)


@pytest.mark.parametrize("name", EVERY)
def test_calls_again_and_state_dicts_leave_one_watch(name):
    stock = tiny(name)
    model = weight_losses(weight_losses(weighted_copy(stock)), per_image=True)
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    assert sum(isinstance(hook, HeadWatch) for hook in hooks) == (name not in ("ssd", "ssdlite"))
    assert model.state_dict().keys() == stock.state_dict().keys()
    loaded = pickle.loads(pickle.dumps(model))
    assert_same_bits(losses_of(loaded, WEIGHTS), losses_of(model, WEIGHTS))


def test_a_head_that_no_module_owns_is_weighted():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = nn.ModuleList([nn.ModuleDict({"head": tiny("fcos").head})])

    holder = weight_losses(Holder())
    assert type(holder.held[0]["head"]).__name__ == "WeightedFCOSHead"
    assert type(weight_losses(tiny("fcos").head)).__name__ == "WeightedFCOSHead"


class Own(WeightedCriterion, nn.Module):
    pass


def stock_function(*args, **kwargs):
    raise AssertionError


def own_function(*args, **kwargs):
    raise LookupError(Own)


def test_a_replaced_loss_function_of_transformers_is_named_with_weights():
    model = weight_losses(build("DetrForObjectDetection"))
    model.loss_function = stock_function
    message = "loss_function of DetrForObjectDetection was a WeightedLossFunction and is now a stock_function"
    for mode in (True, False):
        with pytest.raises(RuntimeError, match=message):
            forward(model.train(mode), torch.ones(5))
    with pytest.raises(AssertionError):
        forward(model)
    model.loss_function = own_function
    with pytest.raises(LookupError):  # it was called: it names a weighted criterion
        forward(model, torch.ones(5))


# ---- labels from 0 ----


def labelled(weights, *first):
    images, targets = batch(weights)
    targets[0]["labels"][: len(first)] = torch.tensor(first)
    return images, targets


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_labels_count_from_0_where_no_class_is_the_background(name):
    stock = tiny(name)
    model = weighted_copy(stock)
    expected = losses_on(stock, *labelled(None, 0, 0))
    grads = gradients(stock, expected)
    for weights in (None, ONES):
        got = losses_on(model, *labelled(weights, 0, 0))
        assert_same_bits(got, expected)
        assert_same_bits(gradients(model, got), grads)
    at = lambda *w: losses_on(model, *labelled(split([*w, 1.0, 1.0, 1.0]), 0, 0))  # noqa: E731
    none, first, second, both = (at(*w) for w in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)))
    for term in expected:
        assert first[term] != none[term] != second[term]
        torch.testing.assert_close(first[term] + second[term], none[term] + both[term])
        torch.testing.assert_close(
            at(0.25, 0.5)[term], none[term] + 0.25 * (first[term] - none[term]) + 0.5 * (second[term] - none[term])
        )


@pytest.mark.parametrize("name", ["ssd", "fasterrcnn", "maskrcnn"])
def test_a_label_of_0_is_refused_with_weights_where_it_is_the_background(name):
    stock = tiny(name)
    model = weighted_copy(stock)
    assert_same_bits(losses_on(model, *labelled(None, 0)), losses_on(stock, *labelled(None, 0)))
    with pytest.raises(
        ValueError, match=r"label 0 of targets\[0\] must be a class from 1 to 3 \(0 is background\), .* is 0"
    ):
        losses_on(model, *labelled(WEIGHTS, 0))
    partly = [None, *WEIGHTS[1:]]  # the target with label 0 has no weight to lose
    assert losses_on(model, *labelled(partly, 0))


@pytest.mark.parametrize("name", ["fcos", "fasterrcnn"])
def test_labels_below_0_are_for_stock_code_without_weights(name):
    stock = tiny(name)
    model = weighted_copy(stock)
    assert_same_bits(losses_on(model, *labelled(None, -1)), losses_on(stock, *labelled(None, -1)))
    with pytest.raises(ValueError, match=r"label 0 of targets\[0\] must be a class from .* but it is -1"):
        losses_on(model, *labelled(WEIGHTS, -1))


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["without", "with"])
@pytest.mark.parametrize("name", ["retinanet", "fcos", "ssd", "fasterrcnn"])
def test_labels_that_no_class_has_are_named(name, weights):
    with pytest.raises(ValueError, match=r"label 1 of targets\[0\] must be a class .*to 3.* but it is 4"):
        losses_on(weight_losses(tiny(name)), *labelled(weights, 1, CLASSES))


# ---- TorchScript ----


# torch's own notice
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
@pytest.mark.parametrize("name", ["retinanet", "fcos", "ssd", "fasterrcnn"])
def test_a_weighted_model_is_refused_by_torchscript(name):
    model = weight_losses(tiny(name)).eval()
    for module in (model, Wrapper(model)):
        with pytest.raises(
            TypeError, match=r"Weighted\w+ is weighted and cannot be converted to TorchScript.*state_dict"
        ):
            torch.jit.script(module)
