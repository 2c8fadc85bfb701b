import math

import numpy as np
import pytest
import torch

from stride_lightning.runtime.checks import check_count, check_positive


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_integers_become_plain_ones(value):
    assert type(check_count("k", value)) is int
    assert check_count("k", value, 3, 3) == 3


@pytest.mark.parametrize("value", [0, -1, True, np.True_, 2.0, np.float32(2), "2", None, [2], math.nan])
def test_what_is_no_count_is_refused(value):
    with pytest.raises(ValueError, match=r"^`k` must be an integer of at least 1, got .*\.$"):
        check_count("k", value)


def test_limits_are_said():
    assert check_count("seed", 0, 0) == 0
    with pytest.raises(ValueError, match="`seed` must be an integer of at least 0, got -1"):
        check_count("seed", -1, 0)
    limits = "must be an integer of at least 1 and at most 5, the number of queries, got"
    for value in (0, 6):
        with pytest.raises(ValueError, match=f"{limits} {value}"):
            check_count("k", value, maximum=5, unit="queries")


@pytest.mark.parametrize("value", [1, 0.5, 1e-30, np.float32(0.5)])
def test_positive_numbers(value):
    number = check_positive("ridge", value)
    assert type(number) is float
    assert number == value


@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.inf, math.nan])
def test_what_is_not_positive_is_refused(value):
    with pytest.raises(ValueError, match=rf"^`ridge` must be a positive number, got {value}\.$"):
        check_positive("ridge", value)
