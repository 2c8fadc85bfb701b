"""Greedy sets against a search over all candidates in the dense Gaussian process."""

import pytest
import torch

from stride_lightning.information.greedy import first_best, greedy_sets
from stride_lightning.information.posterior import Posterior
from tests.helpers.tiny import permutation, random_tensor
from tests.information.dense import FORMS, RIDGE, case, greedy

close = {"atol": 1e-10, "rtol": 0}


def brute_force(form, queries, train, size):
    """The same choices by trying every candidate, and the information of the sets."""
    sets = [greedy(lambda chosen, q=q: FORMS[form](q[None], train, chosen), range(len(train)), size) for q in queries]
    return [places for places, _ in sets], torch.tensor([gains for _, gains in sets], dtype=torch.float64).cumsum(1)


@pytest.mark.parametrize("outputs", [(1, 1), (2, 2), (3, 1), (1, 3)])
@pytest.mark.parametrize("form", FORMS)
def test_choices_are_those_of_a_search(form, outputs):
    train, queries, posterior = case(*outputs)
    chosen = greedy_sets(train, queries[:3], posterior, 5, form=form)
    places, nats = brute_force(form, queries[:3], train, 5)
    assert chosen.places.tolist() == places
    torch.testing.assert_close(chosen.nats, nats, **close)


@pytest.mark.parametrize("form", ["loss", "gain"])
def test_everything_can_be_chosen(form):
    train, queries, posterior = case(1)
    chosen = greedy_sets(train, queries, posterior, 14, form=form)
    assert chosen.places.sort(1).values.tolist() == [list(range(14))] * 5
    torch.testing.assert_close(chosen.nats[:, -1], FORMS["gain"](queries, train, list(range(14))), **close)


@pytest.mark.parametrize("outputs", [(1, 1), (2, 3)])
@pytest.mark.parametrize("form", FORMS)
def test_streams_and_groups_of_queries_change_nothing(form, outputs, monkeypatch):
    train, queries, posterior = case(*outputs)
    whole = greedy_sets(train, queries, posterior, 4, form=form)
    monkeypatch.setattr("stride_lightning.information.greedy._ELEMENTS", 1)
    chosen = greedy_sets(iter(train.split(3)), queries, posterior, 4, form=form)
    assert torch.equal(chosen.places, whole.places)
    torch.testing.assert_close(chosen.nats, whole.nats, **close)
    order = permutation(14)
    chosen = greedy_sets(train[order], queries, posterior, 4, form=form)
    assert torch.equal(order[chosen.places], whole.places)


@pytest.mark.parametrize("form", FORMS)
def test_single_precision_is_close(form):
    train, queries, posterior = case(2)
    exact = greedy_sets(train, queries, posterior, 4, form=form)
    chosen = greedy_sets(train.float(), queries.float(), Posterior.fit(train.float(), ridge=RIDGE), 4, form=form)
    assert torch.equal(chosen.places, exact.places)
    torch.testing.assert_close(chosen.nats, exact.nats, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_spread_out_in_a_gain_and_come_together_in_a_loss(dtype):
    distinct = random_tensor(6, 1, 24, seed=3, dtype=dtype) / 5
    train = torch.cat([distinct, distinct, distinct])
    query = distinct.sum(0, keepdim=True)
    posterior = Posterior.fit(train, ridge=0.1)
    gained = greedy_sets(train, query, posterior, 6, form="gain").places[0]
    assert sorted(gained.tolist()) == list(range(6))  # one of each, the first
    lost = greedy_sets(train, query, posterior, 3).places[0]
    assert len({place % 6 for place in lost.tolist()}) == 1
    assert lost.tolist() == sorted(lost.tolist())


def test_ties_and_zeros_come_in_order():
    train = torch.zeros(5, 1, 3, dtype=torch.float64)
    train[3:, 0, 0] = 1.0
    posterior = Posterior.fit(train, ridge=1.0)
    for form in FORMS:
        chosen = greedy_sets(train, train[3:4], posterior, 5, form=form)
        assert chosen.places.tolist() == [[3, 4, 0, 1, 2]]
        assert chosen.nats[0, 1:].tolist() == [float(chosen.nats[0, 1])] * 4
        assert greedy_sets(train, train[:1], posterior, 3, form=form).places.tolist() == [[0, 1, 2]]


def test_copies_count_as_ties_whatever_the_rounding():
    scores = torch.tensor([[1.0, 2.0, 2.0 + 2e-11], [0.5, 0.1, 0.2]], dtype=torch.float64)
    assert first_best(scores).tolist() == [1, 0]
    assert first_best(torch.tensor([-torch.inf, 0.0, 0.0])).item() == 1


def test_vague_priors_keep_their_digits():
    """Copies of float32 features whose variance falls from 1e8 times the noise to about the noise."""
    distinct = random_tensor(4, 1, 6, seed=5, dtype=torch.float32)
    train = torch.cat([distinct] * 3)
    query, posterior = distinct[:1], Posterior.fit(train, ridge=1e-8)
    chosen = greedy_sets(train, query, posterior, 3, form="gain")
    assert chosen.places.tolist() == [[0, 4, 8]]
    copies = torch.arange(1, 4)
    variance = float(query.double().square().sum()) / 1e-8
    exact = 0.5 * torch.log((1 + variance) / (1 + variance / (1 + copies.double() * variance)))
    torch.testing.assert_close(chosen.nats[0], exact, atol=1e-6, rtol=0)


def test_examples_that_alone_determine_a_direction():
    train = torch.zeros(4, 1, 4, dtype=torch.float64)
    train[:, 0] = torch.eye(4)
    query = torch.tensor([[[1.0, 2.0, 3.0, 0.0]]], dtype=torch.float64)
    chosen = greedy_sets(train, query, Posterior.fit(train, ridge=1e-9), 4)
    assert chosen.places.tolist() == [[2, 1, 0, 3]]
    assert chosen.nats.isfinite().all()
    assert (chosen.nats.diff() >= 0).all()


def test_more_features_than_the_data_span():
    train, queries, posterior = case(2, n=8, k=40)
    for form in FORMS:
        places, nats = brute_force(form, queries[:2], train, 4)
        chosen = greedy_sets(train, queries[:2], posterior, 4, form=form)
        assert chosen.places.tolist() == places
        torch.testing.assert_close(chosen.nats, nats, **close)


def test_unusable_requests_are_refused():
    train, queries, posterior = case(1)
    for size in (0, 15):
        with pytest.raises(ValueError, match=rf"`size` must be an integer of at least 1 and at most 14, .*got {size}"):
            greedy_sets(train, queries, posterior, size)
    with pytest.raises(ValueError, match="leverage"):
        greedy_sets(10 * train, queries, posterior, 2)
    with pytest.raises(ValueError, match="`form` must be"):
        greedy_sets(train, queries, posterior, 2, form="more")
    assert greedy_sets(train, queries[:0], posterior, 2).places.shape == (0, 2)
