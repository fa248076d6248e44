"""Labels, masks and indices that have weights: what they pass them on to, and what stays a count."""

import pytest
import torch
import torch.nn.functional as F

from detmix.losses import WeightedTensor, weighted

LABELS = torch.tensor([2, 0, 1, 0, 3, 1])
WEIGHTS = torch.tensor([0.5, 1.0, 0.25, 2.0, 0.0, 1.5])
POSITIVE = LABELS > 0
RNG = torch.Generator().manual_seed(0)
SCORES, BOXES = torch.rand(6, 4, generator=RNG), torch.rand(6, 4, generator=RNG)


@pytest.fixture
def labels():
    return weighted(LABELS.clone(), WEIGHTS)


def picked(x, rows):
    return (x * WEIGHTS[rows].reshape(-1, *[1] * (x.ndim - 1))).sum()


GATHERS = {
    "where": lambda y: BOXES[torch.where(y > 0)[0]],
    "where by keyword": lambda y: BOXES[torch.where(condition=y > 0)[0]],
    "nonzero": lambda y: BOXES[torch.nonzero(y > 0).squeeze(1)],
    "nonzero of labels": lambda y: BOXES[y.nonzero()[:, 0]],
    "nonzero as a tuple": lambda y: BOXES[(y > 0).nonzero(as_tuple=True)],
    "argwhere": lambda y: BOXES[torch.argwhere(y != 0).flatten()],
    "mask": lambda y: BOXES[y > 0],
    "mask and a slice": lambda y: BOXES[y > 0, :],
    "mask and an ellipsis": lambda y: BOXES[y > 0, ...],
    "mask and a new dimension": lambda y: BOXES[None, y > 0][0],
    "mask behind a slice": lambda y: BOXES.T[:, y > 0].transpose(0, 1),
    "mask with an int before": lambda y: BOXES[None][0, y > 0],
    "not equal": lambda y: BOXES[~(y == 0)],
    "and": lambda y: BOXES[(y > 0) & (y < 9)],
    "and a plain one": lambda y: BOXES[(y > 0) & torch.ones(6, dtype=torch.bool)],
    "or": lambda y: BOXES[(y > 1) | (y == 1)],
    "xor": lambda y: BOXES[(y >= 0) ^ (y == 0)],
    "logical": lambda y: BOXES[torch.logical_and(y > 0, torch.logical_not(y == 0))],
    "bool": lambda y: BOXES[y.bool()],
    "to bool": lambda y: BOXES[y.to(torch.bool)],
    "isin": lambda y: BOXES[torch.isin(y, torch.tensor([1, 2, 3]))],
    "clone and view": lambda y: BOXES[(y > 0).clone().view(2, 3).flatten()],
    "cat": lambda y: BOXES[torch.cat([y[:2] > 0, y[2:] > 0])],
    "cat of labels": lambda y: BOXES[torch.cat([y[:2], y[2:]]) > 0],
    "index_select": lambda y: torch.index_select(BOXES, 0, torch.where(y > 0)[0]),
    "index_select by keyword": lambda y: BOXES.index_select(index=torch.where(y > 0)[0], dim=0),
    "list of masks": lambda y: torch.stack([BOXES[i] for i in torch.where(y > 0)[0]]),
    "numbers of one_hot": lambda y: BOXES[F.one_hot(y)[:, 1:].sum(1) > 0],
    "any of one_hot": lambda y: BOXES[F.one_hot(y).bool()[:, 1:].any(1)],
    "detached": lambda y: BOXES[y.detach() > 0],
    "floor of a product": lambda y: BOXES[torch.where(y > 0)[0] * 2 // 2],
}


@pytest.mark.parametrize("name", GATHERS)
def test_what_is_picked_by_labels_weighs_what_they_weigh(name, labels):
    out = GATHERS[name](labels)
    assert torch.equal(out.as_subclass(torch.Tensor), BOXES[POSITIVE])
    torch.testing.assert_close(out.sum(), picked(BOXES[POSITIVE], POSITIVE))
    torch.testing.assert_close((out.mean(1) ** 2).sum(), picked(BOXES[POSITIVE].mean(1) ** 2, POSITIVE))


LOSSES = {
    "factor": lambda y: (BOXES * (y > 0).float()[:, None]).sum(),
    "factor as another": lambda y: (BOXES * (y > 0)[:, None].type_as(BOXES)).sum(),
    "factor without a float": lambda y: (BOXES * (y > 0)[:, None]).sum(),
    "scaled factor": lambda y: (BOXES * ((y > 0).to(torch.float32) * 2 / 2)[:, None]).sum(),
    "where of plain": lambda y: torch.where((y > 0)[:, None], BOXES, 0.0).sum(),
    "masked_fill": lambda y: BOXES.masked_fill((y == 0)[:, None], 0.0).sum(),
    "agnostic boxes": lambda y: F.l1_loss(BOXES[y > 0], torch.zeros(4, 4), reduction="sum"),
    "masked_select": lambda y: torch.masked_select(BOXES, (y > 0)[:, None]).sum(),
    "expanded mask": lambda y: BOXES[(y > 0)[:, None].expand(6, 4)].sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_plain_losses_combined_with_labels_weigh_what_they_weigh(name, labels):
    torch.testing.assert_close(LOSSES[name](labels), picked(BOXES[POSITIVE], POSITIVE))
    unit = weighted(LABELS, torch.ones(6))
    torch.testing.assert_close(LOSSES[name](unit), BOXES[POSITIVE].sum())


def test_classes_chosen_by_labels_weigh_what_they_weigh(labels):
    found = torch.where(labels > 0)[0]
    expected = picked(SCORES[POSITIVE, LABELS[POSITIVE]], POSITIVE)
    every = picked(SCORES[range(6), LABELS], slice(None))
    torch.testing.assert_close(SCORES[found, labels[found]].sum(), expected)
    torch.testing.assert_close(SCORES[found, labels[labels > 0]].sum(), expected)
    torch.testing.assert_close(SCORES[torch.arange(6), labels].sum(), every)
    torch.testing.assert_close(SCORES.gather(1, labels[:, None]).sum(), every)
    torch.testing.assert_close(torch.gather(SCORES, index=labels[:, None], dim=1).sum(), every)
    torch.testing.assert_close(torch.take_along_dim(SCORES, labels[:, None], 1).sum(), every)
    torch.testing.assert_close((SCORES * F.one_hot(labels)).sum(), every)
    table = torch.rand(2, 4, 6, generator=RNG)  # behind and between other dimensions
    torch.testing.assert_close(table[:, labels].sum(), (table[:, LABELS] * WEIGHTS[:, None]).sum())
    torch.testing.assert_close(table[0, labels, 1].sum(), (table[0, LABELS, 1] * WEIGHTS).sum())
    pairs = table[torch.tensor([[0], [1]]), :, labels]  # of a broadcast index
    torch.testing.assert_close(pairs.sum(), (table[:, :, LABELS] * WEIGHTS).sum())
    wide = torch.rand(2, 6, generator=RNG)
    torch.testing.assert_close(wide[torch.tensor([[0], [1]]), labels].sum(), (wide[:, LABELS] * WEIGHTS).sum())
    ones = torch.ones(6, dtype=torch.int64)
    torch.testing.assert_close(table[ones, :, labels].sum(), (table[ones, :, LABELS] * WEIGHTS[:, None]).sum())


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_losses_of_plain_predictions_on_weighted_labels(reduction, labels):
    hot = F.one_hot(LABELS).float()
    for loss, target, plain in [
        (F.cross_entropy, labels, LABELS),
        (F.cross_entropy, F.one_hot(labels).float(), hot),
        (lambda x, y, **kw: F.nll_loss(x.log(), y, **kw), labels, LABELS),
        (F.binary_cross_entropy, F.one_hot(labels, 4).float(), hot),
        (F.binary_cross_entropy_with_logits, F.one_hot(labels, num_classes=4).to(SCORES), hot),
        (F.mse_loss, F.one_hot(labels).type_as(SCORES), hot),
    ]:
        rows = loss(SCORES, plain, reduction="none")
        rows = rows * (WEIGHTS if rows.ndim == 1 else WEIGHTS[:, None])
        got = loss(SCORES, target, reduction=reduction)
        got = got.sum() if reduction == "none" else got
        torch.testing.assert_close(got, rows.mean() if reduction == "mean" else rows.sum())


COUNTS = {
    "mask": lambda y: (y > 0).sum(),
    "floats": lambda y: (y > 0).float().sum(),
    "mean": lambda y: (y > 0).float().mean(),
    "to": lambda y: (y > 0).to(torch.float64).sum(),
    "scalars": lambda y: ((y > 0).float() * 2 + 1).sum(),
    "moved": lambda y: torch.stack([(y > 0).float().view(2, 3), (y == 0).float().view(2, 3)]).sum(),
    "gathered": lambda y: (y > 0).float()[torch.where(y > 0)[0]].sum(),
    "of two": lambda y: ((y > 0).float() * (y < 3).float()).sum(),
    "where": lambda y: torch.where(y > 0, 1.0, 0.0).sum(),
    "size": lambda y: torch.tensor(float(y[y > 0].numel())),
    "count_nonzero": lambda y: torch.count_nonzero(y),
    "classes": lambda y: y.max() + 1,
    "zeros_like": lambda y: torch.zeros_like(y, dtype=torch.float32).sum(),
    "by class": lambda y: F.one_hot(y).float().sum(0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_sums_of_labels_are_counts(name, labels):
    out = COUNTS[name](labels)
    assert type(out) is torch.Tensor
    assert torch.equal(out, COUNTS[name](LABELS))


def test_what_is_said_of_predictions_is_plain():
    x = weighted(SCORES, WEIGHTS[:, None])
    for out in (x > 0.5, x.bool(), x.argmax(1), torch.where(x > 0.5)[0], x.to(torch.bool), x.isnan(), x == x):
        assert type(out) is torch.Tensor
    assert isinstance(x.long() > 0, WeightedTensor)  # but integers made of them are as labels are


def test_values_that_may_be_losses_are_not_written_into_counts(labels):
    counts = torch.zeros_like(labels, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"__setitem__.*may be losses"):
        counts[labels > 0] = BOXES[:, 0][labels > 0]
    assert counts.sum() == 0


def test_a_mask_of_other_weights_than_what_it_picks_is_refused(labels):
    with pytest.raises(
        NotImplementedError, match=r"__getitem__ was called .* different loss weights, of shape \(6, 4\)"
    ):
        weighted(BOXES, WEIGHTS[:, None] + 1)[labels > 0]
