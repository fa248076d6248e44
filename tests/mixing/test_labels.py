import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detmix.mixing.labels import mix_labels
from detmix.mixing.plan import Mix
from tests.mixing.samples import LAMS


@given(lam=LAMS, partner=st.integers(-1, 2))
def test_integer_and_one_hot_labels_mix_to_the_same_shares(lam, partner):
    labels = torch.tensor([2, 0, 3])
    plan = [Mix(), Mix(partner, lam, (lam, 1 - lam)) if partner >= 0 else Mix(), Mix()]
    soft = mix_labels(labels, plan, num_classes=4)
    expected = [[0.0] * 4 for _ in range(3)]
    expected[0][2] = expected[2][3] = 1.0
    expected[1][0] += lam if partner >= 0 else 1.0
    if partner >= 0:
        expected[1][int(labels[partner])] += 1 - lam
    assert soft.tolist() == expected
    one_hot = torch.nn.functional.one_hot(labels, 4)
    assert torch.equal(mix_labels(one_hot, plan), soft)
    assert mix_labels(one_hot.double(), plan).dtype == torch.float64


def test_labels_of_a_pool_are_mixed_in():
    plan = [Mix(2, 0.75, (0.75, 0.25))]
    soft = mix_labels(torch.tensor([1]), plan, num_classes=3, pool=torch.tensor([0, 0, 2]))
    assert soft.tolist() == [[0.0, 0.75, 0.25]]
    assert mix_labels(torch.zeros(0, dtype=torch.int64), [], num_classes=3).shape == (0, 3)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.tensor([0, 1]), {}, "num_classes must be given to mix integer labels"),
        (torch.tensor([0, 4]), {"num_classes": 4}, r"labels must lie in 0..3, but go from 0 to 4"),
        (torch.tensor([-1, 3]), {"num_classes": 4}, r"but go from -1 to 3"),
        (torch.tensor([0.5, 1.0]), {"num_classes": 4}, r"integers, or soft labels \(B, num_classes\), but are \(2,\)"),
        (torch.zeros(2, 3, 4), {}, r"but are \(2, 3, 4\) torch.float32"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), {"num_classes": 4}, r"but are \(2, 3, 4\) torch.int64"),
        (torch.zeros(3, 4), {}, "plan must hold one Mix for each of 3 samples, but it holds 2"),
        (torch.zeros(2, 4), {"pool": torch.zeros(2, 5)}, "must have the same classes, but have 4 and 5"),
    ],
)
def test_labels_that_cannot_be_mixed_are_named(labels, options, message):
    with pytest.raises(ValueError, match=message):
        mix_labels(labels, [Mix(1, 0.5, (0.5, 0.5)), Mix()], **options)
