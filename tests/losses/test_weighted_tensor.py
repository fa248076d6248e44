import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detmix.losses import WeightedTensor, weighted
from detmix.losses.rules import elementwise, reduce
from detmix.losses.weighted_tensor import RULES, weights_of

SHAPE = (2, 3, 4)
WEIGHTS = [(2, 3, 4), (2, 3, 1), (2, 1, 1), (1, 3, 1), (1, 1, 4), (1, 1, 1), (3, 1)]
MASK = torch.tensor([[True, False, True], [False, False, True]])


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def full(x):
    """The weights of x, one for each entry."""
    assert type(x) is WeightedTensor
    assert x.weights.ndim == x.ndim
    return weights_of(x).expand(x.shape)


# ---- entries move, and their weights with them ----

MOVES = {
    "view": lambda x: x.view(6, 4),
    "view_minus_one": lambda x: x.view(-1),
    "reshape_mixing": lambda x: x.reshape(4, 6),
    "reshape_ones": lambda x: x.reshape(1, 2, 1, 12),
    "flatten": lambda x: torch.flatten(x, 0, 1),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "transpose": lambda x: x.transpose(0, 2),
    "permute": lambda x: x.permute(2, 0, 1),
    "unbind": lambda x: torch.stack(list(reversed(x.unbind(1))), 1),
    "iterate": lambda x: torch.stack([row * 1 for row in x]),
    "split": lambda x: torch.cat(x.split([1, 3], 2)[::-1], 2),
    "chunk": lambda x: torch.cat(torch.chunk(x, 3, 1)[::-1], 1),
    "cat": lambda x: torch.cat([x, x[:, :1]], dim=1),
    "cat_twice": lambda x: torch.cat([x, x], dim=1),
    "expand": lambda x: x[None].expand(5, -1, -1, -1),
    "diagonal": lambda x: torch.diagonal(x, 0, 1, 2),
    "flip": lambda x: x.flip(2),
    "repeat": lambda x: x.repeat(2, 1, 3),
    "repeat_new_dim": lambda x: x.repeat(2, 1, 1, 2),
    "reshape_cutting_rows": lambda x: x.reshape(6, 2, 2),
    "clone": lambda x: x.clone().contiguous().double(),
    "where": lambda x: torch.where(torch.ones(4, dtype=torch.bool), x, 0.0),
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0])),
}
INDICES = {
    "int": 1,
    "negative": (slice(None), -1),
    "slice": (slice(1, 2), slice(0, 3, 2)),
    "empty_slice": slice(2, 2),
    "none": (slice(None), None, 1),
    "ellipsis": (..., 2),
    "ellipsis_none": (..., None),
    "mask": MASK,
    "mask_last": (MASK, 1),
    "mask_none": torch.zeros(2, dtype=torch.bool),
    "tensor": torch.tensor([1, 0, 1]),
    "tensor_pair": (torch.tensor([1, 0]), torch.tensor([2, 2])),
    "apart": (torch.tensor([1, 0]), slice(None), torch.tensor([3, 1])),
    "list": (slice(None), slice(None), [0, 2]),
    "scalar_tensor": torch.tensor(1),
    "two_dims": torch.tensor([[0, 1], [1, 1]]),
}


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
@pytest.mark.parametrize("name", MOVES)
def test_weights_move_with_their_entries(name, shape):
    move, weights = MOVES[name], 1 + rand(*shape)
    out = move(weighted(rand(*SHAPE, seed=1), weights))
    assert torch.equal(out.as_subclass(torch.Tensor), move(rand(*SHAPE, seed=1)))
    expected = weights.expand(SHAPE) if name == "where" else move(weights.expand(SHAPE).contiguous())
    assert torch.equal(full(out), expected.float())


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
@pytest.mark.parametrize("name", INDICES)
def test_weights_are_indexed_with_their_entries(name, shape):
    index, weights = INDICES[name], rand(*shape)
    out = weighted(rand(*SHAPE, seed=1), weights)[index]
    assert torch.equal(out.as_subclass(torch.Tensor), rand(*SHAPE, seed=1)[index])
    assert torch.equal(full(out), weights.expand(SHAPE)[index])


@pytest.mark.parametrize(
    "move", [lambda x: x.view(6, 4), lambda x: x[MASK], lambda x: x[0].sigmoid() * 2, lambda x: x[..., [0]]]
)
def test_one_weight_a_row_stays_one_weight_a_row(move):
    out = move(weighted(rand(*SHAPE), rand(2, 3, 1)))
    assert out.weights.shape == (*out.shape[:-1], 1)


