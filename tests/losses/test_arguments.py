"""Functions called in every way that torch has: older arguments, other names, in place."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detmix.losses import RULES, WeightedTensor, rows, weighted

RNG = torch.Generator().manual_seed(0)
X, Y, V = (torch.rand(3, 4, generator=RNG) for _ in range(3))
WEIGHTS = torch.tensor([[0.25], [0.5], [2.0]])


@pytest.fixture
def x():
    return weighted(X.clone(), WEIGHTS)


ELEMENT_LOSSES = [F.l1_loss, F.smooth_l1_loss, F.mse_loss, F.kl_div, F.binary_cross_entropy, F.soft_margin_loss]
ELEMENT_LOSSES += [F.binary_cross_entropy_with_logits, F.hinge_embedding_loss, F.poisson_nll_loss]


@pytest.mark.filterwarnings("ignore:size_average and reduce", "ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("loss", ELEMENT_LOSSES)
def test_older_reductions_mean_what_they_mean_to_torch(loss, x):
    each = loss(X, Y, reduction="none") * WEIGHTS
    for options, expected in [
        ({"size_average": False}, each.sum()),
        ({"size_average": True}, each.mean()),
        ({"reduce": True}, each.mean()),
        ({"size_average": False, "reduce": True}, each.sum()),
    ]:
        torch.testing.assert_close(loss(x, Y, **options), expected)
    each = loss(x, Y, reduce=False)
    assert each.shape == (3, 4)
    torch.testing.assert_close(each.sum(), (loss(X, Y, reduction="none") * WEIGHTS).sum())


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("loss", [F.cross_entropy, F.nll_loss])
def test_older_reductions_of_classes(loss, x):
    y = torch.tensor([0, 3, 1])
    each = loss(X, y, reduction="none") * WEIGHTS[:, 0]
    torch.testing.assert_close(loss(x, y, size_average=False), each.sum())
    torch.testing.assert_close(loss(x, y, None, None, -100, None, "sum"), each.sum())
    torch.testing.assert_close(loss(x, y), each.mean())
    assert loss(x, y, reduce=False).shape == (3,)
    ignored = (each * (y != 3)).sum()
    torch.testing.assert_close(loss(x, y, ignore_index=3, reduction="sum"), ignored)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.huber_loss])
def test_weights_of_entries_mean_what_they_mean_to_torch(loss, reduction, x):
    unit = weighted(X, torch.ones(3, 1))
    stock = loss(X, Y, weight=V, reduction=reduction)
    assert torch.equal(loss(unit, Y, weight=V, reduction=reduction).as_subclass(torch.Tensor), stock)
    terms = (loss(X, Y, weight=V, reduction="none") * WEIGHTS).sum()
    divisor = {"none": 1, "sum": 1, "mean": X.numel() if loss is F.huber_loss else V.sum()}[reduction]
    for got in (loss(x, Y, weight=V, reduction=reduction), loss(Y, x, weight=V, reduction=reduction)):
        torch.testing.assert_close(got.sum() if reduction == "none" else got, terms / divisor)


MORE_LOSSES = {
    "huber by position": lambda x: F.huber_loss(x, Y, "sum", 0.5),
    "smooth l1 by position": lambda x: F.smooth_l1_loss(x, Y, None, None, "sum", 0.5),
    "bce by position": lambda x: F.binary_cross_entropy_with_logits(x, Y, None, None, None, "sum"),
    "gaussian": lambda x: F.gaussian_nll_loss(x, Y, V + 1, reduction="sum"),
    "gaussian of one variance": lambda x: F.gaussian_nll_loss(x, Y, 0.5, full=True, reduction="sum"),
    "ranking": lambda x: F.margin_ranking_loss(x, Y, torch.where(V > 0.5, 1.0, -1.0), margin=0.1, reduction="sum"),
    "nll": lambda x: F.nll_loss(x, torch.tensor([1, 0, 3]), reduction="sum"),
    "nansum": lambda x: torch.nansum(x),
}


@pytest.mark.parametrize("name", MORE_LOSSES)
def test_more_losses_are_the_sums_over_rows(name, x):
    stock = MORE_LOSSES[name](X)
    assert torch.equal(MORE_LOSSES[name](weighted(X, torch.ones(3, 1))), stock)
    zero = MORE_LOSSES[name](weighted(X, torch.zeros(3, 1)))
    one = [MORE_LOSSES[name](weighted(X, torch.eye(3)[:, [i]])) for i in range(3)]
    assert zero == 0
    torch.testing.assert_close(sum(one), stock)
    assert len({round(float(value), 4) for value in one}) == 3
    torch.testing.assert_close(
        MORE_LOSSES[name](x), sum(w * value for w, value in zip(WEIGHTS[:, 0], one, strict=True))
    )


SAME_CALLS = {
    "mean axis": (lambda x: x.mean(axis=1), lambda x: x.mean(1)),
    "sum axis keepdims": (lambda x: x.sum(axis=1, keepdims=True), lambda x: x.sum(1, True)),
    "sum input": (lambda x: torch.sum(input=x, dim=1), lambda x: x.sum(1)),
    "mean dtype": (lambda x: x.mean(axis=-1, dtype=torch.float32), lambda x: x.mean(1)),
    "cat axis": (lambda x: torch.cat(tensors=[x, x], axis=1), lambda x: torch.cat([x, x], 1)),
    "concat": (lambda x: torch.concatenate([x, x], axis=0), lambda x: torch.cat([x, x])),
    "stack": (lambda x: torch.stack(tensors=[x, x], dim=1), lambda x: torch.stack([x, x], 1)),
    "chunk": (lambda x: torch.chunk(input=x, chunks=2, dim=1)[0], lambda x: x[:, :2]),
    "chunk axis": (lambda x: x.chunk(chunks=2, axis=1)[0], lambda x: x[:, :2]),
    "split": (lambda x: x.split(split_size=2, dim=1)[0], lambda x: x[:, :2]),
    "split sections": (lambda x: torch.split(x, split_size_or_sections=[3, 1], dim=1)[1], lambda x: x[:, 3:]),
    "max axis": (lambda x: x.max(axis=1).values, lambda x: x.max(1)[0]),
    "max keepdim": (lambda x: torch.max(input=x, dim=1, keepdim=True)[0], lambda x: x.max(1, True)[0]),
    "max other": (lambda x: torch.max(x, other=Y), lambda x: torch.maximum(x, Y)),
    "sort axis": (lambda x: torch.sort(input=x, axis=1, descending=True)[0], lambda x: x.sort(1, True)[0]),
    "topk": (lambda x: x.topk(dim=1, k=2)[0], lambda x: x.topk(2, 1)[0]),
    "unbind axis": (lambda x: x.unbind(axis=1)[0], lambda x: x[:, 0]),
    "transpose": (lambda x: torch.transpose(input=x, dim0=0, dim1=1), lambda x: x.transpose(0, 1)),
    "permute": (lambda x: x.permute(dims=(1, 0)), lambda x: x.transpose(0, 1)),
    "unsqueeze": (lambda x: torch.unsqueeze(input=x, dim=0), lambda x: x[None]),
    "flatten": (lambda x: torch.flatten(input=x, start_dim=0), lambda x: x.view(-1)),
    "softmax": (lambda x: torch.softmax(input=x, dim=1), lambda x: x.softmax(1)),
    "softmax axis": (lambda x: x.softmax(axis=1), lambda x: x.softmax(1)),
    "add": (lambda x: torch.add(input=x, other=Y, alpha=2), lambda x: x + 2 * Y),
    "add as numpy does": (lambda x: torch.add(x1=x, x2=Y), lambda x: x + Y),
    "clamp": (lambda x: torch.clamp(input=x, min=0.2, max=0.5), lambda x: x.clamp(0.2, 0.5)),
    "where": (lambda x: torch.where(condition=Y > 0.5, input=x, other=0.0), lambda x: torch.where(Y > 0.5, x, 0.0)),
    "repeat": (lambda x: x.repeat(repeats=(2, 1)), lambda x: x.repeat(2, 1)),
    "narrow": (lambda x: x.narrow(1, 1, 2), lambda x: x[:, 1:3]),
    "narrow rows": (lambda x: torch.narrow(x, dim=0, start=1, length=2), lambda x: x[1:3]),
    "select": (lambda x: x.select(1, 2), lambda x: x[:, 2]),
    "select row": (lambda x: x.select(dim=0, index=2), lambda x: x[2]),
    "gather": (
        lambda x: x.gather(1, torch.tensor([[0, 2], [1, 1], [3, 0]])),
        lambda x: torch.stack([x[:, 0], x[:, 2]], 1),
    ),
    "amax": (lambda x: x.amax(dim=(1,), keepdim=True), lambda x: x.max(1, True)[0]),
    "logsumexp": (lambda x: torch.logsumexp(x, dim=1), lambda x: x.exp().sum(1).log()),
    "deepcopy": (copy.deepcopy, lambda x: x),
}


@pytest.mark.parametrize("name", SAME_CALLS)
def test_a_call_by_other_names_is_the_same(name, x):
    call, same = (function(x) for function in SAME_CALLS[name])
    if name != "gather":
        torch.testing.assert_close(call.as_subclass(torch.Tensor), same.as_subclass(torch.Tensor))
    assert call.weights.shape == same.weights.shape
    assert torch.equal(call.weights, same.weights)


MOVES = {
    "columns by an index": lambda x: x[:, torch.tensor([0, 2])],
    "columns by a list": lambda x: x[:, [0, 2]],
    "columns by a mask": lambda x: x[:, torch.tensor([True, False, True, False])],
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 2])),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "repeat": lambda x: x.repeat(1, 2),
    "narrow": lambda x: x.narrow(1, 0, 2),
    "take_along_dim": lambda x: x.take_along_dim(torch.tensor([[0, 2]]), 1),
    "gather": lambda x: x.gather(1, torch.tensor([[0, 2]] * 3)),
    "diagonal": lambda x: x[:, None].expand(3, 4, 4).diagonal(0, 1, 2),
    "empty and more": lambda x: torch.cat([x[:, :0], x], 1),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_row_whose_entries_are_moved_is_weighted_once(name, x):
    expected = ((MOVES[name](X).mean(1) ** 2) * WEIGHTS[:, 0]).sum()
    torch.testing.assert_close((MOVES[name](x).mean(1) ** 2).sum(), expected)


def test_an_argument_that_a_rule_does_not_know_is_refused_by_name(x, monkeypatch):
    monkeypatch.setitem(RULES, torch.round, lambda func, input: weighted(func(input), WEIGHTS))
    torch.testing.assert_close(torch.round(input=x).sum(), (X.round() * WEIGHTS).sum())
    with pytest.raises(NotImplementedError, match=r"torch.round was called with decimals=, .* without decimals"):
        torch.round(x, decimals=1)


def test_empty_tensors_join():
    x = weighted(torch.rand(2, 3, 4), torch.rand(2, 3, 1))
    none = torch.zeros(3, dtype=torch.bool)
    for join in (torch.cat, torch.concat, torch.stack):
        assert join([x[i][none] for i in range(2)]).sum() == 0
    some = torch.cat([x[0][none], x[1]])
    assert torch.equal(some.weights, x.weights[1])
    assert torch.equal(torch.cat([torch.zeros(0), x[0]]).weights, x.weights[0])


# ---- in place ----

PLAIN = torch.arange(12.0).view(3, 4)
IN_PLACE = {
    "mul_": lambda x, z: x.mul_(2),
    "add_": lambda x, z: x.add_(1),
    "clamp_": lambda x, z: torch.clamp_(x, 0, 0.1),
    "zero_": lambda x, z: x.zero_(),
    "iadd": lambda x, z: x.__iadd__(1),
    "itruediv": lambda x, z: x.__itruediv__(2),
    "data": lambda x, z: setattr(x, "data", z),
    "plain add_": lambda x, z: z.add_(x),
    "plain iadd": lambda x, z: z.__iadd__(x),
    "copy_": lambda x, z: z.copy_(x),
    "index_add_": lambda x, z: z.index_add_(0, torch.arange(3), x),
    "index_copy_": lambda x, z: z.index_copy_(0, torch.arange(3), x),
    "scatter_": lambda x, z: z.scatter_(1, torch.zeros(3, 4, dtype=torch.int64), x),
    "masked_scatter_": lambda x, z: z.masked_scatter_(z > 3, x),
    "put_": lambda x, z: z.put_(torch.arange(12), x),
    "setitem": lambda x, z: z.__setitem__(slice(None), x),
    "out": lambda x, z: torch.add(x, 1, out=z),
    "out is weighted": lambda x, z: torch.add(z, 1, out=x),
    "dropout": lambda x, z: F.dropout(x, inplace=True),
    "init": lambda x, z: torch.nn.init.uniform_(x),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_functions_that_write_are_refused_before_they_do(name, x):
    z, before = PLAIN.clone(), x.as_subclass(torch.Tensor).clone()
    with pytest.raises(NotImplementedError, match=r"RULES\["):
        IN_PLACE[name](x, z)
    assert torch.equal(z, PLAIN)
    assert torch.equal(x.as_subclass(torch.Tensor), before)


# ---- weights that meet ----


def test_weights_of_weighted_tensors_multiply(x):
    other = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    torch.testing.assert_close(weighted(x, other).sum(), (X * WEIGHTS * other).sum())
    labels = weighted(weighted(torch.arange(3), WEIGHTS[:, 0]), WEIGHTS[:, 0])
    torch.testing.assert_close(X[labels].sum(), (X * WEIGHTS**2).sum())


def test_weights_are_compared_on_the_device_where_they_cannot_be_read(x, monkeypatch):
    monkeypatch.setattr(rows, "is_readable", lambda _: False)
    asked = []
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("reads values"))
    monkeypatch.setattr(torch, "_assert_async", lambda truth, message: asked.append((bool(truth), message)))
    x + x * 2
    assert asked == []
    x + weighted(X, WEIGHTS.clone())
    assert [truth for truth, _ in asked] == [True]
    x[:2] - x[1:]
    truth, message = asked[-1]
    assert not truth
    assert "torch.Tensor.sub was called on tensors of different loss weights, of shape (2, 4) with" in message
    assert "detach()" in message


def test_different_weights_on_the_device_are_an_error(x, monkeypatch):
    monkeypatch.setattr(rows, "is_readable", lambda _: False)
    with pytest.raises(RuntimeError, match="sub was called on tensors of different loss weights"):
        x[:2] - x[1:]


# ---- indices ----

INDICES = {
    "array": np.array([1, 0]),
    "array of columns": (slice(None), np.array([0, 2])),
    "array of truth": np.array([True, False, True]),
    "array of truth of all": X.numpy() > 0.5,
    "number": np.int64(1),
    "number of a column": (slice(None), np.int64(2)),
    "number of an array": np.array(1),
    "tuple": (0, 1),
    "tuple in a tuple": ((0, 1),),
    "tuple of columns": (slice(None), (0, 2)),
    "tuples": ((0, 1), (2, 3)),
    "range": range(2),
    "range of columns": (slice(None), range(1, 3)),
    "list": [2, 0],
    "list of truth": [True, False, True],
    "list of lists": [[0, 1], [2, 3]],
    "list of one list": [[0, 1]],
    "nested lists": ([[0, 1], [2, 2]],),
    "three lists": [[[0, 1], [2, 0]]],
    "list with a slice": [slice(None), [0, 2]],
    "list of a tensor": [torch.tensor([0, 2])],
    "truth": True,
    "mixed": (np.array([0, 2]), slice(1, 3)),
    "arrays": (np.array([0, 2]), np.array([3, 1])),
    "array beside a tensor": (np.array([0, 2]), torch.tensor([3, 1])),
    "array and none": (None, np.array([0, 2])),
    "array and ellipsis": (..., np.array([0, 2])),
    "bytes": torch.tensor([1, 0, 1], dtype=torch.uint8),
    "empty": [],
    "int32": torch.tensor([1, 0], dtype=torch.int32),
}


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8", "ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("name", INDICES)
def test_an_index_of_any_kind_is_read_as_torch_reads_it(name, x):
    index = INDICES[name]
    try:
        expected = X[index]
    except (IndexError, TypeError) as error:
        with pytest.raises(type(error)):
            x[index]
        return
    out = x[index]
    assert torch.equal(out.as_subclass(torch.Tensor), expected)
    assert torch.equal(out.weights.expand(out.shape), WEIGHTS.expand(3, 4)[index])
    wide = torch.rand(3, 4, generator=RNG)
    assert torch.equal(weighted(X, wide)[index].weights.expand(out.shape), wide[index])
    if name == "bytes":
        return  # of which torch writes none
    x[index] = 0.0
    written = X.clone()
    written[index] = 0.0
    assert torch.equal(x.as_subclass(torch.Tensor), written)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_weighted_numbers_in_a_list_are_refused_by_name():
    index, weights = torch.tensor([0, 1]), torch.rand(2, generator=RNG)
    beside = X[[weighted(index, weights), [0, 1]]]  # which torch reads as a tuple
    assert torch.equal(beside.weights, weights)
    with pytest.raises(
        NotImplementedError, match=r"__getitem__.*with an index of tuple that it cannot read; index with"
    ):
        weighted(X, WEIGHTS)[:, list(weighted(index, weights))]


@pytest.mark.parametrize("change", ["numpy", "data", "itself"])
def test_an_index_changed_in_memory_gathers_other_weights(change, x):
    array = np.array([0, 1])
    index = torch.from_numpy(array)
    assert x[index] is not None
    if change == "numpy":
        array[0] = 2
    else:
        (index.data if change == "data" else index)[0] = 2
    torch.testing.assert_close(x[index].sum(), (X * WEIGHTS)[[2, 1]].sum())


def test_an_index_changed_on_a_device_is_an_error(x, monkeypatch):
    index = torch.tensor([0, 1])
    monkeypatch.setattr(rows, "is_readable", lambda _: False)
    first = x[index]
    assert x[index].rows is first.rows
    index.data[0] = 2
    with pytest.raises(RuntimeError, match="An index was changed"):
        x[index]


# ---- refused by name ----

REFUSED = {
    "hstack": lambda x: torch.hstack([x, x]),
    "vstack": lambda x: torch.vstack([x, x]),
    "dstack": lambda x: torch.dstack([x, x]),
    "pad_sequence": lambda x: torch.nn.utils.rnn.pad_sequence([x, x]),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "take": lambda x: torch.take(x, torch.tensor([0])),
    "masked_scatter": lambda x: x.masked_scatter(Y > 0.5, Y),
    "prod": lambda x: x.prod(1),
    "var": lambda x: x.var(1),
    "std": lambda x: torch.std(x),
    "norm": lambda x: torch.norm(x),
    "cumsum": lambda x: x.cumsum(1),
    "einsum": lambda x: torch.einsum("ij->", x),
    "matmul": lambda x: x @ Y.T,
    "bmm": lambda x: torch.bmm(x[None], Y.T[None]),
    "dot": lambda x: torch.dot(x[:, 0], Y[:, 0]),
    "amax": lambda x: x.amax(0),
    "logsumexp": lambda x: x.logsumexp(0),
    "softmax": lambda x: F.softmax(x),
    "triplet_margin": lambda x: F.triplet_margin_loss(x, Y, V),
    "cosine_embedding": lambda x: F.cosine_embedding_loss(x, Y, torch.ones(3)),
    "multi_margin": lambda x: F.multi_margin_loss(x, torch.tensor([0, 1, 2])),
    "multilabel_soft_margin": lambda x: F.multilabel_soft_margin_loss(x, Y),
    "ctc_loss": lambda x: F.ctc_loss(x[:, None], torch.ones(1, 1).long(), torch.tensor([3]), torch.tensor([1])),
    "kl_div": lambda x: torch.kl_div(x, Y),
    "binary_cross_entropy_with_logits": lambda x: torch.binary_cross_entropy_with_logits(x, Y),
    "scatter_add": lambda x: torch.zeros(3, 4).scatter_add(0, torch.zeros(3, 4).long(), x),
    "index_add": lambda x: torch.zeros(3, 4).index_add(0, torch.arange(3), x),
    "cdist": lambda x: torch.cdist(x, Y),
    "normalize": lambda x: F.normalize(x),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "pad": lambda x: F.pad(x, (1, 1)),
    "unique": lambda x: x.long().unique(),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2]), label_smoothing=0.1),
    "max": lambda x: x.max(),
    "view": lambda x: x.view(torch.int16),
}


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_by_name(name, x):
    with pytest.raises(NotImplementedError, match=rf"{name}.*, called on a tensor of shape .*RULES\["):
        REFUSED[name](x)


def test_a_copy_keeps_its_weights(x):
    twin = copy.deepcopy(x)
    assert type(twin) is WeightedTensor
    assert twin.data_ptr() != x.data_ptr()
    torch.testing.assert_close(twin.sum(), x.sum())
