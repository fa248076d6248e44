import torch
from hypothesis import given
from hypothesis import strategies as st

from detmix.losses._compact import reshaped


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
