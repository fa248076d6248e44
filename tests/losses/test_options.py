"""The options of weight_losses: all off unless asked for."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detmix import WeightedCriterion, weight_losses
from detmix.losses.options import Weighting
from detmix.losses.transformers import WeightedLossFunction
from tests.losses.tiny import (
    DETECTORS,
    EVERY,
    ONES,
    WEIGHTS,
    assert_same_bits,
    batch,
    capture,
    gradients,
    losses_of,
    losses_on,
    split,
    tiny,
    weighted_copy,
)

OPTIONS = [{"normalizer": "weights"}, {"per_image": True}]


@pytest.fixture(params=EVERY)
def every(request):
    return tiny(request.param)


@pytest.mark.parametrize("options", [*OPTIONS, {"terms": []}], ids=str)
def test_unit_and_missing_weights_keep_every_bit_with_any_option(every, options):
    model = weight_losses(copy.deepcopy(every), **options)
    expected = losses_of(every)
    for weights in (None, ONES):
        got = losses_of(model, weights)
        assert_same_bits(got, expected)
    assert_same_bits(gradients(model, got), gradients(every, expected))


# ---- terms ----


def test_each_term_alone_heeds_the_weights_and_the_others_are_stock(every):
    stock, weighted = losses_of(every), losses_of(weighted_copy(every), WEIGHTS)
    bases = {name.split("_aux")[0].split("_dn")[0].removesuffix("_0") for name in stock if "cardinality" not in name}
    for term in bases:
        model = weight_losses(copy.deepcopy(every), terms=[term])
        got = losses_of(model, WEIGHTS)
        chosen = {name for name in stock if name == term or name.startswith(f"{term}_")}
        assert chosen
        assert_same_bits(got, {name: (weighted if name in chosen else stock)[name] for name in stock})
        assert all(got[name] != stock[name] for name in chosen)


def test_terms_that_heed_no_weights_have_the_stock_gradients(every):
    model = weight_losses(copy.deepcopy(every), terms=[])
    assert_same_bits(gradients(model, losses_of(model, WEIGHTS)), gradients(every, losses_of(every)))


# ---- normalizer ----


def ratio(rows, counted):
    return max(1, int(counted.sum())) / max(1.0, float(rows[counted].sum()))


@pytest.mark.parametrize("weights", [WEIGHTS, split(torch.full((5,), 0.01))], ids=["mixed", "small"])
@pytest.mark.parametrize("name", ["fcos", "ssd", "ssdlite"])
def test_dense_losses_are_divided_by_the_weights_of_the_matched_rows(name, weights):
    model = tiny(name)
    calls = capture(model if "ssd" in name else model.head, "compute_loss")
    losses_of(model, weights)
    matched, rows = torch.cat(calls[0][3]), []
    for own, idxs in zip(weights, calls[0][3], strict=True):
        rows += [float(own[k]) if k >= 0 else 1.0 for k in idxs.tolist()]
    factor = ratio(torch.tensor(rows), matched >= 0)
    counted = losses_of(weighted_copy(tiny(name)), weights)
    assert factor > 1
    for term, loss in losses_of(weight_losses(tiny(name), normalizer="weights"), weights).items():
        torch.testing.assert_close(loss, factor * counted[term])


def test_retinanet_divides_the_losses_of_each_image_by_its_own_weights():
    model, calls = weight_losses(tiny("retinanet"), normalizer="weights"), []
    images, targets = batch(WEIGHTS)
    each = []
    for image, target in zip(images, targets, strict=True):
        plain = tiny("retinanet")
        calls = capture(plain.head, "compute_loss")
        losses_on(plain, [image], [target])
        matched = calls[0][3][0]
        rows = torch.tensor([float(target["weights"][k]) if k >= 0 else 1.0 for k in matched.tolist()])
        one = losses_on(weighted_copy(tiny("retinanet")), [image], [target])
        each.append({term: loss * ratio(rows, matched >= 0) for term, loss in one.items()})
    for term, loss in losses_on(model, images, targets).items():
        torch.testing.assert_close(loss, sum(one[term] for one in each) / 3)


def anchor_weights(model):
    """For each anchor the weight of the box it is matched to, and whether there is one."""
    images, targets = model.transform(*batch(WEIGHTS))
    anchors = model.rpn.anchor_generator(images, list(model.backbone(images.tensors).values()))
    rows, found = [], []
    for target, own in zip(targets, anchors, strict=True):
        matched = torch.full((len(own),), -1)
        if len(target["boxes"]):
            matched = model.rpn.proposal_matcher(model.rpn.box_similarity(target["boxes"], own))
        rows += [float(target["weights"][k]) if k >= 0 else 1.0 for k in matched.tolist()]
        found += (matched >= 0).tolist()
    return torch.tensor(rows), torch.tensor(found)


@pytest.mark.parametrize("name", ["fasterrcnn", "maskrcnn", "keypointrcnn"])
def test_rcnn_losses_are_divided_by_the_weights_of_what_is_sampled(name):
    model = weight_losses(tiny(name), normalizer="weights")
    drawn, chosen = results(model.rpn, "fg_bg_sampler"), results(model.roi_heads, "select_training_samples")
    got, counted = losses_of(model, WEIGHTS), losses_of(weighted_copy(tiny(name)), WEIGHTS)
    factor = ratio(anchor_weights(model)[0], torch.cat(drawn[0][0]) + torch.cat(drawn[0][1]) > 0)
    factors = dict.fromkeys(("loss_objectness", "loss_rpn_box_reg"), factor)
    rows, positive = [], []
    for own, matched, labels in zip(WEIGHTS, *(map(torch.Tensor.tolist, part) for part in chosen[0][1:3]), strict=True):
        rows += [float(own[k]) if y > 0 else 1.0 for k, y in zip(matched, labels, strict=True)]
        positive += [y > 0 for y in labels]
    rows, positive = torch.tensor(rows), torch.tensor(positive)
    factors |= dict.fromkeys(("loss_classifier", "loss_box_reg"), ratio(rows, torch.ones_like(positive)))
    factors |= dict.fromkeys(("loss_mask", "loss_keypoint"), ratio(rows, positive))
    assert all(factor > 1 for factor in factors.values())
    for term, loss in got.items():
        torch.testing.assert_close(loss, factors[term] * counted[term])


def results(obj, name):
    """Record what a method returns."""
    method, made = getattr(obj, name), []
    setattr(obj, name, lambda *args: made.append(method(*args)) or made[-1])
    return made


@pytest.mark.parametrize("weights", [WEIGHTS, split(torch.full((5,), 0.01))], ids=["mixed", "small"])
@pytest.mark.parametrize("name", ["detr", "rtdetr"])
def test_losses_of_queries_are_divided_by_the_weights_of_the_boxes(name, weights):
    counted = losses_of(weighted_copy(tiny(name)), weights)
    got = losses_of(weight_losses(tiny(name), normalizer="weights"), weights)
    total = float(torch.cat(weights).sum())
    for term, loss in counted.items():
        # DETR's cross-entropy is a mean by the weights of classes, and has no number of boxes in it.
        own = "cardinality" in term or "loss_ce" in term
        groups = 2 if "_dn" in term else 1  # six denoising queries for an image's three boxes
        factor = 1 if own else 5 * groups / max(1.0, total * groups)
        torch.testing.assert_close(got[term], factor * loss)


class Criterion(nn.Module):
    def get_loss(self, loss, outputs, targets, indices, num_boxes):
        return {"loss_fgl": outputs["pred_boxes"].sum() / num_boxes}


class Weighted(WeightedCriterion, Criterion):
    weighting = Weighting(normalizer="weights")


def test_a_number_of_boxes_that_counts_more_than_are_matched_is_scaled_by_what_is():
    queries, targets = torch.arange(2), [{"boxes": torch.rand(2, 4), "weights": torch.tensor([0.5, 1.0])}]
    losses = Weighted().get_loss("boxes", {"pred_boxes": torch.ones(1, 3, 4)}, targets, [(queries, queries)], 10.0)
    assert losses["loss_fgl"] == 4 * (0.5 + 1.0 + 1.0) / (10 * 0.75)


def loss_function(outputs, labels):
    queries = torch.arange(len(labels[0]["boxes"]))
    loss = Criterion().get_loss("boxes", outputs, labels, [(queries, queries)], 1)["loss_fgl"]
    return loss, {"loss_fgl_aux_0": loss}


def test_a_term_may_be_of_auxiliary_layers_alone():
    outputs, labels = {"pred_boxes": torch.ones(1, 2, 4)}, [{"boxes": torch.rand(1, 4), "weights": torch.tensor([0.5])}]
    loss, _ = WeightedLossFunction(loss_function, Weighting(["loss_fgl"]))(outputs, labels)
    assert loss == 4 * (0.5 + 1)
    with pytest.raises(ValueError, match=r"terms holds 'loss_fg', which is none of the losses \['loss_fgl_aux_0'\]"):
        WeightedLossFunction(loss_function, Weighting(["loss_fg"]))(outputs, labels)


# ---- per_image ----


def test_one_number_weighs_all_of_an_image(every):
    images, targets = batch(WEIGHTS)
    one = images[:1], targets[:1]
    stock = losses_on(every, *one)
    got = losses_on(weight_losses(copy.deepcopy(every), per_image=True), *one)
    for term, loss in stock.items():
        share = 1 if "cardinality" in term else float(WEIGHTS[0].mean())
        torch.testing.assert_close(got[term], share * loss)


def test_an_image_without_boxes_weighs_1():
    stock, model = tiny("retinanet"), weight_losses(tiny("retinanet"), per_image=True)
    images, targets = batch(WEIGHTS)
    assert_same_bits(losses_on(model, images[2:], targets[2:]), losses_on(stock, images[2:], targets[2:]))


# ---- objectness ----


def test_the_weight_is_what_an_anchor_is_to_predict():
    model = weight_losses(tiny("fasterrcnn"), objectness="target")
    given, drawn = capture(model.rpn, "compute_loss"), results(model.rpn, "fg_bg_sampler")
    sampled = capture(model.rpn, "fg_bg_sampler")
    got, plain = losses_of(model, WEIGHTS), losses_of(weighted_copy(tiny("fasterrcnn")), WEIGHTS)
    assert all(set(labels.tolist()) <= {-1.0, 0.0, 1.0} for labels in sampled[0][0])  # it draws by them
    weights, found = anchor_weights(model)
    loss, rows = 0.0, torch.where(torch.cat(drawn[0][0]) + torch.cat(drawn[0][1]))[0].tolist()
    for row in rows:
        goal = weights[row] if found[row] else torch.tensor(0.0)
        loss = loss + F.binary_cross_entropy_with_logits(given[0][0][row, 0], goal)
    torch.testing.assert_close(got["loss_objectness"], loss / len(rows))
    assert got.pop("loss_objectness") != plain.pop("loss_objectness")
    assert_same_bits(got, plain)


def test_an_objectness_that_heeds_no_weights_predicts_none():
    model = weight_losses(tiny("fasterrcnn"), objectness="target", terms=["loss_rpn_box_reg"])
    got, stock = losses_of(model, WEIGHTS), losses_of(tiny("fasterrcnn"))
    assert torch.equal(got["loss_objectness"], stock["loss_objectness"])
    assert got["loss_rpn_box_reg"] != stock["loss_rpn_box_reg"]


def test_a_sampler_that_is_a_module_is_left_in_its_place():
    class Sampler(torch.nn.Module):
        def __init__(self, sampler):
            super().__init__()
            self.sampler = sampler

        def forward(self, labels):
            return self.sampler(labels)

    model = weight_losses(tiny("fasterrcnn"), objectness="target", normalizer="weights")
    expected, sampler = losses_of(model, WEIGHTS), Sampler(model.rpn.fg_bg_sampler)
    del model.rpn.fg_bg_sampler
    model.rpn.fg_bg_sampler = sampler
    assert_same_bits(losses_of(model, WEIGHTS), expected)
    assert model.rpn.fg_bg_sampler is sampler


# ---- what they are set by ----


def test_options_last_through_copies_and_a_second_call_sets_them_anew(every):
    model = weight_losses(every, **OPTIONS[0])
    expected = losses_of(model, WEIGHTS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(losses_of(twin, WEIGHTS), expected)
    again, plain = losses_of(weight_losses(model), WEIGHTS), losses_of(weighted_copy(every), WEIGHTS)
    assert_same_bits(again, plain)
    assert any(again[term] != loss for term, loss in expected.items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"normalizer": "sum"}, ValueError, r"normalizer must be one of \('count', 'weights'\), but is 'sum'"),
        ({"objectness": 1}, ValueError, r"objectness must be one of \('loss', 'target'\), but is 1"),
        ({"terms": "loss_mask"}, TypeError, "terms must be a collection of names, but is the string 'loss_mask'"),
    ],
)
def test_an_option_that_is_none_is_named(options, error, message):
    model = tiny("fcos")
    with pytest.raises(error, match=message):
        weight_losses(model, **options)
    with pytest.raises(error, match=message):
        Weighting(**options)
    assert type(model.head).__name__ == "FCOSHead"


@pytest.mark.parametrize("name", DETECTORS)
def test_a_term_that_the_detector_does_not_have_is_named_before_anything_changes(name):
    model = tiny(name)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"terms holds \['loss_typo'\], but the losses of .* are \['"):
        weight_losses(model, terms=["loss_typo", *losses_of(model)])
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("name", ["detr", "rtdetr"])
def test_a_term_that_a_criterion_does_not_have_is_named_at_the_first_loss(name):
    with pytest.raises(ValueError, match=r"terms holds 'loss_typo', which is none of the losses \["):
        losses_of(weight_losses(tiny(name), terms=["loss_typo"]), WEIGHTS)


def test_a_detector_without_objectness_is_named():
    with pytest.raises(ValueError, match="objectness is 'target', but FCOS has no RegionProposalNetwork"):
        weight_losses(tiny("fcos"), objectness="target")
