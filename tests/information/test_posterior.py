"""The posterior of linear weights against the kernel form of the same Gaussian process."""

import math

import pytest
import torch

from stride_lightning.information.posterior import Posterior
from tests.helpers.tiny import random_tensor
from tests.information.dense import RIDGE, case, entropies


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_variance_is_that_of_the_gaussian_process(num_outputs):
    train, queries, posterior = case(num_outputs)
    rows, outputs = train.flatten(0, 1), queries.flatten(0, 1)
    kernel = rows @ rows.T / RIDGE + torch.eye(len(rows), dtype=rows.dtype)
    cross = outputs @ rows.T / RIDGE
    dense = outputs @ outputs.T / RIDGE - cross @ torch.linalg.inv(kernel) @ cross.T
    for place, variance in enumerate(posterior.variance(queries)):
        some = slice(place * num_outputs, (place + 1) * num_outputs)
        torch.testing.assert_close(variance, dense[some, some], atol=1e-10, rtol=0)
    whitened = posterior.whiten(outputs)
    torch.testing.assert_close(whitened @ whitened.T, dense, atol=1e-10, rtol=0)


def test_prior_knows_nothing():
    _, queries, posterior = case(2)
    prior = posterior.prior()
    assert prior.num_examples == 0
    torch.testing.assert_close(prior.variance(queries), queries @ queries.mT / RIDGE, atol=1e-12, rtol=0)


@pytest.mark.parametrize("sizes", [[1] * 14, [5, 0, 9], [14]])
def test_batches_change_nothing(sizes):
    train, queries, posterior = case(2)
    streamed = Posterior.fit(iter(train.split(sizes)), ridge=RIDGE)
    assert streamed.num_examples == 14
    torch.testing.assert_close(streamed.variance(queries), posterior.variance(queries), atol=1e-12, rtol=0)


def test_leverages_add_up_to_the_weights_that_data_determine():
    train, _, posterior = case(2)
    values = torch.linalg.eigvalsh(posterior.gram)
    for ridge in (RIDGE, 0.0):
        leverages = Posterior.fit(train, ridge=ridge).variance(train).diagonal(dim1=1, dim2=2)
        assert float(leverages.sum()) == pytest.approx(float((values / (values + ridge)).sum()), abs=1e-9)


def test_more_features_than_the_data_span():
    train, queries, posterior = case(1, n=4, k=30)
    dense = entropies(queries, train)
    entropy = 0.5 * (2 * torch.pi * torch.e * (1 + posterior.variance(queries)[:, 0, 0])).log()
    torch.testing.assert_close(entropy, dense, atol=1e-10, rtol=0)


def test_single_precision_is_close_and_stays_single():
    train, queries, posterior = case(2)
    single = Posterior.fit(train.float(), ridge=RIDGE)
    assert single.gram.dtype == torch.float64
    assert single.whiten(queries.float()).dtype == torch.float32
    assert single.whiten(queries.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(single.variance(queries), posterior.variance(queries), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_directions_without_data_need_a_ridge(dtype):
    # Rows in a plane of 5 dimensions, up to the rounding of the features.
    train = (random_tensor(40, 1, 2, seed=3) @ random_tensor(2, 5, seed=4)).to(dtype)
    with pytest.raises(ValueError, match=r"singular with a ridge of 0: .* larger `ridge=`"):
        Posterior.fit(train, ridge=0.0)
    Posterior.fit(train, ridge=0.1)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(3, 4), r"Expected features of shape \(examples, outputs, features\).*got torch.float32 of shape"),
        (torch.zeros(3, 1, 4, dtype=torch.int64), "floating point"),
        ([], "Expected the features of at least one example, got none"),
        (torch.zeros(0, 1, 4), "Expected the features of at least one example, got none"),
        ([torch.zeros(2, 1, 4), torch.zeros(2, 1, 5)], "the same number of features, got 4 and 5"),
        (torch.full((3, 1, 4), torch.nan), "NaN or infinite"),
        (["no tensor"], "got 'no tensor'"),
    ],
)
def test_unusable_features_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        Posterior.fit(features, ridge=1.0)


def test_unusable_requests_are_refused():
    train, _, posterior = case(1)
    for ridge in (-1.0, math.nan, math.inf, True, "1"):
        with pytest.raises(ValueError, match="`ridge` must be a number of at least 0"):
            Posterior.fit(train, ridge=ridge)
    for prior in (Posterior.fit(train, ridge=0.0).prior, lambda: Posterior.without_data(3, ridge=0.0)):
        with pytest.raises(ValueError, match="Without data a `ridge` of 0"):
            prior()
    with pytest.raises(ValueError, match="Expected features of size 9"):
        posterior.whiten(torch.zeros(2, 1, 8))
