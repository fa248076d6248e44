"""Which outputs of a criterion carry weights, and what is said of the others."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.utils import ModelOutput

from detmix import WeightedCriterion
from detmix.losses import WeightedTensor
from detmix.losses.box_weights import CheckedTargets, weigh_targets
from detmix.losses.outputs import CONSTANTS, weigh_outputs
from detmix.losses.rows import Rows

QUERIES, WEIGHTS = 5, torch.tensor([0.25, 0.5])
INDICES = [(torch.tensor([3, 1]), torch.tensor([0, 1]))]


class Criterion(nn.Module):
    """A criterion whose losses are functions of outputs, targets and the pairs of images and queries."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def get_loss(self, loss, outputs, targets, indices, num_boxes):
        found = [(torch.full_like(torch.as_tensor(q), i), torch.as_tensor(q)) for i, (q, _) in enumerate(indices)]
        return {loss: self.loss(outputs, tuple(map(torch.cat, zip(*found, strict=True)))) / num_boxes}


class Weighted(WeightedCriterion, Criterion):
    pass


class Declared(Weighted):
    constants = WeightedCriterion.constants | {"memory", "aux_outputs"}


def target(weights=WEIGHTS):
    return {"boxes": torch.zeros(2, 4), "weights": weights}


def loss_of(loss, outputs, weights=WEIGHTS, cls=Weighted, indices=INDICES):
    targets = [target(weights) for _ in indices]
    return cls(loss).get_loss("loss", outputs, targets, indices, 2)["loss"]


def predictions(shape=(), seed=0, batch=1):
    return torch.rand(batch, QUERIES, *shape, generator=torch.Generator().manual_seed(seed)) + 1


def sum_of_matched(x, weights=WEIGHTS):
    return (x[0, [3, 1]].flatten(1).sum(1) * weights).sum() / 2


@dataclasses.dataclass
class Data:
    pred_logits: Any
    pred_keypoints: Any


@dataclasses.dataclass
class Output(ModelOutput):
    pred_logits: Any = None
    pred_keypoints: Any = None


