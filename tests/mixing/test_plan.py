import random

import pytest

from detmix.mixing.plan import check_law, draw_lam


def drawn(alpha=1.5, lam=None, times=4000):
    check_law(alpha, lam)
    rng = random.Random(0)
    return [draw_lam(rng, alpha, lam) for _ in range(times)]


@pytest.mark.parametrize(
    ("alpha", "lam", "mean", "variance"),
    [
        (0.2, None, 0.5, 1 / 5.6),
        (1.5, None, 0.5, 1 / 16),
        ((2.5, 1.5), None, 0.625, 3.75 / 80),
        (1.5, (0.25, 0.75), 0.5, 1 / 48),
        (1.5, 0.3, 0.3, 0),
        (1.5, lambda rng: rng.choice([0.0, 1.0]), 0.5, 0.25),
    ],
)
def test_shares_follow_their_law(alpha, lam, mean, variance):
    shares = drawn(alpha, lam)
    assert abs(sum(shares) / 4000 - mean) < 4 * (variance / 4000) ** 0.5 + 1e-7
    assert abs(sum((share - mean) ** 2 for share in shares) / 4000 - variance) < 0.12 * variance + 1e-12


def test_shares_lie_on_the_grid_on_which_both_are_exact():
    assert all((share * 2**24).is_integer() for share in (*drawn(), *drawn(lam=0.3, times=1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, None), "alpha must be positive and finite, one number or two, but it is 0.0"),
        ((float("inf"), None), "alpha .* inf"),
        (((1.0, -1.0), None), r"alpha .* \(1.0, -1.0\)"),
        (((float("nan"), 1.0), None), r"alpha .*\(nan, 1.0\)"),
        (((1.0, 1.0, 1.0), None), "alpha"),
        (("12", None), "alpha .* '12'"),
        ((1.5, 1.1), r"lam must be a share in \[0, 1\], or \(low, high\), or a function, but it is 1.1"),
        ((1.5, float("nan")), "lam .* nan"),
        ((1.5, (0.6, 0.4)), r"lam .* \(0.6, 0.4\)"),
        ((1.5, (-0.1, 0.4)), "lam .*, but it is"),
        ((1.5, (0.1, 1.4)), "lam .*, but it is"),
    ],
)
def test_a_law_that_is_none_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_law(*arguments)


def test_a_function_that_draws_no_share_is_named():
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"lam must draw shares in \[0, 1\], but drew {share}"):
            draw_lam(random.Random(0), 1.5, lambda rng, share=share: share)
