import copy
import pickle
from math import sqrt
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.loss.loss_for_object_detection import ImageLoss

from detmix import WeightedCriterion, weight_losses
from tests.losses.tiny_transformers import MODELS, build, forward

WEIGHTS = torch.tensor([0.3, 0.9, 0.0, 0.6, 2.0])


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def changed(model):
    """The same model, weighted; tests run it and change nothing."""
    return weight_losses(copy.deepcopy(model))


@pytest.fixture(scope="module")
def stock(model):
    return losses_and_gradients(model)


@pytest.fixture(scope="module")
def at_weights(changed):
    return losses_and_gradients(changed, WEIGHTS)


def losses_and_gradients(model, *label_args):
    model.zero_grad()
    output = forward(model, *label_args)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: torch.as_tensor(loss).detach() for name, loss in output.loss_dict.items()}, gradients


def losses_of(model, weights):
    return {name: torch.as_tensor(loss).detach() for name, loss in forward(model, weights).loss_dict.items()}


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_loss_has_its_terms_for_every_output(stock, request):
    terms = MODELS[request.node.callspec.params["model"]][1]
    expected = {f"loss_{term}{place}" for names, places in terms.items() for term in names.split() for place in places}
    assert {name for name in stock[0] if "cardinality" not in name} == expected


def test_unit_and_missing_weights_keep_every_bit(stock, changed):
    assert_equal(losses_and_gradients(changed), stock)
    assert_equal(losses_and_gradients(changed, torch.ones(5)), stock)


def test_images_without_objects_keep_every_bit(model, changed):
    if "InstanceSegmentation" in type(model).__name__:
        pytest.skip("its stock loss is an empty tensor where no image has an object")
    expected = losses_and_gradients(model, None, (0, 0, 0))
    assert_equal(losses_and_gradients(changed, torch.ones(0), (0, 0, 0)), expected)


def test_every_term_is_affine_in_the_weights(changed, at_weights):
    at_w, at_0, between = (at_weights[0], *(losses_of(changed, WEIGHTS * share) for share in (0, 0.5)))
    for name in at_w:
        torch.testing.assert_close(between[name], (at_w[name] + at_0[name]) / 2, rtol=1e-4, atol=1e-5)
    # The last layer teaches itself nothing: its loss_ddf is 0.
    assert [k for k in at_w if at_w[k] and torch.equal(at_w[k], at_0[k]) and "cardinality" not in k] == []
    assert "loss_ddf_aux_0" not in at_w or at_w["loss_ddf_aux_0"] > 0


class Call(NamedTuple):
    """A call of the criterion's ``get_loss`` by the model, and what came of it."""

    criterion: Any
    loss: str
    outputs: dict[str, Any]
    targets: list[dict[str, Tensor]]
    indices: list[tuple[Tensor, Tensor]]
    num_boxes: float
    terms: dict[str, Tensor]


@pytest.fixture
def calls(changed, monkeypatch):
    """The calls of ``get_loss`` in a forward pass with given weights, apart from those that count the found."""

    def of(weights):
        made = []

        def get_loss(self, *args):
            terms = stock(self, *args)
            made.append(Call(self, *args, terms))
            return terms

        stock = WeightedCriterion.get_loss
        monkeypatch.setattr(WeightedCriterion, "get_loss", get_loss)
        terms = [name for name in forward(changed, weights).loss_dict if "cardinality" not in name]
        made = [call for call in made if call.loss != "cardinality"]
        assert sum(len(call.terms) for call in made) == len(terms)
        return made

    names = changed.loss_function.function.__globals__
    if "sample_points_using_uncertainty" in names:  # each mask's points must be the same with other masks and without
        sample = names["sample_points_using_uncertainty"]

        def sample_each(masks, *args):
            points = []
            for mask in masks.split(1):
                torch.manual_seed(7)
                points.append(sample(mask, *args))
            return torch.cat(points)

        monkeypatch.setitem(names, "sample_points_using_uncertainty", sample_each)
    return of


def gradients_of(term, predictions):
    if not term.requires_grad:
        return [torch.zeros_like(x) for x in predictions]
    return torch.autograd.grad(term, predictions, retain_graph=True, allow_unused=True, materialize_grads=True)


def predictions_of(call):
    return [x for x in call.outputs.values() if isinstance(x, Tensor) and x.requires_grad]