def test_rows_gathered_with_a_weighted_index_weigh_what_it_weighs():
    index, weights = torch.tensor([2, 0, 2]), torch.tensor([0.5, 1.0, 2.0])
    table = rand(3, 5, 2)
    out = table[weighted(index, weights)]
    assert torch.equal(full(out), weights[:, None, None].expand(3, 5, 2))
    out = table[torch.arange(3), weighted(index, weights)]
    assert torch.equal(full(out), weights[:, None].expand(3, 2))


def test_extremes_and_sorted_values_weigh_what_their_entry_weighs():
    x, weights = rand(3, 4), rand(3, 1, seed=1)
    values, indices = weighted(x, weights).max(0)
    assert type(indices) is torch.Tensor
    assert torch.equal(full(values), weights.expand(3, 4).gather(0, indices[None])[0])
    assert torch.equal(full(weighted(x, weights).min(dim=1, keepdim=True).values), weights)
    values, indices = weighted(x, weights).sort(0, descending=True)
    assert torch.equal(full(values), weights.expand(3, 4).gather(0, indices))
    values, indices = torch.topk(weighted(x, weights), k=2, dim=0, largest=False)
    assert torch.equal(full(values), weights.expand(3, 4).gather(0, indices))
    assert torch.equal(values.as_subclass(torch.Tensor), torch.topk(x, 2, 0, largest=False).values)
    assert torch.equal(full(weighted(x, weights).topk(2).values), weights.expand(3, 2))
    assert torch.equal(full(torch.max(weighted(x, weights), torch.tensor(0.5))), weights.expand(3, 4))


SAMPLES = {
    "interpolate": lambda x: F.interpolate(x, size=(7, 3), mode="bilinear"),
    "grid_sample": lambda x: F.grid_sample(x, 2 * rand(2, 5, 6, 2, seed=3) - 1, align_corners=False),
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (1, 3, 1, 1), (2, 3, 1, 1)], ids=str)
def test_samples_of_a_map_weigh_what_the_map_weighs(name, shape):
    x, weights = rand(2, 3, 4, 4, seed=1), rand(*shape)
    out = SAMPLES[name](weighted(x, weights))
    assert torch.equal(out.as_subclass(torch.Tensor), SAMPLES[name](x))
    assert torch.equal(full(out), weights.expand(*out.shape))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (2, 1, 4, 4)], ids=str)
def test_samples_between_entries_of_different_weights_are_refused(name, shape):
    with pytest.raises(NotImplementedError, match=f"{name}.* has no rule that keeps these loss weights"):
        SAMPLES[name](weighted(rand(2, 3, 4, 4), rand(*shape)))


def test_samples_at_weighted_points_are_refused():
    points = weighted(rand(2, 5, 6, 2), rand(2, 1, 1, 1))
    with pytest.raises(NotImplementedError, match="grid_sample, called on a tensor of shape"):
        F.grid_sample(rand(2, 3, 4, 4), points, align_corners=False)


FRESH_OR_NOT = {
    "same_dtype": lambda x: x.to(x.dtype),
    "float": lambda x: x.float(),
    "contiguous": lambda x: x.contiguous(),
    "flatten": lambda x: x.flatten(),
    "view": lambda x: x.view(6),
    "expand": lambda x: x.expand(6),
    "type_as": lambda x: x.type_as(x),
    "cpu": lambda x: x.cpu(),
}


@pytest.mark.parametrize("name", FRESH_OR_NOT)
def test_a_function_that_returns_its_argument_leaves_its_type_and_weights(name):
    plain, weights = rand(6), rand(6, seed=1)
    x = weighted(plain, weights)
    out = FRESH_OR_NOT[name](x)
    out.rows = weighted(plain, 1 + weights).rows
    assert torch.equal(full(x), weights)
    FRESH_OR_NOT[name](plain)
    assert type(plain) is torch.Tensor


@pytest.mark.parametrize(
    "operate",
    [
        lambda x, y: y.type_as(x),
        lambda x, y: y.expand_as(x),
        lambda x, y: y.view_as(x) + x,
        lambda x, y: torch.stack([x, y]),
        lambda x, y: torch.cat([y, x]),
        lambda x, y: torch.where(y > 0.5, y, x),
        lambda x, y: torch.max(y, x),
        lambda x, y: y[weighted(torch.arange(4), rand(4))],
        lambda x, y: F.binary_cross_entropy(x, y, weight=y, reduction="none"),
    ],
)
def test_plain_operands_stay_plain(operate):
    y = rand(4, 3)
    operate(weighted(rand(4, 3, seed=1), rand(4, 1)), y)
    assert type(y) is torch.Tensor
    assert not hasattr(y, "rows")


