import copy
import pickle

import pytest
import torch
import transformers as tf
from torch import nn

from detmix import weight_losses
from detmix.losses.loss_functions import WeightedLossFunction, weighted_criteria

ENCODER = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
DECODER = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "num_queries": 12, "num_labels": 4}
PYRAMID = {
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [8, 8, 16],
    "decoder_in_channels": [16] * 3,
    "num_denoising": 6,
}
LEVELS = ["stage2", "stage3", "stage4"]


def resnet(cls, levels):
    widths = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4, "layer_type": "basic"}
    return cls(out_features=levels, **widths)


def hgnet():
    widths = {f"stage_{kind}_channels": [8] * 4 for kind in ("in", "mid")} | {"stage_out_channels": [8, 8, 8, 16]}
    counts = {"stage_num_blocks": [1] * 4, "stage_numb_of_layers": [1] * 4, "depths": [1] * 4}
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "stem_channels": [3, 8, 8]}
    return tf.HGNetV2Config(out_features=LEVELS, **widths, **counts, **sizes)


def detr(name, levels=LEVELS[2:], width="d_model"):
    own = {"use_timm_backbone": False, "auxiliary_loss": True, width: 32}
    return getattr(tf, f"{name}Config")(backbone_config=resnet(tf.ResNetConfig, levels), **own, **ENCODER, **DECODER)


def real_time(name, backbone):
    encoder = {key: value for key, value in ENCODER.items() if key != "encoder_layers"}
    return getattr(tf, f"{name}Config")(backbone_config=backbone, d_model=16, **encoder, **PYRAMID, **DECODER)


CONFIGS = {
    "Detr": lambda: detr("Detr"),
    "ConditionalDetr": lambda: detr("ConditionalDetr"),
    "DabDetr": lambda: detr("DabDetr", width="hidden_size"),
    "DeformableDetr": lambda: detr("DeformableDetr", LEVELS),
    "RTDetr": lambda: real_time("RTDetr", resnet(tf.RTDetrResNetConfig, LEVELS)),
    "RTDetrV2": lambda: real_time("RTDetrV2", resnet(tf.RTDetrResNetConfig, LEVELS)),
    "DFine": lambda: real_time("DFine", hgnet()),
    "Deimv2": lambda: real_time("Deimv2", hgnet()),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    model = getattr(tf, f"{request.param}ForObjectDetection")(CONFIGS[request.param]()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for parameter in model.parameters():  # heads that start at 0 would make some terms 0 whatever the weights
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.05)
    return model


def labels(weights=None):
    rng = torch.Generator().manual_seed(1)
    made = [
        {"class_labels": torch.randint(0, 4, (n,), generator=rng), "boxes": torch.rand(n, 4, generator=rng) * 0.4 + 0.2}
        for n in (2, 0, 3)
    ]
    for label, own in zip(made, () if weights is None else weights.split([2, 0, 3]), strict=weights is not None):
        label["weights"] = own
    return made


def losses_and_gradients(model, weights=None):
    torch.manual_seed(5)  # denoising queries are drawn
    model.zero_grad()
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    output = model(pixel_values=pixels, labels=labels(weights))
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: torch.as_tensor(loss).detach() for name, loss in output.loss_dict.items()}, gradients


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_unit_and_missing_weights_keep_every_bit(model):
    stock = losses_and_gradients(model)
    changed = weight_losses(copy.deepcopy(model))
    assert_equal(losses_and_gradients(changed), stock)
    assert_equal(losses_and_gradients(changed, torch.ones(5)), stock)


def test_every_term_is_affine_in_the_weights(model):
    changed = weight_losses(copy.deepcopy(model))
    w = torch.tensor([0.3, 0.9, 0.0, 0.6, 2.0])
    (at_w, _), (at_0, _), (between, _) = (losses_and_gradients(changed, weights) for weights in (w, 0 * w, 0.5 * w))
    for name in at_w:
        torch.testing.assert_close(between[name], (at_w[name] + at_0[name]) / 2, rtol=1e-4, atol=1e-5)
    # The last layer teaches itself nothing: its loss_ddf is 0.
    assert [k for k in at_w if at_w[k] and torch.equal(at_w[k], at_0[k]) and "cardinality" not in k] == []
    assert "loss_ddf_aux_0" not in at_w or at_w["loss_ddf_aux_0"] > 0


def test_an_object_of_weight_0_is_in_no_box_term(model):
    changed = weight_losses(copy.deepcopy(model))
    losses, _ = losses_and_gradients(changed, torch.zeros(5))
    assert not any(loss for name, loss in losses.items() if "bbox" in name or "giou" in name or "fgl" in name)


def test_it_can_be_copied_pickled_and_weighted_twice(model):
    changed = weight_losses(copy.deepcopy(model))
    weights = torch.tensor([0.3, 0.9, 0.0, 0.6, 2.0])
    expected = losses_and_gradients(changed, weights)
    function = changed.loss_function
    assert weight_losses(changed).loss_function is function
    assert changed.state_dict().keys() == model.state_dict().keys()
    for other in (copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
        assert_equal(losses_and_gradients(other, weights), expected)


def test_a_detector_within_another_module_is_found(model):
    holder = weight_losses(nn.ModuleDict({"detector": copy.deepcopy(model)}))
    assert type(holder["detector"].loss_function).__name__ == "WeightedLossFunction"


def test_a_wrong_weight_is_named_by_its_label(model):
    changed = weight_losses(copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"targets\[2\]\['weights'\] must be finite and not negative"):
        losses_and_gradients(changed, torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0]))


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
    return factor * L1().get_loss("boxes", outputs, labels, [(queries, queries)], num_boxes)["l1"]


def test_a_loss_function_keeps_its_defaults():
    label = {"boxes": torch.zeros(2, 4), "weights": torch.tensor([0.25, 0.5])}
    loss = WeightedLossFunction(loss_function)({"pred_boxes": torch.ones(1, 3, 4)}, [label])
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
