import pytest
import torch
import transformers as tf
from torch import nn

from detmix import weight_losses
from detmix.losses.loss_functions import WeightedLossFunction, weighted_criteria


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
