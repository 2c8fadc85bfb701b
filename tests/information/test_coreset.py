"""Coresets against plain greedy choice, and their guarantee against all sets of a size."""

import itertools
import math

import pytest
import torch

from stride_lightning.information.coreset import choose_coreset
from stride_lightning.information.posterior import Posterior
from tests.helpers.tiny import permutation, random_tensor
from tests.information.dense import RIDGE, about_weights, case, greedy_about_weights


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("num_outputs", [1, 3])
def test_lazy_choices_are_those_of_plain_greedy(num_outputs, batch, monkeypatch):
    monkeypatch.setattr("stride_lightning.information.coreset._BATCH", batch)
    train, _, posterior = case(num_outputs, n=30)
    coreset = choose_coreset(train, 12, posterior.prior())
    places, gains = greedy_about_weights(train, 12)
    assert coreset.places.tolist() == places
    assert coreset.gains.tolist() == pytest.approx(gains, abs=1e-10)
    assert (coreset.gains.diff() <= 1e-12).all()


def test_most_gains_are_never_computed():
    train = random_tensor(300, 1, 8, seed=2) * torch.logspace(-2, 1, 300).double()[:, None, None]
    coreset = choose_coreset(train, 30, Posterior.without_data(8, ridge=1.0))
    assert 300 <= coreset.num_updates < 0.3 * 300 * 30


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_outputs", [1, 2])
def test_guarantee(num_outputs, seed):
    """At least 1 - 1/e of the best set of the size; and above it here, or the test would say little."""
    train = random_tensor(9, num_outputs, 4, seed=seed) * random_tensor(9, 1, 1, seed=seed + 50).exp()
    coreset = choose_coreset(train, 4, Posterior.without_data(4, ridge=RIDGE))
    for size in range(1, 5):
        best = max(about_weights(train, list(chosen)) for chosen in itertools.combinations(range(9), size))
        assert (1 - 1 / math.e) * best <= float(coreset.gains[:size].sum()) <= best + 1e-10


def test_known_data_count():
    train, _, _ = case(2, n=20)
    known = list(range(5))
    coreset = choose_coreset(train, 4, Posterior.fit(train[known], ridge=RIDGE))
    told = about_weights(train, [*known, *coreset.places.tolist()]) - about_weights(train, known)
    assert float(coreset.gains.sum()) == pytest.approx(told, abs=1e-10)


def test_order_of_examples_changes_nothing():
    train, _, posterior = case(2)
    order = permutation(14)
    coreset = choose_coreset(train[order], 6, posterior.prior()).places
    assert torch.equal(order[coreset], choose_coreset(train, 6, posterior.prior()).places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_and_zeros_come_last_and_in_order(dtype):
    distinct = random_tensor(5, 1, 16, seed=4, dtype=dtype)
    train = torch.cat([torch.zeros(2, 1, 16, dtype=dtype), distinct, distinct])
    places = choose_coreset(train, 12, Posterior.without_data(16, ridge=0.1)).places.tolist()
    assert sorted(places[:5]) == [2, 3, 4, 5, 6]
    assert sorted(places[5:10]) == [7, 8, 9, 10, 11]
    assert places[10:] == [0, 1]


def test_single_precision_is_close():
    train, _, posterior = case(3)
    exact, coreset = (choose_coreset(rows, 8, posterior.prior()) for rows in (train, train.float()))
    assert torch.equal(coreset.places, exact.places)
    torch.testing.assert_close(coreset.gains, exact.gains, atol=1e-5, rtol=1e-5)


def test_vague_priors_keep_their_digits():
    """Copies of float32 features whose variance falls from 1e8 times the noise to about the noise."""
    distinct = random_tensor(4, 1, 6, seed=5, dtype=torch.float32)
    train = torch.cat([distinct] * 2)
    coreset = choose_coreset(train, 8, Posterior.without_data(6, ridge=1e-8))
    assert sorted(coreset.places[:4].tolist()) == [0, 1, 2, 3]
    assert float(coreset.gains.sum()) == pytest.approx(about_weights(train.double(), list(range(8)), 1e-8), abs=1e-6)
    assert float(coreset.gains[4:].max()) == pytest.approx(0.5 * math.log(2), abs=1e-6)


def test_more_features_than_the_data_span():
    train, _, _ = case(2, n=6, k=40)
    coreset = choose_coreset(train, 6, Posterior.without_data(40, ridge=1e-6))
    places, gains = greedy_about_weights(train, 6, 1e-6)
    assert coreset.places.tolist() == places
    assert coreset.gains.tolist() == pytest.approx(gains, abs=1e-6)


def test_unusable_requests_are_refused():
    train, _, posterior = case(1)
    for size in (0, 15):
        with pytest.raises(ValueError, match=rf"`size` must be an integer of at least 1 and at most 14, .*got {size}"):
            choose_coreset(train, size, posterior)
    with pytest.raises(ValueError, match="Expected features of shape"):
        choose_coreset(train[:, 0], 2, posterior)
