"""Whose weight a row counts by, and how often the weights of a step are read."""

import pytest
import torch

from detmix.losses import box_weights as matching
from detmix.losses import weight_losses
from tests.losses.tiny import EVERY, assert_same_bits, batch, losses_on, tiny, weighted_copy
from tests.losses.tiny_transformers import build, labels

# ---- two boxes on one row ----


def twins(first, second):
    """A batch of one image, which holds one box twice, of two classes and weights, and another box."""
    images, targets = batch(counts=(2,))
    target = {key: value[[0, 0, 1]] for key, value in targets[0].items()}
    target |= {"labels": torch.tensor([1, 2, 3]), "weights": torch.tensor([first, second, 1.0])}
    return images, [target]


def losses_of_twins(model, *weights):
    return losses_on(model, *twins(*weights))


FIRST_WINS = ["retinanet", "fcos", "fasterrcnn", "maskrcnn", "keypointrcnn"]


@pytest.mark.parametrize("name", FIRST_WINS)
def test_rows_of_two_equal_boxes_count_as_the_first(name):
    model = weighted_copy(tiny(name))
    expected = losses_of_twins(model, 0.5, 1.0)
    assert_same_bits(losses_of_twins(model, 0.5, 0.0), expected)
    for term, loss in losses_of_twins(model, 0.0, 1.0).items():
        assert loss != expected[term]


@pytest.mark.parametrize("name", ["ssd", "ssdlite"])
def test_the_best_default_box_of_two_equal_boxes_counts_as_the_last_and_the_others_as_the_first(name):
    model = weighted_copy(tiny(name))
    matched, compute_loss = [], model.compute_loss
    model.compute_loss = lambda targets, outputs, anchors, idxs: (
        matched.extend(idxs) or compute_loss(targets, outputs, anchors, idxs)
    )
    losses = {weights: losses_of_twins(model, *weights) for weights in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0))}
    assert (matched[0] == 1).sum() == 1 <= (matched[0] == 0).sum()
    both, last, first = (loss["bbox_regression"] for loss in losses.values())
    assert first < both
    assert last < both


@pytest.mark.parametrize("name", ["detr", "rtdetr"])
def test_each_of_two_equal_boxes_has_a_query_of_its_own(name):
    model = weighted_copy(tiny(name))
    none, first, second, both = (losses_of_twins(model, *w) for w in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)))
    for term in ("loss_bbox", "loss_giou"):
        assert first[term] > none[term]
        assert second[term] > none[term]
        torch.testing.assert_close(first[term] + second[term], none[term] + both[term])


@pytest.mark.parametrize("name", EVERY)
def test_losses_of_two_equal_boxes_are_the_same_every_time(name):
    model = weighted_copy(tiny(name))
    assert_same_bits(losses_of_twins(model, 0.3, 0.8), losses_of_twins(model, 0.3, 0.8))


# ---- one look at the weights of a step ----


@pytest.fixture
def looks(monkeypatch):
    """The targets that were checked, in order."""
    checked, check = [], matching.check_target
    monkeypatch.setattr(matching, "check_target", lambda target, **kw: checked.append(target) or check(target, **kw))
    return checked


def weighted_model(name):
    return weight_losses(build(name))


@pytest.mark.parametrize("name", ["DetrForObjectDetection", "RTDetrForObjectDetection"])
def test_labels_are_checked_once_a_step_however_many_losses_and_layers_ask(name, looks):
    model = weighted_model(name)
    step_labels = labels(torch.rand(5))
    for steps in (1, 2):
        model(pixel_values=torch.rand(3, 3, 64, 64), labels=step_labels)
        assert len(looks) == steps * len(step_labels)
        assert all(a is b for a, b in zip(looks, step_labels * steps, strict=True))


def test_weights_that_change_in_place_between_steps_are_heard():
    model = weighted_model("DetrForObjectDetection")
    pixels, step_labels = torch.rand(3, 3, 64, 64), labels(torch.ones(5))

    def loss():
        return model(pixel_values=pixels, labels=step_labels).loss_dict["loss_bbox"]

    ones = loss()
    for label in step_labels:
        label["weights"].mul_(0.5)
    torch.testing.assert_close(loss(), ones / 2)
    step_labels[0]["weights"][0] = -1
    with pytest.raises(ValueError, match=r"targets\[0\]\['weights'\] must be finite and not negative"):
        loss()


def test_labels_are_handed_back_as_they_came():
    given = labels(torch.rand(5))
    kept = [dict(label) for label in given]
    weights = matching.weigh_targets(given)
    targets = matching.CheckedTargets(given, weights)
    assert matching.weigh_targets(targets) is weights
    assert type(given) is list
    assert all(a is b and a.keys() == c.keys() for a, b, c in zip(given, targets, kept, strict=True))
