"""Weighted detectors among what else a training loop holds: averages, precisions, optimizers, checkpoints."""

import copy
import gc

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detmix.losses import WeightedTensor
from tests.losses.tiny import (
    DETECTORS,
    EVERY,
    ONES,
    WEIGHTS,
    assert_same_bits,
    batch,
    gradients,
    losses_of,
    losses_on,
    split,
    tiny,
    weighted_copy,
)


@pytest.fixture(params=EVERY)
def stock(request):
    return tiny(request.param)


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def step(model, optimizer, weights=None):
    optimizer.zero_grad()
    sum(losses_of(model, weights).values()).backward()
    optimizer.step()


def assert_same_results(model, stock):
    images, _ = batch()
    for got, expected in zip(model.eval()(images), stock.eval()(images), strict=True):
        assert_same_bits(got, expected)


def test_an_average_of_a_weighted_model_is_weighted_and_agrees_with_an_average_of_the_stock_one(stock):
    model = weighted_copy(stock)
    of_stock, of_model = (AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for m in (stock, model))
    for trained, average, weights in ((stock, of_stock, None), (model, of_model, ONES)):
        optimizer = adam(trained)
        for _ in range(2):
            step(trained, optimizer, weights)
            average.update_parameters(trained)
    assert_same_bits(of_model.state_dict(), of_stock.state_dict())
    assert_same_results(of_model, of_stock)
    of_model.train()
    losses, unweighted, newest = losses_of(of_model, WEIGHTS), losses_of(of_model), losses_of(model, WEIGHTS)
    assert_same_bits(losses, losses_of(weighted_copy(of_stock.module.train()), WEIGHTS))
    assert all(loss not in (unweighted[k], newest[k]) for k, loss in losses.items() if "cardinality" not in k)


def test_a_scaled_step_in_float16_is_the_stock_one_at_unit_weights(stock):
    model = weighted_copy(stock)
    before = copy.deepcopy(model.state_dict())
    for trained, weights in ((stock, None), (model, ONES)):
        optimizer, scaler = adam(trained), torch.amp.GradScaler("cpu", init_scale=8.0)
        with torch.autocast("cpu", torch.float16):
            losses = losses_of(trained, weights)
        scaler.scale(sum(losses.values())).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 8.0  # no gradient overflowed, so the step was taken
    assert_same_bits(model.state_dict(), stock.state_dict())
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


# In halves stock stops elsewhere: torchvision's NMS and what transformers computes in float32 know none on the CPU.
DENSE = ("retinanet", "fcos", "ssd", "ssdlite")


@pytest.mark.parametrize(
    ("stock", "dtype"),
    [(name, dtype) for name in DENSE for dtype in (torch.bfloat16, torch.float16)]
    + [(name, torch.float64) for name in DETECTORS],
    indirect=["stock"],
)
def test_a_model_of_another_dtype_keeps_every_bit_at_unit_weights(stock, dtype):
    model = weighted_copy(stock.to(dtype))
    images = [image.to(dtype) for image in batch()[0]]
    expected, got = losses_on(stock, images, batch()[1]), losses_on(model, images, batch(ONES)[1])
    assert_same_bits(got, expected)
    assert_same_bits(gradients(model, got), gradients(stock, expected))
    for term, loss in losses_on(model, images, batch(WEIGHTS)[1]).items():
        assert loss.isfinite()
        assert loss != got[term]
        assert loss.dtype == got[term].dtype


# torchvision's loss of keypoints views heatmaps that must not be so; torch 2.15 crashes in the stock RT-DETR's backward
# pass on two threads.
@pytest.mark.parametrize("stock", [name for name in EVERY if name not in ("keypointrcnn", "rtdetr")], indirect=True)
def test_channels_last_keeps_every_bit_at_unit_weights(stock):
    model = weighted_copy(stock.to(memory_format=torch.channels_last))
    expected, got = losses_of(stock), losses_of(model, ONES)
    assert_same_bits(got, expected)
    assert_same_bits(gradients(model, got), gradients(stock, expected))


