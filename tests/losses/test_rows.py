import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detmix.losses.rows import Rows, reshaped


@st.composite
def reshapes(draw):
    """A shape, another one of as many entries, and weights that broadcast to the first."""
    number = draw(st.sampled_from([1, 6, 12, 24, 36, 64]))

    def shape():
        left, sizes = number, []
        for _ in range(draw(st.integers(0, 3))):
            sizes.append(draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
            left //= sizes[-1]
        return [*sizes, left]

    old = shape()
    return old, shape(), torch.rand([n if draw(st.booleans()) else 1 for n in old])


@given(reshapes())
def test_reshaped_weights_are_those_of_the_reshaped_entries(case):
    old, new, weights = case
    out = reshaped(weights, old, new)
    assert all(w in (1, n) for w, n in zip(out.shape, new, strict=True))
    assert torch.equal(out.expand(new), weights.expand(old).reshape(new))


def test_a_weight_a_row_stays_one_when_rows_are_cut():
    weights = torch.tensor([[0.25], [0.5]])
    assert reshaped(weights, (2, 12), (8, 3)).tolist() == [[0.25]] * 4 + [[0.5]] * 4
    assert reshaped(weights, (2, 12), (2, 4, 3)).shape == (2, 1, 1)
    assert reshaped(weights, (2, 12), (24,)).shape == (24,)


@st.composite
def changes(draw):
    """A shape, weights that broadcast to it, and functions that change a tensor and its `Rows` alike."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    weights = torch.rand([n if draw(st.booleans()) else 1 for n in shape])
    return shape, weights, draw(st.lists(st.sampled_from(["pad", "append", "insert", "remove", "sliced"]), max_size=4))


@given(changes(), st.data())
def test_rows_follow_a_tensor_that_is_changed(case, data):
    shape, weights, names = case
    rows, x = Rows.of(weights), weights.expand(shape)
    for name in names:
        if name in ("pad", "append"):
            more = data.draw(st.integers(0, 2))
            rows = getattr(rows, name)(x.ndim + more)
            x = x[(None,) * more] if name == "pad" else x[(..., *[None] * more)]
        elif name == "insert":
            dim = data.draw(st.integers(0, x.ndim))
            rows, x = rows.insert(dim), x.unsqueeze(dim)
        elif name == "remove":
            dims = tuple(
                data.draw(st.sampled_from([d, d - x.ndim]))
                for d in range(x.ndim)
                if x.size(d) and data.draw(st.booleans())
            )
            left = rows.remove(dims)
            assert (left is None) == any(rows.weights.size(d) > 1 for d in dims)
            if left is not None:
                rows, x = left, x.amax(dims) if dims else x
        elif name == "sliced":
            entries = data.draw(indices(x.shape))
            left = rows.sliced(entries)
            assert (left is None) == picks(entries, rows.weights)
            if left is not None:
                rows, x = left, x[entries]
    assert rows.weights.ndim == len(rows.dims) == x.ndim
    assert all(w in (1, n) for w, n in zip(rows.weights.shape, x.shape, strict=True))
    assert torch.equal(rows.weights.expand(x.shape), x)


@st.composite
def indices(draw, shape):
    """A tuple that indexes some of the dimensions, with new ones and perhaps an ellipsis among them."""
    entries = [
        draw(st.one_of(*[st.integers(-n, n - 1)] * bool(n), st.slices(n).filter(forward), st.just(slice(None))))
        for n in shape
    ]
    if draw(st.booleans()):
        start = draw(st.integers(0, len(entries)))
        entries[start : draw(st.integers(start, len(entries)))] = [...]
    else:
        entries = entries[: draw(st.integers(0, len(entries)))]
    for _ in range(draw(st.integers(0, 2))):
        entries.insert(draw(st.integers(0, len(entries))), None)
    return tuple(entries)


def forward(entry):
    return entry.step is None or entry.step > 0  # torch knows no others


def picks(entries, weights):
    """Whether an entry picks some of several weights."""
    picked = [e for e in entries if e is not None]
    if ... in picked:
        i = picked.index(...)
        picked[i : i + 1] = [slice(None)] * (weights.ndim - len(picked) + 1)
    return any(n > 1 and e != slice(None) for e, n in zip(picked, weights.shape, strict=False))


@pytest.mark.parametrize("entry", [torch.tensor([0]), [0], torch.tensor(True), True], ids=str)
def test_rows_leave_tensors_and_lists_as_indices_to_torch(entry):
    assert Rows.of(torch.ones(1, 1)).sliced((entry,)) is None


def test_rows_are_the_same_if_they_are_one_tensor_along_the_same_dimensions():
    weights = torch.rand(2, 1)
    rows = Rows.of(weights)
    assert rows.same(rows)
    assert rows.pad(3).same(rows.insert(0))
    assert rows.append(3).same(rows.sliced((slice(None), None)))
    assert not rows.pad(3).same(rows.append(3))
    assert not rows.same(Rows.of(weights.clone()))
    assert rows.pad(2) is rows
    assert rows.weights is weights


def test_rows_gathered_alike_are_one_and_a_written_index_gathers_anew():
    rows, mask = Rows.of(torch.tensor([[0.5], [1.0], [2.0]])), torch.tensor([True, False, True])
    first = rows.gathered((3, 4), (mask,))
    assert rows.gathered((3, 4), (mask,)) is first
    assert first.weights.flatten().tolist() == [0.5, 2.0]
    assert rows.gathered((3, 4), (mask.clone(),)) is not first
    mask[1] = True
    assert rows.gathered((3, 4), (mask,)).weights.flatten().tolist() == [0.5, 1.0, 2.0]
    assert rows.gathered((3, 4), (mask, torch.tensor([0, 1, 2]))).weights.shape == (3,)
    with torch.inference_mode():
        index = torch.tensor([0, 1])
        rows.gathered((3, 4), (index,))
        index[1] = 2  # such a tensor does not tell that it was written to
        assert rows.gathered((3, 4), (index,)).weights.flatten().tolist() == [0.5, 2.0]
