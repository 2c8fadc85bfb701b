"""Information lost and gained against entropies of the dense Gaussian process, with and without the examples."""

import math

import pytest
import torch

from stride_lightning.information.forms import MARGIN, index_vectors, nats, query_vectors
from stride_lightning.information.loss import information, pair_nats, subset_information
from stride_lightning.information.posterior import Posterior
from tests.helpers.tiny import permutation, random_tensor
from tests.information import dense
from tests.information.dense import FORMS, RIDGE, case

OUTPUTS = [(1, 1), (3, 3), (4, 2), (1, 3), (3, 1)]
close = {"atol": 1e-10, "rtol": 0}


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("form", FORMS)
def test_single_examples(form, outputs):
    train, queries, posterior = case(*outputs)
    exact = dense.single(form, queries, train, RIDGE)
    assert exact.min() > 0
    torch.testing.assert_close(information(train, queries, posterior, form), exact, **close)


@pytest.mark.parametrize("places", [[4], [2, 0, 11], list(range(10))])  # the last has more rows than features
@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("form", FORMS)
def test_subsets(form, outputs, places):
    train, queries, posterior = case(*outputs)
    values = subset_information(train[places], queries, posterior, form)
    torch.testing.assert_close(values, FORMS[form](queries, train, places), **close)


def test_large_subsets_take_no_more_memory_than_the_features(monkeypatch):
    train, queries, posterior = case(3)
    seen = []

    def watched(rows, *others):
        seen.append(rows.shape)
        return index_vectors(rows, *others)

    monkeypatch.setattr("stride_lightning.information.loss.index_vectors", watched)
    for size in (2, 12):
        subset_information(train[:size], queries, posterior)
    assert seen == [(1, 6, 9), (1, 9, 9)]


def test_influence_with_the_labels_averaged_over():
    """The expected square of the exact leave-one-out change of a prediction is the growth of its variance."""
    train, queries, posterior = case(1)
    labels = random_tensor(14, seed=5)
    rows, query_rows = train[:, 0], queries[:, 0]

    def predict(places):
        system = rows[places].T @ rows[places] + RIDGE * torch.eye(9, dtype=rows.dtype)
        return query_rows @ torch.linalg.solve(system, rows[places].T @ labels[places])

    residuals = labels - rows @ torch.linalg.solve(
        rows.T @ rows + RIDGE * torch.eye(9, dtype=rows.dtype), rows.T @ labels
    )
    everything = list(range(14))
    for i in range(3):
        change = predict([j for j in everything if j != i]) - predict(everything)
        expected = change.square() * (1 - posterior.variance(train)[i, 0, 0]) / residuals[i].square()
        growth = 0.5 * (expected / (1 + posterior.variance(queries)[:, 0, 0])).log1p()
        torch.testing.assert_close(information(train, queries, posterior)[:, i], growth, **close)


@pytest.mark.parametrize("form", FORMS)
def test_index_ranks_by_inner_products(form):
    train, queries, posterior = case(1)
    dots = query_vectors(queries, posterior, form)[:, 0] @ index_vectors(train, posterior, form)[:, 0].T
    exact = information(train, queries, posterior, form)
    assert torch.equal(dots.square().argsort(1, descending=True), exact.argsort(1, descending=True))
    torch.testing.assert_close(nats(dots[..., None, None], form), exact, **close)
    # Two searches, with the query and with its negative, merged.
    merged = torch.cat([dots, -dots], 1).topk(4).indices % 14
    assert torch.equal(merged, exact.topk(4).indices)


def test_sum_of_squared_products_bounds_a_loss_of_several_outputs():
    train, queries, posterior = case(4, 2)
    products = torch.einsum("qdk,nck->qndc", query_vectors(queries, posterior), index_vectors(train, posterior))
    total, exact = products.square().sum((2, 3)), information(train, queries, posterior)
    assert (exact >= 0.5 * total.log1p()).all()
    assert (exact <= (total / 2).log1p()).all()


