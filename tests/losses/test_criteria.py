import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from detmix import WeightedCriterion
from detmix.losses.box_weights import CheckedTargets, weigh_targets
from detmix.losses.criteria import weigh_predictions, weigh_queries
from detmix.losses.outputs import CONSTANTS

QUERIES, CLASSES = 7, 4


class Criterion(nn.Module):
    """A criterion as DETR's, written anew: each loss by name, from all outputs, by the indices of a matcher."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def loss_labels(self, outputs, targets, indices, num_boxes):
        logits = outputs["pred_logits"]
        classes = torch.full(logits.shape[:2], CLASSES)
        for row, target, (queries, boxes) in zip(classes, targets, indices, strict=True):
            row[queries] = target["labels"][boxes]
        no_object = torch.ones(CLASSES + 1)
        no_object[-1] = 0.1
        return {"loss_ce": F.cross_entropy(logits.transpose(1, 2), classes, no_object)}

    def loss_focal(self, outputs, targets, indices, num_boxes):
        logits = outputs["pred_logits"]
        hot = torch.zeros(logits.shape)
        for row, target, (queries, boxes) in zip(hot, targets, indices, strict=True):
            row[queries, target["labels"][boxes]] = 1
        loss = sigmoid_focal_loss(logits, hot, reduction="none")
        return {"loss_focal": loss.mean(1).sum() * logits.shape[1] / num_boxes}

    def loss_boxes(self, outputs, targets, indices, num_boxes):
        batch = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(indices)])
        found = outputs["pred_boxes"][batch, torch.cat([queries for queries, _ in indices])]
        wanted = torch.cat([target["boxes"][boxes] for target, (_, boxes) in zip(targets, indices, strict=True)])
        l1 = F.l1_loss(found, wanted, reduction="none").sum() / num_boxes
        corners = [box_convert(boxes, "cxcywh", "xyxy") for boxes in (found, wanted)]
        return {"loss_bbox": l1, "loss_giou": generalized_box_iou_loss(*corners).sum() / num_boxes}

    def loss_masks(self, outputs, targets, indices, num_boxes):
        batch = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(indices)])
        masks = outputs["pred_masks"][batch, torch.cat([queries for queries, _ in indices])].flatten(1)
        wanted = torch.cat([target["masks"][boxes] for target, (_, boxes) in zip(targets, indices, strict=True)])
        wanted, shown = wanted.flatten(1), masks.sigmoid()
        dice = 1 - (2 * (shown * wanted).sum(1) + 1) / (shown.sum(-1) + wanted.sum(-1) + 1)
        focal = sigmoid_focal_loss(masks, wanted, reduction="none")
        return {"loss_dice": dice.sum() / num_boxes, "loss_mask": focal.mean(1).sum() / num_boxes}

    def get_loss(self, loss, outputs, targets, indices, num_boxes):
        return getattr(self, f"loss_{loss}")(outputs, targets, indices, num_boxes)

    def forward(self, outputs, targets, indices):
        losses = {}
        for name in self.names:
            losses |= self.get_loss(name, outputs, targets, indices, num_boxes=max(1, sum(len(q) for q, _ in indices)))
        return losses


class Weighted(WeightedCriterion, Criterion):
    pass


NAMES = ["labels", "focal", "boxes", "masks"]
TERMS = ["loss_ce", "loss_focal", "loss_bbox", "loss_giou", "loss_dice", "loss_mask"]


def case(weights=None, seed=0):
    rng = torch.Generator().manual_seed(seed)
    counts = (2, 0, 3)
    outputs = {
        "pred_logits": torch.randn(3, QUERIES, CLASSES + 1, generator=rng),
        "pred_boxes": torch.rand(3, QUERIES, 4, generator=rng) * 0.4 + 0.2,
        "pred_masks": torch.randn(3, QUERIES, 5, 6, generator=rng),
    }
    targets = [
        {
            "boxes": torch.rand(n, 4, generator=rng) * 0.4 + 0.2,
            "labels": torch.randint(0, CLASSES, (n,), generator=rng),
            "masks": (torch.rand(n, 5, 6, generator=rng) > 0.5).float(),
        }
        for n in counts
    ]
    indices = [(torch.randperm(QUERIES, generator=rng)[:n].sort()[0], torch.randperm(n, generator=rng)) for n in counts]
    if weights is not None:
        for target, own in zip(targets, torch.as_tensor(weights).split(counts), strict=True):
            target["weights"] = own
    return {name: value.requires_grad_() for name, value in outputs.items()}, targets, indices


def losses_and_gradients(criterion, weights, seed=0):
    outputs, targets, indices = case(weights, seed)
    losses = criterion(outputs, targets, indices)
    gradients = torch.autograd.grad(sum(losses.values()), list(outputs.values()))
    return losses, gradients


@pytest.mark.parametrize("weights", [None, torch.ones(5)])
def test_unit_and_missing_weights_keep_every_bit(weights):
    stock, weighted = losses_and_gradients(Criterion(NAMES), None), losses_and_gradients(Weighted(NAMES), weights)
    assert list(stock[0]) == list(weighted[0]) == TERMS
    assert all(torch.equal(stock[0][name], weighted[0][name]) for name in TERMS)
    assert all(torch.equal(a, b) for a, b in zip(stock[1], weighted[1], strict=True))


def brute_force(weights):
    """Each term as the sum over objects of what it changes when its weight goes from 0 to 1, and what is left."""
    alone = lambda kept: Weighted(NAMES)(*case(kept))  # noqa: E731
    nothing = alone(torch.zeros(5))
    total = dict(nothing)
    for k, weight in enumerate(weights.tolist()):
        one = alone(F.one_hot(torch.tensor(k), 5).float())
        total = {name: total[name] + weight * (one[name] - nothing[name]) for name in TERMS}
    return total


def test_every_term_is_affine_in_the_weights_and_the_sum_over_objects():
    weights = torch.tensor([0.3, 0.0, 0.7, 1.0, 2.5])
    losses, _ = losses_and_gradients(Weighted(NAMES), weights)
    expected = brute_force(weights)
    for name in TERMS:
        torch.testing.assert_close(losses[name], expected[name])


@pytest.mark.parametrize("gone", range(5))
def test_an_object_of_weight_0_reaches_neither_its_query_nor_any_term(gone):
    weights = torch.ones(5)
    weights[gone] = 0
    outputs, targets, indices = case(weights)
    gradients = torch.autograd.grad(sum(Weighted(NAMES)(outputs, targets, indices).values()), list(outputs.values()))
    image, box = (0, gone) if gone < 2 else (2, gone - 2)
    query = indices[image][0][(indices[image][1] == box).nonzero().item()]
    assert all(not gradient[image, query].any() for gradient in gradients)
    assert all(gradient.any() for gradient in gradients)


def test_queries_matched_to_none_count_1():
    losses, gradients = losses_and_gradients(Weighted(NAMES), torch.zeros(5))
    _, stock = losses_and_gradients(Criterion(NAMES), None)
    matched = case()[2]
    for i, (queries, _) in enumerate(matched):
        free = [q for q in range(QUERIES) if q not in queries.tolist()]
        assert torch.equal(gradients[0][i, free], stock[0][i, free])
    assert not any(losses[name].detach() for name in TERMS if name not in ("loss_ce", "loss_focal"))


def test_targets_without_weights_weigh_1_among_others_with():
    outputs, targets, indices = case(torch.tensor([0.25, 0.5, 1.0, 1.0, 1.0]))
    expected = Weighted(NAMES)(outputs, targets, indices)
    del targets[2]["weights"]
    again = Weighted(NAMES)(outputs, targets, indices)
    assert all(torch.equal(expected[name], again[name]) for name in TERMS)


def test_outputs_and_targets_are_left_alone():
    outputs, targets, indices = case(torch.rand(5))
    kept = copy.deepcopy(targets)
    Weighted(NAMES)(outputs, targets, indices)
    assert all(type(value) is torch.Tensor for value in outputs.values())
    assert all(torch.equal(target[key], old[key]) for target, old in zip(targets, kept, strict=True) for key in old)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2), r"targets\[2\]\['weights'\] must hold one weight for each of 3 boxes, but is \(2,\)"),
        (torch.tensor([1.0, -1.0, 1.0]), r"targets\[2\]\['weights'\] must be finite and not negative"),
        (torch.tensor([1.0, float("nan"), 1.0]), r"targets\[2\]\['weights'\] must be finite"),
        (torch.ones(3, device="meta"), r"targets\[2\]\['weights'\] must be on cpu"),
    ],
)
def test_weights_that_are_none_are_named_by_their_target(weights, message):
    outputs, targets, indices = case()
    targets[2]["weights"] = weights
    with pytest.raises(ValueError, match=message):
        Weighted(NAMES)(outputs, targets, indices)


def test_every_matching_of_a_step_has_its_own_weights():
    outputs, targets, indices = case(torch.tensor([0.3, 0.0, 0.7, 1.0, 2.5]))
    others = [((queries + 1) % QUERIES, boxes.flip(0)) for queries, boxes in indices]
    fewer = {name: value[:, 1:] for name, value in outputs.items()}
    later = [(queries.clamp(max=QUERIES - 2), boxes) for queries, boxes in others]
    checked = CheckedTargets(targets, weigh_targets(targets))
    calls = [(outputs, indices), (outputs, others), (outputs, list(indices)), (fewer, later), (outputs, later)]
    for out, matching in calls * 2:
        for loss in ("labels", "boxes"):
            got, expected = (Weighted(NAMES).get_loss(loss, out, t, matching, 5) for t in (checked, targets))
            assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_losses_of_one_matching_share_its_weights():
    outputs, targets, indices = case(torch.rand(5))
    checked = CheckedTargets(targets, weigh_targets(targets))
    rows = weigh_queries(checked, checked.weights, indices, QUERIES)
    assert weigh_queries(checked, checked.weights, indices, QUERIES) is rows
    first, second = (weigh_predictions(outputs, checked, checked.weights, indices, CONSTANTS) for _ in range(2))
    assert first is second
    assert first["pred_boxes"].rows.base is rows.base