Named = namedtuple("Named", ["pred_logits", "pred_keypoints"])
FORMS = {
    "dict": lambda d: d,
    "ordered": OrderedDict,
    "user": UserDict,
    "proxy": MappingProxyType,
    "model": lambda d: Output(**d),
    "data": lambda d: Data(**d),
    "tuple": lambda d: Named(**d),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_prediction_of_any_name_is_weighted_in_outputs_of_any_form(form):
    made = {"pred_logits": predictions((3,)), "pred_keypoints": predictions((34,), 1)}
    outputs, seen = FORMS[form](made), []

    def loss(outputs, found):
        seen.append(type(outputs))
        if isinstance(outputs, Data | Named | Output):
            return outputs.pred_keypoints[found].sum()
        return outputs["pred_keypoints"][found].sum()

    torch.testing.assert_close(loss_of(loss, outputs), sum_of_matched(made["pred_keypoints"]))
    assert seen == [dict if form == "proxy" else type(outputs)]
    assert all(type(x) is torch.Tensor for x in made.values())
    if form not in ("data", "tuple"):
        assert all(outputs[name] is x for name, x in made.items())


def test_outputs_of_no_names_are_named():
    with pytest.raises(TypeError, match=r"outputs must be a mapping, a dataclass or a named tuple .* but are a Tensor"):
        loss_of(lambda outputs, found: outputs.sum(), predictions())


def test_predictions_tell_the_number_of_queries_without_a_known_name():
    outputs = {"heat": predictions((2,)), "pose": predictions((34,)), "temperature": torch.tensor(2.0)}
    torch.testing.assert_close(
        loss_of(lambda o, found: o["pose"][found].sum(), outputs), sum_of_matched(outputs["pose"])
    )


def test_numbers_of_queries_that_differ_are_named_and_can_be_declared():
    outputs = {"pose": predictions((34,)), "memory": torch.rand(1, 7, 8)}
    with pytest.raises(ValueError, match=r"'pose': \(1, 5, 34\), 'memory': \(1, 7, 8\).* class attribute constants"):
        loss_of(lambda o, found: o["pose"][found].sum(), outputs)
    got = loss_of(lambda o, found: o["pose"][found].sum() * o["memory"].sum(), outputs, cls=Declared)
    torch.testing.assert_close(got, sum_of_matched(outputs["pose"]) * outputs["memory"].sum())


def test_without_any_prediction_what_the_loss_reads_is_named():
    with pytest.raises(NotImplementedError, match=r"sum was called on outputs\['pose'\] of shape \(5, 34\)"):
        loss_of(lambda o, found: o["pose"].sum(), {"pose": torch.rand(5, 34)})
    assert loss_of(lambda o, found: torch.ones(()), {}) == 0.5


def test_a_prediction_may_be_a_mapping_of_parts():
    parts = {"query_features": predictions((4,)), "spatial_features": torch.rand(1, 3, 6, 6), "bias": torch.zeros(1)}
    outputs = {"pred_boxes": predictions((4,)), "pred_masks": parts}
    got = loss_of(lambda o, found: o["pred_masks"]["query_features"][found].sum(), outputs)
    torch.testing.assert_close(got, sum_of_matched(parts["query_features"]))
    with pytest.raises(
        NotImplementedError, match=r"outputs\['pred_masks'\]\['spatial_features'\] of shape \(1, 3, 6, 6"
    ):
        loss_of(lambda o, found: (o["pred_masks"]["spatial_features"] * 2).sum(), outputs)


OTHERS = {
    "memory": torch.rand(1, 7, 8),
    "stacked": torch.rand(4, 1, QUERIES, 3),
    "transposed": torch.rand(QUERIES, 1, 3),
    "flat": torch.rand(QUERIES, 3),
    "half": torch.rand(1, 7, dtype=torch.bfloat16),
    "complex": torch.rand(1, 7, dtype=torch.complex64),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_has_no_row_for_each_query_is_named_where_its_values_are_used(name):
    outputs = {"pred_boxes": predictions((4,)), name: OTHERS[name]}

    def ask(outputs, found):
        x = outputs[name]
        told = x.shape, x.dtype, x.device, x.ndim, x.size(0), x.dim(), len(x), x.numel(), x.is_floating_point()
        assert told[0] == OTHERS[name].shape
        assert type(x.new_zeros(2)) is type(x.detach()) is torch.Tensor
        return outputs["pred_boxes"][found].sum() + x.detach().abs().sum() * 0

    torch.testing.assert_close(loss_of(ask, outputs), sum_of_matched(outputs["pred_boxes"]))
    message = rf"outputs\['{name}'\] of shape .*a prediction is \(1, 5, \.\.\.\), one row for each query.* constants"
    for use in (
        lambda x, w: x.sum(),
        lambda x, w: x[0],
        lambda x, w: torch.cat([w.flatten(), x.flatten()]),
        lambda x, w: w.sum() * x,
        lambda x, w: torch.stack([w.sum(), *x]),
        lambda x, w: torch.where(w > 0, w, x),
    ):
        with pytest.raises(NotImplementedError, match=message):
            loss_of(lambda o, found, use=use: use(o[name], o["pred_boxes"]).sum(), outputs)


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("aux_outputs", r"\['aux_outputs'\]\[1\]\['pred_boxes'\]"),
        ("enc_outputs", r"\['enc_outputs'\]\['pred_boxes'\]"),
    ],
)
def test_the_outputs_of_other_calls_are_named_where_this_one_uses_them(key, path):
    other = {"pred_boxes": predictions((4,))}
    outputs = {"pred_boxes": predictions((4,)), key: [other, other] if key == "aux_outputs" else other}
    pick = lambda o: o[key][1] if key == "aux_outputs" else o[key]  # noqa: E731
    assert loss_of(lambda o, found: o["pred_boxes"][found].sum(), outputs) > 0
    with pytest.raises(NotImplementedError, match=rf"outputs{path} .* belongs to another call of get_loss"):
        loss_of(lambda o, found: pick(o)["pred_boxes"].sum(), outputs)
    if key == "aux_outputs":
        assert loss_of(lambda o, found: pick(o)["pred_boxes"].sum(), outputs, cls=Declared) > 0


def test_a_call_within_a_call_weights_the_outputs_that_it_is_given():
    class Recursive(Criterion):
        def get_loss(self, loss, outputs, targets, indices, num_boxes):
            if loss != "all":
                return super().get_loss(loss, outputs, targets, indices, num_boxes)
            every = [outputs, *outputs["aux_outputs"]]
            losses = [self.get_loss("one", each, targets, indices, num_boxes)["one"] for each in every]
            return {"all": torch.stack(losses).sum()}

    class Own(WeightedCriterion, Recursive):
        pass

    layers = [{"pred_boxes": predictions((4,), seed)} for seed in range(3)]
    criterion = Own(lambda o, found: o["pred_boxes"][found].sum())
    got = criterion.get_loss("all", {**layers[0], "aux_outputs": layers[1:]}, [target()], INDICES, 2)["all"]
    torch.testing.assert_close(got, sum(sum_of_matched(layer["pred_boxes"]) for layer in layers))