def test_gradients_of_two_batches_add_up_and_one_step_takes_them(stock):
    batches = batch(WEIGHTS), batch(split([0.8, 0.1, 0.5, 2.0], (1, 3)), (1, 3))
    first, second = (gradients(m, losses_on(m, *b)) for b, m in ((b, weighted_copy(stock)) for b in batches))
    model = weighted_copy(stock)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, targets in batches:
        sum(losses_on(model, images, targets).values()).backward()
    optimizer.step()
    before = dict(stock.named_parameters())
    assert any(grad is not None for grad in first.values())
    for name, parameter in model.named_parameters():
        if first[name] is None:
            assert torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter.grad, first[name] + second[name])
            assert torch.equal(parameter, before[name].sub(parameter.grad, alpha=0.1))


def test_training_goes_on_from_a_checkpoint_in_a_weighted_and_in_a_stock_model(stock, tmp_path):
    model = weighted_copy(stock)
    optimizer, path = adam(model), tmp_path / "checkpoint.pt"
    for _ in range(2):
        step(model, optimizer, WEIGHTS)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    resumed = []
    for twin in (weighted_copy(stock), stock):
        saved, its_optimizer = torch.load(path, weights_only=True), adam(twin)
        twin.load_state_dict(saved["model"], strict=True)
        its_optimizer.load_state_dict(saved["optimizer"])
        resumed.append((twin, its_optimizer))
    (twin, _), (plain, _) = resumed
    assert_same_results(plain, twin)
    for weights in (None, WEIGHTS):
        for trained, its_optimizer in ((model, optimizer), *resumed):
            step(trained.train(), its_optimizer, weights)
            assert_same_bits(trained.state_dict(), model.state_dict())
        resumed.pop()  # the stock one, which knows no weights


def test_a_switch_to_eval_and_back_leaves_the_losses(stock):
    model = weighted_copy(stock)
    before = losses_of(model, WEIGHTS)
    with torch.no_grad():
        model.eval()(*batch(WEIGHTS))
    assert_same_bits(losses_of(model.train(), WEIGHTS), before)


def test_frozen_parameters_get_no_gradients_and_the_others_keep_theirs(stock):
    model = weighted_copy(stock)
    losses = losses_of(model, WEIGHTS)
    expected = gradients(model, losses)
    frozen = {name for name in expected if "backbone" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen and expected[name] is not None)
    again = losses_of(model, WEIGHTS)
    assert_same_bits(again, losses)
    assert frozen
    assert_same_bits(gradients(model, again), expected | dict.fromkeys(frozen))
    still = losses_of(model.requires_grad_(False), WEIGHTS)
    torch.testing.assert_close(still, losses)  # attention without gradients takes another kernel
    assert not any(loss.requires_grad for loss in still.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_losses_are_weighted_without_gradients_too(stock, mode):
    model = weighted_copy(stock)
    expected = losses_of(model, WEIGHTS)
    with mode():
        assert_same_bits(losses_of(model, WEIGHTS), expected)


@pytest.fixture
def without_collector():
    """Nothing is collected, and what was there before is not counted, of which there is much."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def live(kind):
    return sum(issubclass(type(x), kind) for x in gc.get_objects())


def test_steps_leave_no_weighted_tensor_and_no_memory_behind(stock, without_collector):
    """Reference counts alone free them: a cycle would hold its GPU memory until the collector happens to run."""
    model = weighted_copy(stock)
    optimizer = adam(model)
    before, tensors = live(WeightedTensor), []
    for _ in range(4):
        step(model, optimizer, WEIGHTS)
        assert live(WeightedTensor) == before
        tensors.append(live(torch.Tensor))
    assert tensors[1] == tensors[2] == tensors[3]
