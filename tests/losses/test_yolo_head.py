"""A head that detmix does not know, of YOLO's kind, weighted with its public pieces: a recipe, and what it promises.

A cell of the grid is predicted once per anchor. Its objectness is learned whether or not a box is matched to it; its
class and its place are learned once for each box matched to it, of which there may be several.
"""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, complete_box_iou_loss

from detmix import MixUp
from detmix.losses import match_weights, weighted
from tests.conftest import make_sample

ANCHORS = torch.tensor([[0.2, 0.3], [0.5, 0.4]])
CLASSES, SHAPE = 3, (3, len(ANCHORS), 4, 5)  # images, anchors, rows, columns


# ---- the stock loss: targets of shape (num_boxes, 6) hold (image, class, cx, cy, w, h), of which the last four in 0..1


def assign(targets, shape):
    """The box and the cell of each match: each anchor of about the box's size, in the cell that holds its center."""
    ratio = targets[:, None, 4:] / ANCHORS
    box, anchor = (torch.max(ratio, 1 / ratio).amax(2) < 3).nonzero(as_tuple=True)
    column, row = (targets[box, 2:4] * torch.tensor([shape[3], shape[2]])).long().T
    return box, (targets[box, 0].long(), anchor, row, column)


def terms(objectness, found, cells, wanted):
    """The losses, by the objectness of all cells, and predictions and targets of the matches."""
    corner = torch.stack([cells[3], cells[2]], 1)
    center = (corner + 2 * found[:, :2].sigmoid() - 0.5) / torch.tensor([objectness.shape[3], objectness.shape[2]])
    size = (2 * found[:, 2:4].sigmoid()) ** 2 * ANCHORS[cells[1]]
    ciou = complete_box_iou_loss(
        torch.cat([center - size / 2, center + size / 2], 1), box_convert(wanted[:, 2:], "cxcywh", "xyxy")
    )
    overlap = torch.zeros_like(objectness)
    overlap[cells] = 1 - ciou.detach().clamp(0, 1)
    losses = {"objectness": F.binary_cross_entropy_with_logits(objectness, overlap)}
    if len(wanted):
        classes = torch.zeros_like(found[:, 5:])
        classes[range(len(wanted)), wanted[:, 1].long()] = 1.0
        losses["class"] = F.binary_cross_entropy_with_logits(found[:, 5:], classes)
        losses["box"] = ciou.mean()
    return losses


def stock_losses(predictions, targets):
    box, cells = assign(targets, predictions.shape)
    return terms(predictions[..., 4], predictions[cells], cells, targets[box])


# ---- the same, weighted ----


def cell_weights(shape, cells, own):
    """What the heaviest box on each cell weighs; 1 for a cell without."""
    rows = torch.ones(shape)
    places = torch.arange(rows.numel()).view(shape)[cells]
    return rows.view(-1).scatter_reduce(0, places, own, "amax", include_self=False).view(shape)


def weighted_losses(predictions, targets, weights):
    weights, order = weights.sort(stable=True)  # of the boxes on one cell, the heaviest is to write its objectness
    targets = targets[order]
    box, cells = assign(targets, predictions.shape)
    rows = cell_weights(predictions.shape[:4], cells, weights[box])
    found = weighted(predictions[cells], weights[box, None])
    return terms(weighted(predictions[..., 4], rows), found, cells, targets[box])


def yolo_targets(targets, size):
    """The targets of a batch as one tensor, and their weights as another."""
    parts, height_width = [], torch.tensor(size)
    for i, target in enumerate(targets):
        boxes = box_convert(target["boxes"].as_subclass(torch.Tensor), "xyxy", "cxcywh") / height_width.flip(0).repeat(
            2
        )
        parts.append(torch.cat([torch.full((len(boxes), 1), i), target["labels"][:, None], boxes], 1))
    return torch.cat(parts), torch.cat([match_weights(t, torch.arange(len(t["boxes"]))) for t in targets])


# ---- what it promises ----