# ---- weights apply where rows are summed ----


@pytest.fixture(params=[2**18, 0], ids=["as_product", "without_product"])
def totals(request, monkeypatch):
    """Totals of small tensors are computed as those of large ones are, too."""
    monkeypatch.setattr("detmix.losses.rules._LARGE", request.param)


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
@pytest.mark.parametrize("total", [torch.sum, torch.mean, torch.Tensor.sum, torch.Tensor.mean])
@pytest.mark.parametrize("dim", [None, 0, 1, -1, (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_a_total_is_the_total_of_weighted_entries(dim, total, shape, totals):
    x, weights = rand(*SHAPE, seed=1), rand(*shape)
    out = total(weighted(x, weights)) if dim is None else total(weighted(x, weights), dim)
    entries = (x * weights).sum(dim) if dim is not None else (x * weights).sum()
    count = 1 if "sum" in total.__name__ else x.numel() / max(entries.numel(), 1)
    if isinstance(out, WeightedTensor):  # rows of one weight each: still to be weighted
        assert out.weights.shape == out.shape or out.weights.numel() < weights.numel() or out.ndim < x.ndim
        out = out.as_subclass(torch.Tensor) * out.weights
    torch.testing.assert_close(out, entries / count)


def test_a_sum_within_rows_keeps_one_weight_a_row():
    x, weights = rand(5, 3), rand(5, 1, seed=1)
    for rows in (weighted(x, weights).sum(1), weighted(x, weights).mean(dim=-1), weighted(x, weights).sum((1,))):
        assert torch.equal(full(rows), weights[:, 0])
    assert full(weighted(x, weights).sum(1, keepdim=True)).shape == (5, 1)
    # A ratio of two such sums is a row's loss, and is weighted once.
    ratio = (1 - weighted(x, weights).sum(1) / weighted(x * x, weights).sum(1)).sum()
    torch.testing.assert_close(ratio, ((1 - x.sum(1) / (x * x).sum(1)) * weights[:, 0]).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("total", [torch.Tensor.sum, torch.Tensor.mean])
@pytest.mark.parametrize("shape", [(1234, 7), (1234, 1), (1, 7), (1, 1)])
def test_unit_weights_keep_every_bit_of_a_total_and_its_gradient(shape, total, dtype, totals):
    x, same = (rand(1234, 7).to(dtype).requires_grad_() for _ in range(2))
    expected, got = total(x.sigmoid()), total(weighted(same, torch.ones(shape)).sigmoid())
    (3 * expected).backward()
    (3 * got).backward()
    assert type(got) is torch.Tensor
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    assert torch.equal(same.grad, x.grad)


@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (1, 3), (1, 1)])
def test_a_total_has_the_gradients_of_the_weighted_entries(shape, totals):
    x = rand(4, 3).double().requires_grad_()
    weights = rand(*shape, seed=1).double().requires_grad_()
    for total in (torch.sum, torch.mean):
        got = torch.autograd.grad(total(weighted(x, weights) ** 2), (x, weights))
        expected = torch.autograd.grad(total(x**2 * weights), (x, weights))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.float32)], ids=str)
def test_a_total_is_in_the_dtype_of_the_entries_and_each_gradient_in_that_of_its_own(dtypes, totals):
    x, weights = (rand(40, 3, seed=i)[:, : 3 - 2 * i].to(d).requires_grad_() for i, d in enumerate(dtypes))
    total = weighted(x, weights).sigmoid().sum()
    assert total.dtype == x.dtype
    expected = (x.double().sigmoid() * weights.double()).sum()
    torch.testing.assert_close(total.double(), expected, rtol=1e-2, atol=0)
    for got, wanted in zip(*(torch.autograd.grad(loss, (x, weights)) for loss in (total, expected)), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=1e-2)


def test_sums_of_rows_are_not_rounded_on_the_way_to_a_total(totals):
    x = torch.tensor([[256, 1], [-256, 0]], dtype=torch.bfloat16)  # which has no 257
    assert weighted(x, torch.full((2, 1), 0.5)).sum() == 0.5


def test_a_total_of_nothing_is_zero(totals):
    assert weighted(rand(0, 4), rand(0, 1)).sum() == 0
    assert weighted(rand(3, 4), rand(3, 1))[torch.zeros(3, dtype=torch.bool)].view(-1).sum() == 0


