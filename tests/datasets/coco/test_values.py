import math

import numpy as np
import pytest

from detmix.datasets.coco.values import are_numbers, are_plain, as_matrix, why_unsafe

NO_NUMBERS = ["1", None, True, [1], math.nan, math.inf, -math.inf, 1e30, -1e30, 10**400]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:20])
def test_what_is_no_number_below_the_limit_is_none_alone_and_among_others(value):
    assert not are_numbers([1, value])
    assert as_matrix([[1, 2.5], [3, value]], 2) is None


@pytest.mark.parametrize("value", [5, "12", None, (1, 2), {"x": 1}, np.zeros(2)], ids=repr)
def test_what_is_no_list_holds_no_numbers(value):
    assert not are_numbers(value)
    assert as_matrix([[1, 2], value], 2) is None


def test_numbers_become_rows_of_one_length():
    assert are_numbers([])
    assert are_numbers([1, -2.5, 0, 9e29])
    matrix = as_matrix([[1, 2.5], [-3, 0]], 2)
    assert matrix.dtype == np.float64
    assert matrix.tolist() == [[1.0, 2.5], [-3.0, 0.0]]
    assert as_matrix([], 2).shape == (0, 2)
    assert as_matrix([[1, 2], [3]], 2) is None


UNSAFE = {
    "../1.png": "'..'",
    "a/../1.png": "'..'",
    "..\\1.png": "'..'",
    "/etc/1.png": "not relative",
    "C:\\1.png": "not relative",
    "\\\\host\\1.png": "not relative",
    "1.png\0.jpg": "no file can be called",
    "\ud800.png": "no file can be called",
    "": "expected a file name",
    None: "expected a file name",
    5: "expected a file name",
}


@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
def test_names_that_lead_out_of_the_folder_or_are_none_are_found_alone_and_among_others(name):
    assert UNSAFE[name] in why_unsafe(name)
    assert not are_plain(["1.png", name, "2.png"])


@pytest.mark.parametrize("name", ["1.png", "train/2.png", "a b.png", "~/1.png", ".hidden"])
def test_names_inside_the_folder_are_safe(name):
    assert why_unsafe(name) is None
    assert are_plain(["1.png", name])


def test_a_name_that_is_safe_may_ask_for_a_closer_look():
    assert why_unsafe("\N{SNOWMAN}.png") is None
    assert not are_plain(["\N{SNOWMAN}.png"])
