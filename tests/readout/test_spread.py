"""Standard deviations of influence against 10,000 draws from the dense posterior in the space of the features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stride_lightning.readout.features import Observation
from stride_lightning.readout.readout import Readout
from stride_lightning.readout.spread import NUM_DRAWS, Spread
from stride_lightning.tasks.likelihoods import Task
from tests.helpers.tiny import every_task, observation, random_tensor, rows_of
from tests.readout.dense import dense_readout

SIZES = {"more examples than features": (40, 8), "more features than examples": (20, 30)}
every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


def dense_std(task: Task, observed: Observation, queries: Observation, moving: str = "both") -> Tensor:
    """Of 10,000 draws of all coefficients on features, of which the training set may leave some to the prior."""
    dense, num_draws = dense_readout(task, observed), 10_000
    solution = dense.fit()
    inverse = dense.inverse(solution)
    noise = random_tensor(num_draws, len(inverse), seed=5)
    draws = (noise @ torch.linalg.cholesky(inverse).T).view(-1, *solution.shape) * dense.temperature.sqrt()
    features, encoded = dense.points(queries)

    def residuals(features: Tensor, encoded: Tensor, draws: Tensor) -> Tensor:
        outputs = torch.einsum("bp,kpc->kbc", features, draws + solution) + dense.offset
        return (task.mean(outputs) - encoded) / task.dispersion

    blocks = inverse.view(*solution.shape, *solution.shape)  # H does not move
    between = torch.einsum("qp,pcrd,nr->qcnd", features, blocks, dense.features)
    total = squares = torch.zeros(len(queries), len(observed), dtype=torch.float64)
    for part in draws.split(500):
        still = torch.zeros_like(part[:1])
        mine = residuals(features, encoded, still if moving == "training" else part)
        of_training = residuals(dense.features, dense.encoded, still if moving == "queries" else part)
        mine, of_training = (values.expand(len(part), -1, -1) for values in (mine, of_training))
        scores = torch.einsum("kqc,qcnd,knd->kqn", mine, between, of_training)
        total, squares = total + scores.sum(0), squares + scores.square().sum(0)
    return (squares / num_draws - (total / num_draws).square()).sqrt()


def spread(task: Task, observed: Observation, queries: Observation, **options: object) -> Spread:
    readout = Readout.fit(rows_of(observed, torch.arange(len(observed))), task)
    return Spread(readout, readout.points(queries), show_progress=False, **options)


def root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


@every_size
@every_task
def test_sixteen_draws_equal_ten_thousand(task: Task, size: tuple[int, int]) -> None:
    """The root mean square over all pairs and four seeds within 15 %, and the pattern.

    Sixteen draws of few coefficients move all pairs together: one seed is up to 25 % off.
    """
    observed, queries = observation(task, *size), observation(task, 24, size[1], seed=1)
    expected = dense_std(task, observed, queries)
    values = torch.stack([spread(task, observed, queries, seed=seed)().double() for seed in range(4)])
    assert values[0].shape == expected.shape
    assert root_mean_square(values) == pytest.approx(root_mean_square(expected), rel=0.15)
    assert root_mean_square(values[0]) == pytest.approx(root_mean_square(expected), rel=0.3)
    logs = torch.stack([values[0].flatten(), expected.flatten()]).log()
    assert float(torch.corrcoef(logs)[0, 1]) > 0.85


@every_task
def test_residuals_of_queries_and_of_training_examples_both_count(task: Task) -> None:
    """With only one of them moving, the standard deviation is further off than 15 %."""
    observed, queries = observation(task, 40, 8), observation(task, 12, 8, seed=1)
    whole = root_mean_square(dense_std(task, observed, queries))
    for moving in ("queries", "training"):
        assert root_mean_square(dense_std(task, observed, queries, moving)) < 0.85 * whole


@every_task
def test_queries_outside_the_training_span_have_the_variance_of_the_prior(task: Task) -> None:
    observed, queries = observation(task, 40, 8), observation(task, 24, 8, seed=1)
    observed.features[:, 2:4] = 0  # that no training example has
    queries.features[:, 2:4] *= 4
    expected = root_mean_square(dense_std(task, observed, queries))
    spreads = [spread(task, observed, queries, seed=seed) for seed in range(4)]

    def values() -> float:
        return root_mean_square(torch.stack([one().double() for one in spreads]))

    assert values() == pytest.approx(expected, rel=0.15)
    for one in spreads:
        one.queries.outside.zero_()
    assert values() < 0.8 * expected


@every_task
def test_draws_are_seeded_and_variances_of_a_recovery_are_added(task: Task) -> None:
    observed, queries = observation(task), observation(task, 4, seed=1)
    plain = spread(task, observed, queries)()
    assert plain.dtype == torch.float32
    assert spread(task, observed, queries)().equal(plain)
    assert not spread(task, observed, queries, seed=1)().equal(plain)
    more = random_tensor(4, 40, seed=2).abs()
    both = spread(task, observed, queries, of_recovery=more)()
    torch.testing.assert_close(both, (plain.double().square() + more.square()).sqrt().float())


def test_the_number_of_draws_is_that_of_the_docstrings() -> None:
    assert NUM_DRAWS == 16