def test_whole_numbers_and_flags_stay_plain():
    outputs = {"pred_boxes": predictions((4,)), "ids": torch.arange(7), "mask": torch.ones(1, 7, dtype=torch.bool)}
    got = loss_of(lambda o, found: o["ids"].sum() * o["mask"].sum() * o["pred_boxes"][found].sum(), outputs)
    torch.testing.assert_close(got, 21 * 7 * sum_of_matched(outputs["pred_boxes"]))


def test_predictions_in_half_precision_are_weighted():
    x = predictions((4,)).bfloat16()
    got = loss_of(lambda o, found: o["pose"][found].sum(), {"pose": x})
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), sum_of_matched(x.float()), rtol=2e-2, atol=0)


def test_a_batch_of_as_many_images_as_queries_is_weighted_by_image():
    x = predictions((4,), batch=QUERIES)
    indices = [(torch.tensor([i]), torch.tensor([i % 2])) for i in range(QUERIES)]
    got = loss_of(lambda o, found: o["pose"][found].sum(), {"pose": x}, indices=indices)
    torch.testing.assert_close(got, sum(WEIGHTS[i % 2] * x[i, i].sum() for i in range(QUERIES)) / 2)


def test_outputs_of_constants_are_the_same_tensors():
    outputs = {"logits": predictions((3,)), **{name: predictions((4,)) for name in CONSTANTS}}
    made = weigh_outputs(outputs, 1, QUERIES, Rows.of(torch.ones(1, QUERIES)), CONSTANTS)
    assert made.keys() == {"logits"}
    assert type(made["logits"]) is WeightedTensor


def test_outputs_changed_between_two_losses_of_a_layer_are_seen():
    targets = [target()]
    checked = CheckedTargets(targets, weigh_targets(targets))
    criterion, outputs = Weighted(lambda o, found: o["pose"][found].sum()), {"pose": predictions((4,))}
    for seed in range(3):
        outputs["pose"] = predictions((4,), seed)
        for _ in range(2):
            got = criterion.get_loss("loss", outputs, checked, INDICES, 2)["loss"]
            torch.testing.assert_close(got, sum_of_matched(outputs["pose"]))


# ---- indices ----


def pose(outputs, found):
    return outputs["pose"][found].sum()


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_indices_may_be_arrays_lists_and_tensors(kind):
    outputs = {"pose": predictions((4,))}
    got = loss_of(pose, outputs, indices=[(kind([3, 1]), kind([0, 1]))])
    torch.testing.assert_close(got, sum_of_matched(outputs["pose"]))


def test_indices_from_the_end_count_as_in_torch():
    outputs = {"pose": predictions((4,), batch=2)}
    ends = [(torch.tensor([-2, 1]), torch.tensor([0, -1]))] * 2
    expected = loss_of(pose, outputs, indices=INDICES * 2)
    torch.testing.assert_close(loss_of(pose, outputs, indices=ends), expected)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (INDICES * 2, "indices must hold one pair .* for each of 1 targets, not 2"),
        ([(torch.tensor([3, 1]), torch.tensor([0]))], r"indices\[0\] must be a pair .* shapes are \(2,\) and \(1,\)"),
        ([(torch.tensor([[3, 1]]), torch.tensor([[0, 1]]))], r"indices\[0\] must be a pair .* shapes are \(1, 2\)"),
        ([(torch.tensor([3, 5]), torch.tensor([0, 1]))], "indices must number queries below 5.* go up to 5"),
        ([(torch.tensor([3, 3]), torch.tensor([0, 1]))], "match query 3 of image 0 to boxes of different weights"),
    ],
)
def test_indices_that_fit_no_query_or_several_weights_are_named(indices, message):
    with pytest.raises(ValueError, match=message):
        Weighted(pose).get_loss("loss", {"pose": predictions((4,))}, [target()], indices, 2)


def test_a_query_with_two_boxes_of_one_weight_has_that_weight():
    outputs, twice = {"pose": predictions((4,))}, [(torch.tensor([3, 3]), torch.tensor([0, 1]))]
    got = loss_of(pose, outputs, torch.tensor([0.5, 0.5]), indices=twice)
    torch.testing.assert_close(got, outputs["pose"][0, 3].sum() * 0.5)


def test_every_argument_may_be_given_by_name():
    outputs = {"pose": predictions((4,))}
    got = Weighted(pose).get_loss(loss="loss", outputs=outputs, targets=[target()], indices=INDICES, num_boxes=2)
    torch.testing.assert_close(got["loss"], sum_of_matched(outputs["pose"]))