APART = [
    [0, 2, 0.1, 0.1, 0.3, 0.3],  # of both anchors' size
    [0, 1, 0.5, 0.4, 0.6, 0.5],
    [2, 0, 0.9, 0.9, 0.2, 0.2],
    [2, 0, 0.3, 0.6, 0.25, 0.4],
    [2, 1, 0.3, 0.1, 0.02, 0.9],  # of no anchor's size
]
SHARED = [
    [0, 2, 0.1, 0.1, 0.3, 0.3],
    [0, 1, 0.15, 0.1, 0.35, 0.3],  # the anchors of the one before
    [0, 1, 0.12, 0.2, 0.15, 0.2],  # one of them
    [2, 0, 0.3, 0.6, 0.25, 0.4],
    [2, 0, 0.3, 0.6, 0.25, 0.4],  # the same box again
]
CASES = pytest.mark.parametrize("boxes", [APART, SHARED, []], ids=["apart", "shared", "none"])
RANDOM = torch.tensor([0.3, 0.8, 0.5, 1.7, 0.9])


def predict():
    return torch.randn(*SHAPE, 5 + CLASSES, generator=torch.Generator().manual_seed(1)).requires_grad_()


def as_tensor(boxes):
    return torch.tensor(boxes).view(-1, 6)


def gradient(loss, predictions):
    return torch.autograd.grad(loss, predictions, retain_graph=True)[0]


@CASES
def test_unit_weights_keep_every_bit(boxes):
    predictions, targets = predict(), as_tensor(boxes)
    expected = stock_losses(predictions, targets)
    got = weighted_losses(predictions, targets, torch.ones(len(targets)))
    assert got.keys() == expected.keys()
    for name, loss in expected.items():
        assert type(got[name]) is torch.Tensor
        assert torch.equal(got[name], loss)
        assert torch.equal(gradient(got[name], predictions), gradient(loss, predictions))
    totals = [gradient(sum(losses.values()), predictions) for losses in (got, expected)]
    assert torch.equal(*totals)


def naive_losses(predictions, targets, weights):
    """Loops over matches and cells."""
    on_cell, sums = {}, {"objectness": 0.0, "class": 0.0, "box": 0.0}
    matches = 0
    for target, weight in zip(targets, weights, strict=True):
        for a, anchor in enumerate(ANCHORS):
            width, height = target[4:] / anchor
            if max(width, height, 1 / width, 1 / height) >= 3:
                continue
            row, column = int(target[3] * SHAPE[2]), int(target[2] * SHAPE[3])
            cell = (int(target[0]), a, row, column)
            p = predictions[cell]
            cx, cy = (column + 2 * p[0].sigmoid() - 0.5) / SHAPE[3], (row + 2 * p[1].sigmoid() - 0.5) / SHAPE[2]
            box = torch.stack([cx, cy, *((2 * p[2:4].sigmoid()) ** 2 * anchor)])
            ciou = complete_box_iou_loss(*(box_convert(b, "cxcywh", "xyxy") for b in (box, target[2:])))
            sums["box"] += weight * ciou
            for c in range(CLASSES):
                wanted = torch.tensor(float(c == target[1]))
                sums["class"] += weight * F.binary_cross_entropy_with_logits(p[5 + c], wanted) / CLASSES
            if weight >= on_cell.get(cell, (0.0, 0.0))[0]:
                on_cell[cell] = weight, 1 - ciou.detach().clamp(0, 1)
            matches += 1
    for cell in torch.cartesian_prod(*map(torch.arange, SHAPE)).tolist():
        weight, wanted = on_cell.get(tuple(cell), (1.0, torch.tensor(0.0)))
        sums["objectness"] += weight * F.binary_cross_entropy_with_logits(predictions[(*cell, 4)], wanted)
    return {"objectness": sums["objectness"] / predictions[..., 4].numel()} | {
        name: sums[name] / matches for name in ("class", "box") if matches
    }


@pytest.mark.parametrize("weights", [RANDOM, RANDOM.flip(0), torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0])], ids=str)
@CASES
def test_it_agrees_with_a_loop_over_matches_and_cells(boxes, weights):
    predictions, targets = predict(), as_tensor(boxes)
    got = weighted_losses(predictions, targets, weights[: len(targets)])
    expected = naive_losses(predictions, targets, weights[: len(targets)])
    assert got.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(got[name], loss)
        torch.testing.assert_close(gradient(got[name], predictions), gradient(loss, predictions))


