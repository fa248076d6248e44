"""Weighted detectors against torchvision's own, and against loops over rows."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.roi_heads import keypoints_to_heatmap, project_masks_on_boxes
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from detmix.losses import match_weights, weight_losses, weighted
from detmix.losses.box_weights import check_weights
from tests.losses.tiny import (
    CLASSES,
    DETECTORS,
    EVERY,
    assert_same_bits,
    batch,
    capture,
    gradients,
    losses_of,
    losses_on,
    split,
    weighted_copy,
)

BACKGROUND_TERMS = {"classification", "loss_classifier", "loss_objectness"}


# ---- weights of 1 ----


@pytest.mark.parametrize(
    "weights", [None, split(torch.ones(5)), [torch.ones(3), None, None]], ids=["missing", "unit", "partly"]
)
def test_unit_and_missing_weights_keep_every_bit(stock, weights):
    model = weighted_copy(stock)
    expected, got = losses_of(stock), losses_of(model, weights)
    assert_same_bits(got, expected)
    assert_same_bits(gradients(model, got), gradients(stock, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [None, split(torch.ones(5))], ids=["missing", "unit"])
@pytest.mark.parametrize("stock", EVERY, indirect=True)
def test_unit_weights_keep_every_bit_under_autocast(stock, weights, dtype):
    model = weighted_copy(stock)
    with torch.autocast("cpu", dtype):
        expected, got = losses_of(stock), losses_of(model, weights)
    assert_same_bits(got, expected)
    assert_same_bits(gradients(model, got), gradients(stock, expected))


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "giou", "diou", "ciou"])
@pytest.mark.parametrize("stock", ["retinanet"], indirect=True)
def test_every_box_loss_of_retinanet_is_weighted(stock, kind):
    stock.head.regression_head._loss_type = kind
    model = weighted_copy(stock)
    expected, got = losses_of(stock), losses_of(model, split(torch.ones(5)))
    assert_same_bits(got, expected)
    assert_same_bits(gradients(model, got), gradients(stock, expected))
    half = losses_of(model, split(torch.full((5,), 0.5)))
    torch.testing.assert_close(half["bbox_regression"], expected["bbox_regression"] / 2)


@pytest.mark.parametrize("stock", ["retinanet", "ssd", "fasterrcnn"], indirect=True)
def test_float64_boxes_and_weights_keep_every_bit(stock):
    images, targets = batch(split(torch.ones(5)))
    for target in targets:
        target |= {"boxes": target["boxes"].double(), "weights": target["weights"].double()}
    model = weighted_copy(stock)
    expected, got = losses_on(stock, images, targets), losses_on(model, images, targets)
    assert_same_bits(got, expected)
    assert_same_bits(gradients(model, got), gradients(stock, expected))


@pytest.mark.parametrize("stock", ["retinanet", "fcos", "ssd", "ssdlite", "fasterrcnn"], indirect=True)
def test_a_batch_without_boxes_keeps_every_bit(stock):
    model = weighted_copy(stock)
    expected, got = losses_of(stock, counts=(0, 0)), losses_of(model, [torch.zeros(0)] * 2, counts=(0, 0))
    assert_same_bits(got, expected)
    assert_same_bits(gradients(model, got), gradients(stock, expected))


# ---- other weights ----


def test_every_term_is_affine_in_the_weights(stock):
    model, rng = weighted_copy(stock), torch.Generator().manual_seed(7)
    for _ in range(3):
        one, other = torch.rand(2, 5, generator=rng)
        mix = losses_of(model, split(0.3 * one + 0.7 * other))
        ends = losses_of(model, split(one)), losses_of(model, split(other))
        for name, loss in mix.items():
            assert ends[0][name] != ends[1][name]
            torch.testing.assert_close(loss, 0.3 * ends[0][name] + 0.7 * ends[1][name])


def test_every_term_is_affine_in_each_weight_and_their_slopes_add_up(stock):
    model = weighted_copy(stock)
    none, all_ = losses_of(model, split(torch.zeros(5))), losses_of(model, split(torch.ones(5)))
    slopes = {name: [] for name in none}
    for one in torch.eye(5):
        twice, once = losses_of(model, split(2 * one)), losses_of(model, split(one))
        for name, zero in none.items():
            torch.testing.assert_close(twice[name] - once[name], once[name] - zero, rtol=1e-4, atol=1e-5)
            slopes[name].append(once[name] - zero)
    for name, zero in none.items():
        torch.testing.assert_close(sum(slopes[name]), all_[name] - zero, rtol=1e-4, atol=1e-5)
        assert any(slope > 0 for slope in slopes[name]), name


def test_zero_weight_boxes_are_neither_positive_nor_negative(stock):
    model = weighted_copy(stock)
    images, targets = batch(split([1.0, 0.0, 0.5, 0.0, 1.0]))
    before = losses_on(model, images, targets)
    for target, objects in zip(targets, ([1], [0], []), strict=True):
        target["labels"][objects] = target["labels"][objects] % (CLASSES - 1) + 1
        target["masks"][objects] = 1 - target["masks"][objects]
    assert all(torch.equal(before[name], loss) for name, loss in losses_on(model, images, targets).items())
    # Terms without background are 0, and no parameter of theirs moves.
    none = losses_of(model, split(torch.zeros(5)))
    pulls = {name: loss for name, loss in none.items() if name not in BACKGROUND_TERMS}
    assert all(loss == 0 for loss in pulls.values())
    assert all(grad is None or not grad.any() for grad in gradients(model, pulls).values())


def test_the_gradients_are_weighted_as_the_losses_are(stock):
    model = weighted_copy(stock)
    grads = [gradients(model, losses_of(model, split(torch.full((5,), w)))) for w in (0.0, 0.5, 1.0)]
    for name, half in grads[1].items():
        if half is not None:
            torch.testing.assert_close(2 * half, grads[0][name] + grads[2][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stock", EVERY, indirect=True)
def test_losses_under_autocast_are_finite_and_nearly_affine(stock, dtype):
    model, one, other = weighted_copy(stock), torch.rand(5), torch.rand(5)
    with torch.autocast("cpu", dtype):
        ends = losses_of(model, split(one)), losses_of(model, split(other))
        for name, loss in losses_of(model, split((one + other) / 2)).items():
            assert loss.isfinite()
            assert "cardinality" in name or ends[0][name] != ends[1][name]
            torch.testing.assert_close(2 * loss, ends[0][name] + ends[1][name], rtol=2e-2, atol=2e-2)


def test_weights_leave_the_targets_as_they_were(stock):
    images, targets = batch(split(torch.rand(5)))
    before = [dict(target) for target in targets]
    losses_on(weighted_copy(stock), images, targets)
    for target, old in zip(targets, before, strict=True):
        assert target.keys() == old.keys()
        assert all(target[key] is old[key] for key in old)


# ---- loops over rows ----

RANDOM = [0.3, 0.0, 1.7, 0.9, 0.4]


def inputs_of(model, weights):
    """What the heads get: features, anchors and resized targets."""
    images, targets = model.transform(*batch(split(weights)))
    features = model.backbone(images.tensors)
    return images, features, targets


def focal(logits, k):
    onehot = torch.zeros(len(logits))
    if k is not None:
        onehot[k] = 1.0
    return sigmoid_focal_loss(logits, onehot, reduction="none").sum()


def weight_of(target, k):
    return target["weights"][k] if k >= 0 else torch.tensor(1.0)


@pytest.mark.parametrize("stock", ["retinanet"], indirect=True)
def test_retinanet_agrees_with_a_loop_over_anchors(stock):
    calls = capture(stock.head, "compute_loss")
    losses_of(stock, split(RANDOM))
    targets, outputs, anchor_lists, matched = calls[0]
    cls, reg = 0.0, 0.0
    for i, target in enumerate(targets):
        foreground = max(1, int((matched[i] >= 0).sum()))
        for r, k in enumerate(matched[i].tolist()):
            if k == -2 or weight_of(target, k) == 0:
                continue  # neither positive nor negative
            w = weight_of(target, k) / foreground / len(targets)
            cls = cls + w * focal(outputs["cls_logits"][i, r], target["labels"][k] if k >= 0 else None)
            if k >= 0:
                goal = stock.box_coder.encode_single(target["boxes"][k][None], anchor_lists[i][r][None])[0]
                reg = reg + w * (outputs["bbox_regression"][i, r] - goal).abs().sum()
    del stock.head.compute_loss
    got = losses_of(weight_losses(stock), split(RANDOM))
    torch.testing.assert_close(got["classification"], cls)
    torch.testing.assert_close(got["bbox_regression"], reg)


@pytest.mark.parametrize("stock", ["fcos"], indirect=True)
def test_fcos_agrees_with_a_loop_over_points(stock):
    calls = capture(stock.head, "compute_loss")
    losses_of(stock, split(RANDOM))
    targets, outputs, anchor_lists, matched = calls[0]
    cls, reg, ctr, foreground = 0.0, 0.0, 0.0, max(1, sum(int((m >= 0).sum()) for m in matched))
    for i, target in enumerate(targets):
        for r, k in enumerate(matched[i].tolist()):
            w = weight_of(target, k) / foreground
            if w == 0:
                continue
            cls = cls + w * focal(outputs["cls_logits"][i, r], target["labels"][k] if k >= 0 else None)
            if k >= 0:
                anchor, box = anchor_lists[i][r], target["boxes"][k]
                predicted = stock.head.box_coder.decode(outputs["bbox_regression"][i, r], anchor)
                reg = reg + w * generalized_box_iou_loss(predicted[None], box[None])[0]
                left, top, right, bottom = stock.head.box_coder.encode(anchor, box).tolist()
                ratio = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
                goal = torch.tensor([math.sqrt(ratio)])
                ctr = ctr + w * F.binary_cross_entropy_with_logits(outputs["bbox_ctrness"][i, r], goal)
    del stock.head.compute_loss
    got = losses_of(weight_losses(stock), split(RANDOM))
    assert foreground > 3
    for name, loss in {"classification": cls, "bbox_regression": reg, "bbox_ctrness": ctr}.items():
        torch.testing.assert_close(got[name], loss)


@pytest.mark.parametrize("stock", ["ssd", "ssdlite"], indirect=True)
def test_ssd_agrees_with_a_loop_over_default_boxes(stock):
    calls = capture(stock, "compute_loss")
    model = weighted_copy(stock)
    model.__dict__.pop("compute_loss")
    losses_of(stock, split(RANDOM))
    targets, outputs, anchor_lists, matched = calls[0]
    cls, reg, foreground = 0.0, 0.0, max(1, sum(int((m >= 0).sum()) for m in matched))
    for i, target in enumerate(targets):
        negatives, positives = [], 0
        for r, k in enumerate(matched[i].tolist()):
            logits, w = outputs["cls_logits"][i, r], weight_of(target, k)
            if k < 0:
                negatives.append(-logits.log_softmax(0)[0])
                continue
            positives += 1
            goal = stock.box_coder.encode_single(target["boxes"][k][None], anchor_lists[i][r][None])[0]
            cls = cls - w * logits.log_softmax(0)[target["labels"][k]]
            reg = reg + w * F.smooth_l1_loss(outputs["bbox_regression"][i, r], goal, reduction="sum")
        hardest = sorted(negatives, key=torch.Tensor.item, reverse=True)[: int(stock.neg_to_pos_ratio * positives)]
        cls = cls + sum(hardest)
    got = losses_of(model, split(RANDOM))
    torch.testing.assert_close(got["classification"], cls / foreground)
    torch.testing.assert_close(got["bbox_regression"], reg / foreground)


@pytest.mark.parametrize("stock", ["fasterrcnn"], indirect=True)
def test_the_rpn_agrees_with_a_loop_over_sampled_anchors(stock):
    images, features, targets = inputs_of(stock, RANDOM)
    rpn = stock.rpn
    calls = capture(rpn, "compute_loss")
    rpn(images, features, targets)
    objectness, deltas, _, _ = calls[0]
    del rpn.compute_loss
    anchor_lists = rpn.anchor_generator(images, list(features.values()))
    matched = [
        rpn.proposal_matcher(box_iou(t["boxes"], a)) if len(t["boxes"]) else torch.full((len(a),), -1)
        for t, a in zip(targets, anchor_lists, strict=True)
    ]
    torch.manual_seed(5)
    positive, negative = rpn.fg_bg_sampler([torch.where(m >= 0, 1, m + 1) for m in matched])
    sampled = sum(int(p.sum() + n.sum()) for p, n in zip(positive, negative, strict=True))
    obj, reg, row = 0.0, 0.0, -1
    for i, target in enumerate(targets):
        for r, k in enumerate(matched[i].tolist()):
            row += 1
            if not positive[i][r] and not negative[i][r]:
                continue
            w = weight_of(target, k) / sampled
            goal = torch.tensor([1.0 if k >= 0 else 0.0])
            obj = obj + w * F.binary_cross_entropy_with_logits(objectness[row], goal)
            if positive[i][r]:
                goal = rpn.box_coder.encode_single(target["boxes"][k][None], anchor_lists[i][r][None])[0]
                reg = reg + w * F.smooth_l1_loss(deltas[row], goal, beta=1 / 9, reduction="sum")
    torch.manual_seed(5)
    got = weight_losses(stock).rpn(images, features, targets)[1]
    assert sum(int(p.sum()) for p in positive) > 3
    torch.testing.assert_close(got["loss_objectness"], obj)
    torch.testing.assert_close(got["loss_rpn_box_reg"], reg)


@pytest.mark.parametrize("stock", ["fasterrcnn", "maskrcnn", "keypointrcnn"], indirect=True)
def test_the_roi_heads_agree_with_a_loop_over_sampled_proposals(stock):
    images, features, targets = inputs_of(stock, RANDOM)
    heads, sizes = stock.roi_heads, images.image_sizes
    proposals = [p.detach() for p in stock.rpn(images, features, targets)[0]]
    torch.manual_seed(5)
    chosen, matched, labels, goals = heads.select_training_samples(proposals, targets)
    logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, chosen, sizes)))
    rows = [
        (i, j, int(k), int(y)) for i in range(3) for j, (k, y) in enumerate(zip(matched[i], labels[i], strict=True))
    ]
    goals = torch.cat(goals)
    sums = dict.fromkeys(("loss_classifier", "loss_box_reg", "loss_mask", "loss_keypoint"), 0.0)
    counts = {"loss_classifier": len(rows), "loss_box_reg": len(rows), "loss_mask": 0, "loss_keypoint": 0}
    foreground = [(row, *r) for row, r in enumerate(rows) if r[3] > 0]
    for row, (i, _, k, y) in enumerate(rows):
        w = targets[i]["weights"][k] if y > 0 else 1.0
        sums["loss_classifier"] -= w * logits[row].log_softmax(0)[y]
        if y > 0:
            delta = deltas[row, 4 * y : 4 * y + 4]
            sums["loss_box_reg"] += w * F.smooth_l1_loss(delta, goals[row], beta=1 / 9, reduction="sum")
    some = [chosen[i][labels[i] > 0] for i in range(3)]
    if heads.has_mask():
        masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, some, sizes)))
        for n, (_, i, j, k, y) in enumerate(foreground):
            goal = project_masks_on_boxes(targets[i]["masks"], chosen[i][j][None], torch.tensor([k]), masks.shape[-1])[
                0
            ]
            per_pixel = F.binary_cross_entropy_with_logits(masks[n, y], goal, reduction="none")
            sums["loss_mask"] += targets[i]["weights"][k] * per_pixel.sum()
            counts["loss_mask"] += per_pixel.numel()
    if heads.has_keypoint():
        maps = heads.keypoint_predictor(heads.keypoint_head(heads.keypoint_roi_pool(features, some, sizes)))
        for n, (_, i, j, k, _) in enumerate(foreground):
            places, valid = keypoints_to_heatmap(targets[i]["keypoints"][k][None], chosen[i][j][None], maps.shape[-1])
            for point in range(3):
                if valid[0, point]:
                    log_prob = maps[n, point].flatten().log_softmax(0)
                    sums["loss_keypoint"] -= targets[i]["weights"][k] * log_prob[places[0, point]]
                    counts["loss_keypoint"] += 1
    torch.manual_seed(5)
    got = weight_losses(stock).roi_heads(features, proposals, sizes, targets)[1]
    assert len(foreground) > 3
    for name, loss in got.items():
        torch.testing.assert_close(loss, sums[name] / counts[name])


# ---- the model stays what it was ----


def pickled(model):
    torch.save(model, saved := io.BytesIO())
    saved.seek(0)
    return torch.load(saved, weights_only=False)


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_copies_stay_weighted(stock, copied):
    model, weights = weighted_copy(stock), split(RANDOM)
    twin = copied(model)
    assert_same_bits(losses_of(twin, weights), losses_of(model, weights))


def test_state_dicts_load_both_ways(stock):
    model = weighted_copy(stock)
    assert list(model.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(stock.state_dict(), strict=True)


def test_a_second_call_changes_nothing(stock):
    model = weighted_copy(stock)
    classes = [type(module) for module in model.modules()]
    assert weight_losses(model) is model
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("targets", [None, "weighted"])
def test_results_in_eval_mode_are_the_same(stock, targets):
    images, given = batch(split(RANDOM))
    model = weighted_copy(stock).eval()
    stock.eval()
    for got, expected in zip(model(images, targets and given), stock(images, targets and given), strict=True):
        assert_same_bits(got, expected)


def test_proposals_and_samples_of_a_weighted_rcnn_are_plain_tensors():
    torch.manual_seed(1)
    model = weight_losses(DETECTORS["maskrcnn"]().train())
    images, features, targets = inputs_of(model, RANDOM)
    calls, sampled = capture(model.rpn, "compute_loss"), capture(model.rpn, "fg_bg_sampler")
    proposals, _ = model.rpn(images, features, targets)
    assert all(type(x) is torch.Tensor for x in (*calls[0][3], *sampled[0][0]))
    chosen, _, _, goals = model.roi_heads.select_training_samples(proposals, targets)
    assert all(type(x) is torch.Tensor for x in (*proposals, *goals))
    mask = weighted(torch.ones(len(chosen[0]), dtype=torch.bool), torch.rand(len(chosen[0])))
    assert all(type(x) is torch.Tensor for x in (torch.cat(chosen), chosen[0][mask], chosen[0] + 1))


# ---- mistakes of the caller ----


def test_a_model_without_a_known_head_raises():
    with pytest.raises(TypeError, match=r"Sequential holds none of .*RetinaNetHead, FCOSHead, SSD.*RoIHeads"):
        weight_losses(nn.Sequential(nn.Linear(2, 2)))


BAD = {
    "list": ([0.5, 0.5], TypeError, "must be a floating point tensor, but it is a list"),
    "integers": (torch.ones(2, dtype=torch.int64), TypeError, "floating point tensor, but it is a torch.int64 tensor"),
    "too_few": (torch.ones(1), ValueError, r"one weight for each of 2 boxes, but is \(1,\)"),
    "column": (torch.ones(2, 1), ValueError, r"one weight for each of 2 boxes, but is \(2, 1\)"),
    "elsewhere": (torch.ones(2, device="meta"), ValueError, "must be on cpu as the boxes are, but is on meta"),
    "nan": (torch.tensor([1.0, math.nan]), ValueError, r"finite and not negative, but holds \[1.0, nan\]"),
    "infinite": (torch.tensor([1.0, math.inf]), ValueError, "finite and not negative, but holds"),
    "negative": (torch.tensor([1.0, -0.5]), ValueError, "finite and not negative, but holds"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_raise_and_name_their_target(stock, name):
    weights, error, message = BAD[name]
    with pytest.raises(error, match=rf"targets\[1\]\['weights'\] .*{message}"):
        losses_of(weight_losses(stock), [torch.ones(3), weights, None])


@pytest.mark.parametrize("key", ["boxes", "labels"])
def test_a_nan_box_and_a_label_out_of_range_raise_and_name_their_target(stock, key):
    images, targets = batch(None)
    targets[1][key] = targets[1][key].clone()
    targets[1][key][0] = float("nan") if key == "boxes" else 99
    wrong = {
        "boxes": r"box 0 of targets\[1\] must be finite, but it is \[nan",
        "labels": r"label 0 of targets\[1\] must be a class .*to 3.* but it is 99",
    }
    with pytest.raises(ValueError, match=wrong[key]):
        losses_on(weight_losses(stock), images, targets)


@pytest.mark.parametrize("name", BAD)
def test_match_weights_raises_on_bad_weights(name):
    weights, error, message = BAD[name]
    with pytest.raises(error, match=rf"target\['weights'\] .*{message}"):
        match_weights({"boxes": torch.rand(2, 4), "weights": weights}, torch.tensor([0]))


# ---- helpers in public ----


def test_rows_without_a_box_weigh_one():
    target = {"boxes": torch.rand(2, 4), "weights": torch.tensor([0.25, 0.75])}
    rows = match_weights(target, torch.tensor([[1, -1], [-2, 0]]))
    assert torch.equal(rows, torch.tensor([[0.75, 1.0], [1.0, 0.25]]))
    assert torch.equal(match_weights({"boxes": torch.rand(0, 4)}, torch.tensor([-1, -1])), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_float32_whatever_the_target_holds(dtype):
    boxes = torch.rand(2, 4, dtype=torch.float64)
    assert check_weights({"boxes": boxes, "weights": torch.ones(2, dtype=dtype)}).dtype == torch.float32
    assert torch.equal(check_weights({"boxes": boxes}), torch.ones(2))