def test_an_object_of_weight_0_is_in_no_term(calls):
    for call in calls(torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])):
        for name, term in call.terms.items():
            gradients = gradients_of(term, predictions_of(call))
            heard = {0.0: [], 1.0: []}
            for image, (queries, boxes) in enumerate(call.indices):
                for query, box in zip(queries.tolist(), boxes.tolist(), strict=True):
                    weight = float(call.targets[image]["weights"][box])
                    heard[weight].append(any(bool(g[image, query].any()) for g in gradients))
            assert heard[0.0], name
            assert not any(heard[0.0]), name
            # The last layer teaches itself nothing; the boxes of Grounding DINO's encoder are constants.
            silent = (name == "loss_ddf" and term == 0) or not term.requires_grad
            assert any(heard[1.0]) or silent, name


@pytest.mark.parametrize(
    ("model", "call"),
    [("LwDetrForObjectDetection", 0), ("RTDetrForObjectDetection", -1)],
    indirect=["model"],
)
def test_groups_and_denoising_match_an_object_to_several_queries(calls, call):
    assert sum(len(queries) for queries, _ in calls(WEIGHTS)[call].indices) > len(WEIGHTS)


@pytest.mark.parametrize("model", [name for name in MODELS if "Deimv2" in name], indirect=True)
def test_dense_matching_has_one_matching_of_boxes_for_all_layers(calls, changed):
    matchings = [call.indices for call in calls(WEIGHTS) if call.loss == "boxes"]
    assert (matchings[0] is matchings[1]) == changed.config.use_dense_one_to_one


def share(call, name, matched):
    """What one query's mean counts in a term that is no sum over queries divided by the number of boxes."""
    pairs = sum(len(queries) for queries, _ in call.indices)
    free = call.outputs["logits"].shape[:2].numel() - pairs
    if name == "loss_ddf":
        return 1 / sqrt(pairs if matched else free) / (sqrt(pairs) + sqrt(free))
    if name == "loss_ce" and type(call.criterion).loss_labels is ImageLoss.loss_labels:
        no_object = float(call.criterion.empty_weight[-1])
        return (1 if matched else no_object) / (pairs + no_object * free)
    return 1


def brute_force(call):
    """Each term by the stock criterion from one query at a time."""
    total = dict.fromkeys(call.terms, torch.tensor(0.0))
    for image, (queries, boxes) in enumerate(call.indices):
        for query in range(call.outputs["logits"].shape[1]):
            box = boxes[queries == query]
            assert len(box) <= 1
            if call.loss == "masks" and not len(box):
                continue  # RF-DETR's term of no mask is an empty tensor
            weight = call.targets[image]["weights"][box].sum() if len(box) else 1.0
            outputs = {"label_maps": call.outputs.get("label_maps", [None] * 3)[image : image + 1]}
            for name, x in call.outputs.items():
                if isinstance(x, Tensor):  # the mask of the text has one row for all queries
                    outputs[name] = x[image : image + 1, query : query + 1] if x.shape[1] > 1 else x[image : image + 1]
            pair = [(torch.zeros_like(box), box)]
            terms = super(WeightedCriterion, call.criterion).get_loss(
                call.loss, outputs, call.targets[image : image + 1], pair, call.num_boxes
            )
            for name, term in terms.items():
                total[name] = total[name] + weight * share(call, name, bool(len(box))) * term
    return total


def test_every_term_and_gradient_is_the_sum_over_queries_each_by_the_weight_of_its_object(calls):
    for call in calls(WEIGHTS):
        expected = brute_force(call)
        for name, term in call.terms.items():
            torch.testing.assert_close(term, expected[name], rtol=1e-5, atol=1e-6)
            every = [gradients_of(total, predictions_of(call)) for total in (term, expected[name])]
            for got, wanted in zip(*every, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def pickled(model):
    if not any(module._forward_hooks for module in model.modules()):
        return pickle.loads(pickle.dumps(model))
    other = copy.deepcopy(model)  # such a hook of transformers keeps the stock model too from being pickled
    other.loss_function = pickle.loads(pickle.dumps(model.loss_function))
    return other


def test_it_can_be_copied_pickled_and_weighted_twice(model, changed, at_weights):
    function = changed.loss_function
    assert weight_losses(changed).loss_function is function
    assert changed.state_dict().keys() == model.state_dict().keys()
    for other in (copy.deepcopy(changed), pickled(changed)):
        assert_equal(losses_and_gradients(other, WEIGHTS), at_weights)


def test_a_detector_within_another_module_is_found(model):
    holder = weight_losses(nn.ModuleDict({"detector": copy.deepcopy(model)}))
    assert type(holder["detector"].loss_function).__name__ == "WeightedLossFunction"


def test_a_wrong_weight_is_named_by_its_label(changed):
    with pytest.raises(ValueError, match=r"targets\[2\]\['weights'\] must be finite and not negative"):
        forward(changed, torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0]))
