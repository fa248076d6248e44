"""Heads of the user's own: subclasses of torchvision's, and classes that only share their methods."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD

from detmix import weight_losses
from detmix.losses.heads import WeightedRows
from tests.losses.tiny import WEIGHTS, assert_same_bits, gradients, losses_of, split, tiny, weighted_copy


class DoubledFCOS(FCOSHead):
    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        return {name: 2 * loss for name, loss in losses.items()}


class DoubledSSD(SSD):
    def compute_loss(self, *args):
        return {name: 2 * loss for name, loss in super().compute_loss(*args).items()}


class DoubledRPN(RegionProposalNetwork):
    def compute_loss(self, *args):
        return tuple(2 * loss for loss in super().compute_loss(*args))


class DoubledRoIHeads(RoIHeads):
    def forward(self, *args):
        boxes, losses = super().forward(*args)
        return boxes, {name: 2 * loss for name, loss in losses.items()}


DOUBLED = {
    "fcos": (["head"], DoubledFCOS),
    "ssd": ([], DoubledSSD),
    "fasterrcnn": (["rpn", "roi_heads"], DoubledRPN, DoubledRoIHeads),
    "maskrcnn": (["rpn", "roi_heads"], DoubledRPN, DoubledRoIHeads),
}


@pytest.fixture(params=DOUBLED)
def doubled(request):
    """A detector, and the same with a head of subclasses that double its losses."""
    model = tiny(request.param)
    other, (names, *classes) = copy.deepcopy(model), DOUBLED[request.param]
    for owner, cls in zip([getattr(other, name) for name in names] or [other], classes, strict=True):
        owner.__class__ = cls
    return model, other


def test_subclasses_of_known_heads_are_weighted(doubled):
    model, other = doubled
    stock = losses_of(other)
    assert_same_bits(stock, {name: 2 * loss for name, loss in losses_of(model).items()})
    weight_losses(other)
    unit = losses_of(other, split(torch.ones(5)))
    assert_same_bits(unit, stock)
    expected = losses_of(weighted_copy(model), WEIGHTS)
    assert_same_bits(losses_of(other, WEIGHTS), {name: 2 * loss for name, loss in expected.items()})


def test_weighted_subclasses_can_be_pickled_and_copied(doubled):
    model = weight_losses(doubled[1])
    expected = losses_of(model, WEIGHTS)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        assert_same_bits(losses_of(twin, WEIGHTS), expected)


class PlainHead(nn.Module):
    """A dense head of another origin: no class of torchvision."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(4, 3)
        self.extra = None

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs, extra=0.0):
        self.extra = extra
        losses = head_outputs["cls_logits"].exp().sum((1, 2)) + head_outputs["depth"].abs().sum(1)
        return {"own": losses.mean()}


class OwnHead(WeightedRows, PlainHead):
    pass


def test_a_head_of_another_origin_is_weighted_by_the_mixin():
    head = OwnHead()
    outputs = {"cls_logits": torch.randn(2, 5, 3), "depth": torch.randn(2, 5)}
    weights = [torch.tensor([0.25, 3.0]), torch.ones(0)]
    targets = [{"boxes": torch.rand(len(w), 4), "labels": torch.ones(len(w)).long(), "weights": w} for w in weights]
    matched = [torch.tensor([1, -1, 0, 0, -2]), torch.full((5,), -1)]
    rows = torch.tensor([[3.0, 1.0, 0.25, 0.25, 1.0], [1.0] * 5])
    per_row = outputs["cls_logits"].exp().sum(-1) + outputs["depth"].abs()
    for args, options in (((7.0,), {}), ((), {"extra": 7.0})):
        got = head.compute_loss(targets, outputs, [], matched, *args, **options)
        torch.testing.assert_close(got["own"], (rows * per_row).sum() / 2)
        assert head.extra == 7.0
        assert weight_losses(nn.Sequential(head))[0] is head  # it is known as a head, and stays what it is
        assert type(head) is OwnHead


class ChoosingRPN(RegionProposalNetwork):
    def assign_targets_to_anchors(self, anchors, targets):
        large = [{**t, "boxes": t["boxes"][(t["boxes"][:, 2:] - t["boxes"][:, :2]).amin(1) >= 0]} for t in targets]
        return super().assign_targets_to_anchors(anchors, large)


def test_boxes_may_be_chosen_by_a_mask_before_they_are_gathered():
    model, other = tiny("fasterrcnn"), tiny("fasterrcnn")
    other.rpn.__class__ = ChoosingRPN
    assert_same_bits(losses_of(weight_losses(other), WEIGHTS), losses_of(weight_losses(model), WEIGHTS))


class CopyingRPN(RegionProposalNetwork):
    def assign_targets_to_anchors(self, anchors, targets):
        targets = [{**target, "boxes": target["boxes"].clone()} for target in targets]
        return super().assign_targets_to_anchors(anchors, targets)


def test_boxes_that_lose_their_weights_before_they_are_gathered_raise():
    model = tiny("fasterrcnn")
    model.rpn.__class__ = CopyingRPN
    with pytest.raises(NotImplementedError, match=r"boxes of targets\[0\] lost their weights: WeightedCopyingRPN does"):
        losses_of(weight_losses(model), WEIGHTS)


def test_gradients_of_a_subclass_follow(doubled):
    model, other = doubled
    expected = gradients(model := weighted_copy(model), losses_of(model, WEIGHTS))
    got = gradients(other, losses_of(weight_losses(other), WEIGHTS))
    for name, grad in expected.items():
        assert (grad is None) == (got[name] is None)
        if grad is not None:
            torch.testing.assert_close(got[name], 2 * grad)
