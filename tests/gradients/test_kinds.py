"""The kind of a loss, from slopes of batches and of single examples."""

import pytest
import torch

from stride_lightning.gradients.kinds import KINDS, kind_of, shares_of
from stride_lightning.gradients.single import kind_by_gradients, kind_on_average, weight_by_gradients
from tests.helpers.tiny import random_tensor

ALONE = random_tensor(7, 3, seed=0)
PLACES = [torch.arange(7), torch.arange(4), torch.arange(2)]
WEIGHTS = torch.tensor([0.2, 3.0, 1.0, 0.0, 2.0, 1.0, 0.5], dtype=torch.float64)


def batches(function):
    return [(places, function(places)) for places in PLACES]


def weighted(places):
    weights = WEIGHTS[places]
    return ALONE[places] * (weights / weights.sum())[:, None]


def test_a_mean_and_a_sum():
    assert kind_of(batches(lambda places: ALONE[places] / len(places)), ALONE) == "mean"
    assert kind_of(batches(lambda places: ALONE[places]), ALONE) == "sum"


def test_a_mean_with_weights_that_the_batch_normalises():
    alone = ALONE.clone()
    alone[3] = 0  # an example of no weight has no loss alone
    assert kind_of(batches(weighted), alone) == "weighted"


def test_weights_that_nothing_normalises_belong_to_the_examples():
    alone = ALONE * WEIGHTS[:, None]
    assert kind_of(batches(lambda places: alone[places] / len(places)), alone) == "mean"


WRONG = {
    "another direction": lambda places: ALONE[places].roll(1, 0) / len(places),
    "a term across the batch": lambda places: (ALONE[places] - ALONE[places].mean(0)) / len(places),
    "divided by another power": lambda places: ALONE[places] / len(places) ** 0.5,
    "the first counts double": lambda places: ALONE[places] * (1 + (places == 0).double())[:, None] / len(places),
    "weights by place in the batch": lambda places: (
        ALONE[places] * torch.linspace(1, 2, len(places)).double().softmax(0)[:, None]
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_any_other_is_coupled(name):
    assert kind_of(batches(WRONG[name]), ALONE) == "coupled"


@pytest.mark.parametrize("number", range(3))
def test_every_batch_counts(number):
    one = batches(lambda places: ALONE[places] / len(places))
    one[number] = (one[number][0], one[number][1] * 1.05)
    assert kind_of(one, ALONE) == "coupled"


def test_no_or_one_slope_tells_nothing():
    nothing = torch.zeros_like(ALONE)
    assert kind_of(batches(lambda places: nothing[places]), nothing) is None
    nothing[0] = 1
    assert kind_of(batches(lambda places: nothing[places] / len(places)), nothing) is None


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_the_unit_of_the_loss_changes_nothing(scale):
    for kind, factor in (("mean", lambda places: 1 / len(places)), ("sum", lambda places: 1.0)):
        made = [(places, scale * ALONE[places] * factor(places)) for places in PLACES]
        assert kind_of(made, scale * ALONE) == kind
    assert kind_of([(places, scale * slopes) for places, slopes in batches(weighted)], scale * ALONE) == "weighted"


def test_rounding_in_single_precision_is_no_coupling():
    noise = 1 + 1e-5 * random_tensor(7, 1, seed=3)
    made = [(places, (ALONE[places] * noise[places] / len(places)).float()) for places in PLACES]
    assert kind_of(made, ALONE.float()) == "mean"


SIZES = (7, 4)


def of_parts(function):
    return [function(torch.arange(size)).sum(0) for size in SIZES]


def test_kinds_from_gradients_of_whole_batches():
    """Rows are not seen, only their sums."""
    alone = random_tensor(7, 20, seed=4)

    def shared(places):
        return alone[places] * (WEIGHTS[places] / WEIGHTS[places].sum())[:, None]

    for kind, function in (
        ("mean", lambda places: alone[places] / len(places)),
        ("sum", lambda places: alone[places]),
        ("weighted", shared),
        ("coupled", lambda places: (alone[places] - alone[places].roll(1, 0) / 2) / len(places)),
        ("coupled", lambda places: alone[places] / len(places) ** 0.5),
        ("coupled", lambda places: shared(places) * (1 + 0.1 * len(places))),
    ):
        assert kind_by_gradients(alone, of_parts(function), SIZES) == kind
    alone[3] = 0  # an example of no weight
    assert kind_by_gradients(alone, of_parts(shared), SIZES) == "weighted"


def test_kinds_on_average_over_draws():
    def sampled(rows, share):  # noise of a sample, over 8 draws
        return rows.mean(0) + share * random_tensor(8, 20, seed=5)

    alone = random_tensor(7, 20, seed=4) + 0.2 * random_tensor(8, 7, 20, seed=6)
    means = [sampled(alone.mean(0)[:size], 0.05) for size in SIZES]
    assert kind_on_average(alone, means, SIZES) == "mean"
    assert kind_on_average(alone, [3 * mean for mean in means], SIZES) == "coupled"
    assert kind_on_average(alone, [sampled(alone.mean(0)[:size], 2) for size in SIZES], SIZES) == "coupled"
    fixed = alone.mean(0).expand_as(alone)  # alone, nothing is random
    assert kind_on_average(fixed, means, SIZES) == "coupled"


def test_weights_from_gradients_of_pairs():
    one, partner = random_tensor(2, 20, seed=4)
    for weight in (0.0, 0.2, 1.0, 9.0):
        together = (weight * one + partner) / (weight + 1)
        assert weight_by_gradients(together, one * (weight > 0), partner) == pytest.approx(weight)
    assert weight_by_gradients(partner, partner, partner) == 1


def test_shares_of_examples():
    shares = shares_of(weighted(PLACES[0]), ALONE)
    torch.testing.assert_close(shares, WEIGHTS / WEIGHTS.sum())
    assert shares_of(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]


def test_every_kind_has_words():
    assert set(KINDS) == {"mean", "sum", "weighted", "coupled"}