LOSSES = {
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "mse": F.mse_loss,
    "huber": F.huber_loss,
    "bce": lambda x, y, **kw: F.binary_cross_entropy(x.sigmoid(), y, **kw),
    "bce_logits": F.binary_cross_entropy_with_logits,
    "bce_pos_weight": lambda x, y, **kw: F.binary_cross_entropy_with_logits(x, y, pos_weight=torch.tensor(2.0), **kw),
    "bce_weight": lambda x, y, **kw: F.binary_cross_entropy_with_logits(
        x, y, weight=torch.tensor([1.0, 3.0, 2.0]), **kw
    ),
}


@pytest.mark.parametrize("side", ["prediction", "target"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_weight_each_row(name, reduction, side):
    loss, x, y, weights = LOSSES[name], rand(5, 3), rand(5, 3, seed=1), rand(5, 1, seed=2)
    rows = loss(x, y, reduction="none") * weights
    got = loss(*((weighted(x, weights), y) if side == "prediction" else (x, weighted(y, weights))), reduction=reduction)
    if reduction == "none":
        got = got.as_subclass(torch.Tensor) * full(got)
    torch.testing.assert_close(got, rows if reduction == "none" else getattr(rows, reduction)())


@pytest.mark.parametrize("side", ["prediction", "target"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", [{}, {"ignore_index": 2}, {"weight": torch.tensor([1.0, 2.0, 3.0])}], ids=str)
def test_cross_entropy_weights_each_row_and_keeps_its_divisor(options, reduction, side):
    x, y, weights = rand(6, 3), torch.tensor([0, 2, 1, 1, 2, 0]), rand(6, seed=2)
    rows = F.cross_entropy(x, y, reduction="none", **options)
    divisor = 1.0
    if reduction == "mean":
        divisor = sum(options.get("weight", torch.ones(3))[k] for k in y if k != options.get("ignore_index"))
    args = (weighted(x, weights[:, None]), y) if side == "prediction" else (x, weighted(y, weights))
    got = F.cross_entropy(*args, reduction=reduction, **options)
    if reduction == "none":
        torch.testing.assert_close(got.as_subclass(torch.Tensor) * full(got), rows * weights)
    else:
        torch.testing.assert_close(got, (rows * weights).sum() / divisor)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.binary_cross_entropy_with_logits])
def test_unit_weights_keep_every_bit_of_a_mean_loss(loss, dtype, autocast):
    y = torch.arange(1000) % 9 if loss is F.cross_entropy else rand(1000, 9, seed=1)
    x, same = (rand(1000, 9).to(dtype).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, got = loss(x, y), loss(weighted(same, torch.ones(1000, 1)), y)
    expected.backward()
    got.backward()
    assert torch.equal(got, expected)
    assert torch.equal(same.grad, x.grad)


# ---- nothing loses its weights in silence ----

LOSSY = {
    "cumsum": lambda x: x.cumsum(0),
    "matmul": lambda x: x @ rand(3, 4),
    "matmul_other": lambda x: rand(2, 4) @ x,
    "linear": lambda x: F.linear(x, rand(2, 3)),
    "einsum": lambda x: torch.einsum("ij,ij->i", x, x),
    "prod": lambda x: x.prod(1),
    "norm": lambda x: x.norm(dim=1),
    "max_of_all": lambda x: x.max(),
    "softmax_over_rows": lambda x: x.softmax(0),
    "in_place": lambda x: x.add_(1),
    "property": lambda x: x.T,
    "backward": lambda x: x[0, 0].backward(),
    "into_plain": lambda x: torch.zeros(4, 3).__setitem__(slice(None), x),
    "out": lambda x: torch.add(x, 1, out=torch.empty(4, 3)),
    "label_smoothing": lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.int64), label_smoothing=0.1),
    "pos_weight": lambda x: F.binary_cross_entropy_with_logits(rand(4, 3), rand(4, 3), pos_weight=x),
    "one_hot": lambda x: torch.zeros(4, 3).__setitem__((torch.arange(4), x[:, 0].long()), 1.0),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", LOSSY)
def test_a_function_without_a_rule_raises(name, grad):
    x = weighted(1 * rand(4, 3).requires_grad_(grad), rand(4, 1))
    with pytest.raises(NotImplementedError, match=r"RULES\["):
        LOSSY[name](x)


def test_the_error_names_the_function_the_shapes_and_the_way_out():
    x = weighted(rand(4, 3), rand(4, 1))
    with pytest.raises(NotImplementedError, match=r"torch.Tensor.cumsum.*\(4, 3\) with weights \(4, 1\).*RULES\["):
        x.cumsum(0)


def test_a_new_rule_is_heeded(monkeypatch):
    monkeypatch.setitem(RULES, torch.erf, elementwise)
    assert torch.equal(full(torch.erf(weighted(rand(4, 3), rand(4, 1)))), rand(4, 1).expand(4, 3))


def test_rows_meet_only_themselves():
    x = rand(4, 3)
    for other in (weighted(x, rand(4, 1, seed=3)), weighted(x.T, rand(3, 1)).transpose(0, 1)):
        with pytest.raises(NotImplementedError, match="different loss weights"):
            weighted(x, rand(4, 1, seed=2)) * other
    for device in ("cpu", "meta"):  # every row with every row, which shapes tell where values are not looked at
        with pytest.raises(NotImplementedError, match="different loss weights"):
            weighted(x[:, :1].to(device), rand(4, 1).to(device)) - weighted(x[:, 0].to(device), rand(4).to(device))
    zeros = torch.zeros_like(weighted(x, rand(4, 1)))
    with pytest.raises(NotImplementedError, match="different loss weights"):
        zeros[MASK.T.any(1).repeat(2)[:4]] = weighted(x, rand(4, 1, seed=2))[MASK.T.any(1).repeat(2)[:4]]
    same = weighted(x, rand(4, 1)) * weighted(x, rand(4, 1).expand(4, 3))  # equal weights, in two shapes
    assert torch.equal(full(same), rand(4, 1).expand(4, 3))


def test_comparisons_indices_and_sizes_are_plain():
    x = weighted(rand(4, 3), rand(4, 1))
    assert type(x > 0.5) is torch.Tensor
    assert type(x.argmax(1)) is torch.Tensor
    assert type(torch.where(x > 0.5)[0]) is torch.Tensor
    assert x.shape == (4, 3)
    assert x.numel() == 12
    assert weighted(torch.ones(3, dtype=torch.int64), rand(3)).sum() == 3  # a count


def test_weights_that_do_not_broadcast_raise():
    for weights in (rand(4), rand(3, 1), rand(1, 4, 3)):
        with pytest.raises(ValueError, match=r"do not broadcast to the tensor's \(4, 3\)"):
            weighted(rand(4, 3), weights)


def test_weighting_leaves_the_tensor_as_it_was():
    x = rand(4, 3)
    weighted(x, rand(4, 1)).sum()
    assert type(x) is torch.Tensor
    assert torch.equal(x, rand(4, 3))


def test_a_new_sum_is_heeded(monkeypatch, totals):
    monkeypatch.setitem(RULES, torch.nansum, reduce)
    x = torch.tensor([[1.0, torch.nan], [2.0, 3.0]])
    assert torch.nansum(weighted(x, torch.tensor([[0.5], [2.0]]))) == 10.5
    assert weighted(x[1:], torch.tensor([[0.5]])).sum(dtype=torch.float64).dtype == torch.float64


def test_what_is_detached_is_a_constant_and_what_it_multiplies_has_the_weights():
    x = rand(2, 3).requires_grad_()
    rows = weighted(x, torch.tensor([[0.25], [0.5]]))
    constant = rows.detach()
    assert type(constant) is torch.Tensor
    assert not constant.requires_grad
    expected = (x * x.detach() * torch.tensor([[0.25], [0.5]])).sum()
    torch.testing.assert_close((rows * constant).sum(), expected)
    target = torch.zeros(2)
    target[:] = constant.mean(1)  # as criteria write an IoU into their targets
    assert type(target) is torch.Tensor


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_the_divergence_of_each_row_counts_by_its_weight(reduction):
    log_p, q, weights = (
        F.log_softmax(rand(3, 4), 1),
        F.softmax(rand(3, 4, seed=1), 1),
        torch.tensor([[0.5], [0.0], [2.0]]),
    )
    each = F.kl_div(log_p, q, reduction="none") * weights
    expected = {"none": each.sum(), "sum": each.sum(), "mean": each.mean(), "batchmean": each.sum() / 3}[reduction]
    loss = F.kl_div(weighted(log_p, weights), q, reduction=reduction)
    torch.testing.assert_close(loss.sum() if reduction == "none" else loss, expected)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_an_index_that_was_changed_gathers_other_weights(make):
    x, index = weighted(torch.ones(3, 2), torch.tensor([[1.0], [2.0], [4.0]])), make([0, 1])
    assert x[index].sum() == 6
    index[0] = 2
    assert x[index].sum() == 12
