import pytest
import torch
import transformers as tf
from torch import nn
from transformers.loss.loss_for_object_detection import ImageLoss, center_to_corners_format, generalized_box_iou

from detmix import weight_losses
from detmix.losses import WeightedTensor, weighted
from detmix.losses.options import DEFAULT
from detmix.losses.transformers import (
    WeightedLossFunction,
    by_row,
    rebound,
    weighted_criteria,
    weighted_criterion,
)


def test_a_model_without_a_criterion_is_named():
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    with pytest.raises(
        TypeError, match=r"ResNetForImageClassification holds none of the heads .* criterion with get_l"
    ):
        weight_losses(tf.ResNetForImageClassification(config))


class L1(nn.Module):
    def get_loss(self, loss, outputs, targets, indices, num_boxes):
        return {"l1": outputs["pred_boxes"].abs().sum() / num_boxes}


def loss_function(outputs, labels, num_boxes=4, *, factor=10.0):
    queries = torch.arange(len(labels[0]["boxes"]))
    losses = L1().get_loss("boxes", outputs, labels, [(queries, queries)], num_boxes)
    return factor * losses["l1"], losses


def test_a_loss_function_keeps_its_defaults():
    label = {"boxes": torch.zeros(2, 4), "weights": torch.tensor([0.25, 0.5])}
    loss, _ = WeightedLossFunction(loss_function)({"pred_boxes": torch.ones(1, 3, 4)}, [label])
    assert float(loss) == 10 * 4 * (0.25 + 0.5 + 1) / 4


def test_a_closure_whose_names_cannot_be_bound_is_not_taken_for_one():
    criterion = L1()

    def closure(outputs):
        return criterion, L1

    assert weighted_criteria(loss_function).keys() == {"L1"}
    assert weighted_criteria(closure) == weighted_criteria(criterion) == {}


def test_other_modules_are_not_asked_for_their_loss(monkeypatch):
    def asked(self):
        raise AssertionError

    stranger = nn.Linear(2, 2)
    stranger.loss_type = "ForObjectDetection"
    backbone = tf.ResNetModel(tf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"))
    monkeypatch.setattr(tf.PreTrainedModel, "loss_function", property(asked))
    with pytest.raises(TypeError, match="Sequential holds none of the heads"):
        weight_losses(nn.Sequential(stranger, backbone))


def test_the_weighted_class_of_a_criterion_is_made_once():
    assert (
        weighted_criteria(loss_function)["L1"]
        is weighted_criteria(loss_function)["L1"]
        is weighted_criterion(L1, DEFAULT)
    )
    assert WeightedLossFunction(loss_function).function is loss_function


def test_a_rebound_function_keeps_everything_but_the_names():
    def function(a, b=2, *, c=3):
        return a, b, c, len([0])

    new = rebound(function, {"len": sum})
    assert new(1) == (1, 2, 3, 0)
    assert function(1) == (1, 2, 3, 1)
    assert (new.__name__, new.__defaults__, new.__kwdefaults__) == ("function", (2,), {"c": 3})
    assert "len" not in function.__globals__


# ---- functions that are told to work row by row ----

BOXES = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.6, 0.4, 0.2], [0.4, 0.4, 0.6, 0.6]])
ROWS = torch.tensor([[0.5], [0.0], [2.0]])


def scaled(x, *others):
    """Stock code that leaves a note of whether weights are followed in it."""
    out = x * 2 if not others else x * others[0]
    scaled.followed = type(out) is WeightedTensor
    return (out, x.sum(1, keepdim=True)) if others else out


@pytest.mark.parametrize("others", [(), (BOXES,)], ids=["alone", "tuple"])
def test_row_by_row_a_result_is_that_of_riding_through_the_function(others):
    x = weighted(BOXES, ROWS)
    expected, got = scaled(x, *others), by_row(scaled)(x, *others)
    assert not scaled.followed
    for one, other in zip(*([out] if not others else out for out in (expected, got)), strict=True):
        assert type(one) is type(other) is WeightedTensor
        assert torch.equal(one.as_subclass(torch.Tensor), other.as_subclass(torch.Tensor))
        assert torch.equal(one.weights.expand(one.shape), other.weights.expand(other.shape))


@pytest.mark.parametrize(
    ("x", "others"),
    [
        (weighted(BOXES, ROWS[:, 0].repeat(2)[:4]), ()),
        (weighted(BOXES, ROWS.expand(3, 4)), ()),
        (weighted(BOXES, ROWS), (weighted(BOXES, ROWS),)),
        (BOXES, (weighted(BOXES, ROWS),)),
    ],
    ids=["last_dim", "every_entry", "both", "second"],
)
def test_other_weights_ride_through_the_function(x, others):
    by_row(scaled)(x, *others)
    assert scaled.followed


def test_criteria_find_row_functions_and_their_results_agree_with_riding_through_them():
    names = weighted_criterion(ImageLoss, DEFAULT).loss_boxes.__globals__
    assert (
        names["generalized_box_iou"]
        is not generalized_box_iou
        is ImageLoss.loss_boxes.__globals__["generalized_box_iou"]
    )
    x = weighted(BOXES, ROWS)
    others = center_to_corners_format(BOXES).flip(0)
    got = names["generalized_box_iou"](names["center_to_corners_format"](x), others).diag()
    expected = generalized_box_iou(center_to_corners_format(x), others).diag()
    assert torch.equal(got.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
    assert torch.equal(got.weights, ROWS[:, 0])
    assert torch.equal(expected.weights, ROWS[:, 0])