def test_where_boxes_share_no_cell_wrapped_predictions_run_through_all_of_the_stock_code():
    predictions, targets = predict(), as_tensor(APART)
    box, cells = assign(targets, SHAPE)
    got = stock_losses(weighted(predictions, cell_weights(SHAPE, cells, RANDOM[box])[..., None]), targets)
    for name, loss in weighted_losses(predictions, targets, RANDOM).items():
        torch.testing.assert_close(got[name], loss)


def test_every_term_is_affine_in_the_weights_of_boxes_that_share_no_cell():
    predictions, targets = predict(), as_tensor(APART)
    mix, *ends = (
        weighted_losses(predictions, targets, w) for w in ((RANDOM + RANDOM.flip(0)) / 2, RANDOM, RANDOM.flip(0))
    )
    for name, loss in mix.items():
        assert ends[0][name] != ends[1][name]
        torch.testing.assert_close(2 * loss, ends[0][name] + ends[1][name])


@pytest.mark.parametrize("gone", range(4))
def test_a_box_of_weight_0_makes_its_cells_neither_positive_nor_negative(gone):
    predictions, targets, weights = predict(), as_tensor(APART), torch.ones(5)
    weights[gone] = 0
    got = gradient(sum(weighted_losses(predictions, targets, weights).values()), predictions)
    _, cells = assign(targets[[gone]], SHAPE)
    assert len(cells[0])
    assert not got[cells].any()
    others = torch.ones(SHAPE, dtype=torch.bool)
    others[cells] = False
    assert torch.equal(got[others], gradient(sum(stock_losses(predictions, targets).values()), predictions)[others])


def test_a_box_of_weight_0_does_not_touch_the_box_that_it_shares_a_cell_with():
    predictions, targets = predict(), as_tensor(SHARED)
    changed = targets.clone()
    changed[1, 1:] = torch.tensor([0, 0.05, 0.2, 0.25, 0.35])  # another class and box, of the same cell and anchors
    got = [weighted_losses(predictions, t, torch.tensor([0.5, 0.0, 1.0, 1.0, 1.0])) for t in (targets, changed)]
    assert all(torch.equal(loss, got[1][name]) for name, loss in got[0].items())


def test_the_order_of_boxes_on_one_cell_does_not_matter():
    predictions, targets = predict(), as_tensor(SHARED)
    cells = torch.stack(assign(targets, SHAPE)[1], 1)
    assert len(cells.unique(dim=0)) < len(cells)
    expected = weighted_losses(predictions, targets, RANDOM)
    got = weighted_losses(predictions, targets.flip(0), RANDOM.flip(0))
    for name, loss in expected.items():
        torch.testing.assert_close(got[name], loss)


def test_mixed_targets_train_it_each_box_by_its_weight():
    samples = [make_sample(n, (64, 80), seed=n) for n in (2, 0, 3)]
    images, targets = MixUp(p=0.9, seed=0)([image for image, _ in samples], [target for _, target in samples])
    rows, weights = yolo_targets(targets, images[0].shape[1:])
    assert rows.shape == (10, 6)
    assert 0 < weights.min() < weights.max() < 1
    assert torch.equal(weights, torch.cat([target["weights"] for target in targets]))
    assert torch.equal(rows[:, 1], torch.cat([target["labels"] for target in targets]))
    for i, target in enumerate(targets):
        corners = box_convert(rows[rows[:, 0] == i, 2:], "cxcywh", "xyxy") * torch.tensor([80, 64, 80, 64])
        torch.testing.assert_close(corners, target["boxes"].as_subclass(torch.Tensor))
    rows[:, 1] -= 1
    got, expected = weighted_losses(predict(), rows, weights), naive_losses(predict(), rows, weights)
    for name, loss in expected.items():
        torch.testing.assert_close(got[name], loss)


def test_targets_without_weights_weigh_1():
    rows, weights = yolo_targets([make_sample(2)[1], make_sample(0)[1]], (12, 16))
    assert rows.shape == (2, 6)
    assert weights.tolist() == [1, 1]