@pytest.mark.parametrize("outputs", [(1, 1), (3, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_streams_chunks_and_order_change_nothing(form, outputs, monkeypatch):
    train, queries, posterior = case(*outputs)
    whole = information(train, queries, posterior, form)
    for sizes in ([1] * 14, [3, 11]):
        torch.testing.assert_close(information(iter(train.split(sizes)), queries, posterior, form), whole, **close)
    alone = torch.cat([information(train, query[None], posterior, form) for query in queries])
    torch.testing.assert_close(alone, whole, **close)
    order = permutation(14)
    torch.testing.assert_close(information(train[order], queries, posterior, form), whole[:, order], **close)
    monkeypatch.setattr("stride_lightning.information.loss._ELEMENTS", 1)
    monkeypatch.setattr("stride_lightning.information.posterior._ROWS", 1)
    torch.testing.assert_close(information(train, queries, posterior, form), whole, **close)


@pytest.mark.parametrize("outputs", [(1, 1), (3, 3)])
@pytest.mark.parametrize("form", FORMS)
def test_single_precision_is_close(form, outputs):
    train, queries, _ = case(*outputs)
    posterior = Posterior.fit(train.float(), ridge=RIDGE)
    values = information(train.float(), queries.float(), posterior, form)
    assert values.dtype == torch.float32
    exact = information(train, queries, Posterior.fit(train, ridge=RIDGE), form)
    torch.testing.assert_close(values.double(), exact, atol=1e-6, rtol=1e-4)


def test_little_information_keeps_its_digits():
    products = torch.tensor([[1e-6, 2e-6], [-3e-6, 1e-6]])
    for form in ("loss", "gain"):
        assert float(nats(products, form)) == pytest.approx(7.5e-12, rel=1e-5)


def test_removing_everything_leaves_the_prior():
    train, queries, posterior = case(2)
    values = subset_information(train, queries, posterior)
    torch.testing.assert_close(values, dense.gain(queries, train, list(range(14))), **close)
    torch.testing.assert_close(values, subset_information(train, queries, posterior, "gain"), **close)
    assert subset_information(train[:0], queries, posterior).tolist() == [0] * 5


def test_gradients_of_zero_tell_nothing():
    train, queries, _ = case(2)
    train[3], queries[1] = 0, 0
    posterior = Posterior.fit(train, ridge=RIDGE)
    for form in FORMS:
        values = information(train, queries, posterior, form)
        assert (values[:, 3] == 0).all()
        assert (values[1] == 0).all()


def test_copies_lose_more_together_and_gain_less():
    train = torch.cat([torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6]]).double(), 0.3 * random_tensor(20, 2, seed=0)])
    train, queries = train[:, None], torch.tensor([[[1.0, 0.2]]]).double()
    posterior = Posterior.fit(train, ridge=0.5)
    each, both = information(train[:2], queries, posterior), subset_information(train[:2], queries, posterior)
    assert float(both) > 1.2 * float(each.sum())
    torch.testing.assert_close(both, dense.loss(queries, train, [0, 1], ridge=0.5), **close)
    each, both = (of(train[:2], queries, posterior, "gain") for of in (information, subset_information))
    assert each.tolist() == [[pytest.approx(0.284, abs=1e-3)] * 2]
    assert both.tolist() == [pytest.approx(0.366, abs=1e-3)]


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_an_example_that_alone_determines_a_direction(num_outputs):
    train = torch.zeros(6, num_outputs, 4, dtype=torch.float64)
    train[:5, :, :3] = random_tensor(5, num_outputs, 3, seed=6)
    train[5, 0, 3] = 1.0
    posterior = Posterior.fit(train, ridge=1e-9)  # leverage 1 - 1e-9
    values = information(train, train[5:, :1], posterior)
    assert float(values[0, 5]) == pytest.approx(0.5 * math.log1p(1 / (2 * MARGIN)), abs=1e-5)
    assert float(values[0, :5].abs().max()) < 1e-12
    other = random_tensor(1, 1, 3, seed=7)
    queries = torch.cat([other, torch.zeros(1, 1, 1, dtype=torch.float64)], 2)
    assert float(information(train, queries, posterior)[0, 5]) < 1e-12
    # Above the margin nothing is changed.
    exact = dense.loss(train[5:], train, [5], ridge=1e-5)
    values = information(train[5:], train[5:], Posterior.fit(train, ridge=1e-5))
    torch.testing.assert_close(values[:, 0], exact, atol=1e-8, rtol=0)


def test_several_outputs_keep_what_is_not_alone():
    """Of an example of leverage 1 in one direction only that direction is held back."""
    train = random_tensor(8, 2, 4, seed=8)
    train[:, :, 3] = 0
    train[0, 0] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    queries = random_tensor(2, 1, 4, seed=9)
    queries[:, :, 3] = 0
    posterior, fewer = (Posterior.fit(rows, ridge=1e-8) for rows in (train, train[1:]))
    exact = 0.5 * ((1 + fewer.variance(queries)) / (1 + posterior.variance(queries))).log()[:, 0, 0]
    assert exact.min() > 1e-7
    torch.testing.assert_close(information(train[:1], queries, posterior)[:, 0], exact, atol=1e-9, rtol=0)


def test_examples_that_are_not_in_the_data_are_refused():
    train, queries, posterior = case(2)
    with pytest.raises(ValueError, match=r"The leverage of an example is .*expected at most 1, as for any of the data"):
        information(10 * train, queries, posterior)
    with pytest.raises(ValueError, match="as often as it is removed"):
        subset_information(torch.cat([train] * 3), queries, posterior)
    with pytest.raises(ValueError, match="`form` must be one of loss, gain, copy; got 'more'"):
        information(train, queries, posterior, "more")
    with pytest.raises(ValueError, match="Expected features of shape"):
        information(train, queries[:, 0], posterior)


def test_no_pairs():
    train, queries, posterior = case(2)
    assert information(train, queries[:0], posterior).shape == (0, 14)
    assert information(train[:0], queries, posterior).shape == (5, 0)
    assert information([], queries, posterior, "gain").shape == (5, 0)
    assert pair_nats(queries, train[:0]).shape == (5, 0)
