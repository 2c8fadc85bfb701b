"""The readout, its influence and its refits against dense float64 algebra in the space of the features."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stride_lightning.readout import coordinates as coordinates_module
from stride_lightning.readout import preconditioner as preconditioner_module
from stride_lightning.readout import problem as problem_module
from stride_lightning.readout import solver as solver_module
from stride_lightning.readout.features import Observation
from stride_lightning.readout.readout import Readout
from stride_lightning.tasks.likelihoods import BinaryClassification, Classification, Regression, Task
from stride_lightning.tasks.parts import Parts
from tests.helpers.tiny import TASKS, every_task, observation, permutation, random_tensor, rows_of
from tests.readout.dense import dense_readout

SIZES = {"more examples than features": (40, 5), "more features than examples": (15, 24)}
#: With weights of classes, of positive targets and of none, and factors of the loss.
WEIGHTED: dict[str, Task] = {
    "weights": Classification(class_weights=[0.2, 1, 3]),
    "weights, smoothing": Classification(class_weights=[0.2, 1, 3], label_smoothing=0.1).with_scale(0.3),
    "ignored": Classification(ignore_index=1),
    "positive": BinaryClassification(pos_weight=[2, 3, 0.5]).with_scale(1 / 3),
    "factor": BinaryClassification().with_scale(0.25),
}
every_weighted_task = pytest.mark.parametrize("task", (TASKS | WEIGHTED).values(), ids=(TASKS | WEIGHTED).keys())
every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
#: Of the curvature: all of it is factorised, that of the leading features, none.
every_head = pytest.mark.parametrize("whole", [2048, 6, 2], ids=["whole", "partial", "diagonal"])


def fit(task: Task, observed: Observation) -> Readout:
    """Fit a readout; it uses the features' memory, so it gets a copy."""
    return Readout.fit(rows_of(observed, torch.arange(len(observed))), task)


def halves(count: int, seed: int = 9) -> Tensor:
    """Weights of the examples in four subsets, and in two weightings that are none."""
    zero_one = (random_tensor(count, 4, seed=seed) > 0).double()
    return torch.cat([zero_one, 2 * zero_one[:, :1], random_tensor(count, 1, seed=seed + 1).abs()], 1)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> None:
    """Equal within the tolerance, relative to the largest entry."""
    torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * float(other.abs().max()))


# ---- exactness ----------------------------------------------------------------------------------------------


@every_head
@every_size
@every_weighted_task
def test_readout_influence_and_refits_equal_a_dense_solve(
    task: Task, size: tuple[int, int], whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preconditioner_module, "MAX_WHOLE", whole)
    observed, queries = observation(task, *size), observation(task, 7, size[1], seed=1)
    readout, dense = fit(task, observed), dense_readout(task, observed)
    points, (features, encoded) = readout.points(queries), dense.points(queries)
    solution, task = dense.fit(), dense.task
    shift = dense.shift[: observed.outputs.shape[1]]

    close(readout.outputs(points.features), dense.outputs(solution, features) + shift)
    close(readout.outputs(readout.problem.features), dense.outputs(solution, dense.features) + shift)
    close(readout.losses(points), task.loss(dense.outputs(solution, features), encoded))
    close(readout.residuals(points), dense.residuals(solution, features, encoded))
    close(readout.influence(points), dense.influence(features, encoded))

    weights = halves(len(observed))
    moves = readout.refit(weights)
    refits = [dense.outputs(dense.fit(column), features) for column in weights.T]
    close(
        torch.stack([readout.outputs(points.features) + points.features @ move for move in moves.unbind(2)]),
        torch.stack(refits) + shift,
    )
    losses = readout.losses(points)[:, None] + readout.rises(points, moves)
    close(losses, torch.stack([task.loss(outputs, encoded) for outputs in refits], 1))


@every_size
@every_task
def test_refits_for_groups_have_a_wider_prior(task: Task, size: tuple[int, int]) -> None:
    observed, queries = observation(task, *size), observation(task, 7, size[1], seed=1)
    readout, weights = fit(task, observed), halves(len(observed))[:, :3]
    dense = dense_readout(task, observed)
    if not isinstance(task, Regression):  # whose prior is that of its targets
        dense.precision.div_(10 / 3)
    points, (features, _) = readout.points(queries), dense.points(queries)
    wider = readout.for_groups()
    close(wider.outputs(points.features), dense.outputs(dense.fit(), features) + dense.shift)
    for column, move in zip(weights.T, wider.refit(weights).unbind(2), strict=True):
        outputs = wider.outputs(points.features) + points.features @ move
        close(outputs, dense.outputs(dense.fit(column), features) + dense.shift)


@every_weighted_task
def test_kernel_and_primal_form_agree(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer examples than features, from the inner products of examples and from the moments of features."""
    observed, queries = observation(task, 15, 24), observation(task, 7, 24, seed=1)
    weights = halves(15)

    def answers() -> list[Tensor]:
        readout = fit(task, observed)
        points, moves = readout.points(queries), readout.refit(weights)
        return [
            readout.outputs(points.features),
            readout.influence(points),
            readout.rises(points, moves),
            readout.self_influence(),
            points.outside,
        ]

    def from_moments(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        energies, rotation = coordinates_module._from_moments(features)
        return energies, rotation, features @ rotation

    kernel = answers()
    monkeypatch.setattr(coordinates_module, "_from_products", from_moments)
    for one, other in zip(kernel, answers(), strict=True):
        close(one, other, 1e-5)


@every_task
def test_single_precision_is_close(task: Task) -> None:
    observed, queries = observation(task, dtype=torch.float32), observation(task, 7, seed=1, dtype=torch.float32)
    readout, dense = fit(task, observed), dense_readout(task, observed)
    scores = readout.influence(readout.points(queries))
    assert scores.dtype == torch.float32
    close(scores, dense.influence(*dense.points(queries)), 2e-3)


def test_a_classification_starts_at_the_log_frequencies_of_its_classes() -> None:
    """Without features but the constant, whose prior is wide, the readout tells the frequencies; so does its start."""
    encoded = torch.eye(3).double()[[0] * 90 + [1] * 9 + [2]]
    nothing = torch.zeros(100, 1).double()
    observed = Observation(nothing, nothing.expand(100, 3), encoded, nothing[:, 0], {})
    readout = fit(Classification(), observed)
    assert readout.problem.shape[0] == 0
    frequencies = (torch.tensor([90.0, 9.0, 1.0]).double() + 1 / 3) / 101
    torch.testing.assert_close(readout.outputs(readout.problem.features[:1])[0], frequencies.log())
    signs = Observation(nothing, nothing.expand(100, 2), encoded[:, 1:], nothing[:, 0], {})
    shares = (torch.tensor([9.0, 1.0]).double() + 1 / 2) / 101
    torch.testing.assert_close(fit(BinaryClassification(), signs).problem.offset, shares.logit())


# ---- leaving one out ----------------------------------------------------------------------------------------


def left_out(readout: Readout) -> Tensor:
    """Moves of the coefficients when each training example is left out."""
    return readout.refit(1 - torch.eye(len(readout.problem), dtype=torch.float64))


@every_weighted_task
def test_error_of_influence_falls_as_one_over_n(task: Task) -> None:
    """Against refits that leave each example out; the self-influence, a finite effect, is closer than the influence."""
    everything, queries = observation(task, 400), observation(task, 10, seed=1)
    errors, sizes = [], [50, 100, 200, 400]
    for size in sizes:
        readout = fit(task, rows_of(everything, torch.arange(size)))
        points, own, moves = readout.points(queries), readout.training_points, left_out(readout)
        truth = readout.rises(points, moves)
        errors.append(float((readout.influence(points) - truth).norm() / truth.norm()))
        effects = readout.rises(own, moves).diagonal()
        first_order, finite = readout.influence(own).diagonal(), readout.self_influence()
        assert (finite >= first_order).all()
        assert (finite >= 0).all()
        assert float((finite - effects).norm()) < 0.75 * float((first_order - effects).norm())
    logs = torch.tensor(errors).log()
    steps = torch.tensor(sizes).log()
    slope = float(((steps - steps.mean()) * (logs - logs.mean())).sum() / (steps - steps.mean()).square().sum())
    assert slope == pytest.approx(-1, abs=0.25), errors
    assert errors[-1] < 0.05


@every_task
def test_self_influence_at_a_leverage_near_one(task: Task) -> None:
    """An example whose feature no other has, and far out, is explained by itself alone."""
    observed = observation(task, 30)
    observed.features[:, 2] = 0
    observed.features[4, 2] = 100
    readout = fit(task, observed)
    points, moves = readout.training_points, left_out(readout)
    effects = readout.rises(points, moves).diagonal()
    first_order, finite = readout.influence(points).diagonal(), readout.self_influence()
    assert finite.isfinite().all()
    assert (finite >= 0).all()
    assert float(effects[4]) > 10 * float(first_order[4])  # its leverage is near one indeed
    assert abs(float(finite[4] - effects[4])) < abs(float(first_order[4] - effects[4]))
    single = fit(task, observation_of(observed, torch.float32)).self_influence()
    assert single.isfinite().all()
    assert (single >= 0).all()


def observation_of(observed: Observation, dtype: torch.dtype) -> Observation:
    values = (observed.features, observed.outputs, observed.encoded, observed.losses)
    return Observation(*(value.to(dtype) for value in values), fingerprint={})


# ---- draws --------------------------------------------------------------------------------------------------


@every_size
@every_weighted_task
def test_draws_have_the_covariance_of_the_posterior(task: Task, size: tuple[int, int]) -> None:
    """Of the outputs at training points, whose coordinates are all that draws move."""
    observed, count = observation(task, *size), 4000
    readout, dense = fit(task, observed), dense_readout(task, observed)
    draws = readout.draws(count, seed=0)
    outputs = torch.einsum("nm,mck->knc", readout.problem.features, draws).flatten(1)
    assert float(outputs.mean(0).norm() / outputs.std(0).norm()) < 4 / math.sqrt(count)
    num_features, num_outputs = dense.precision.shape
    posterior = dense.inverse(dense.fit()).view(num_features, num_outputs, num_features, num_outputs)
    posterior = posterior * (dense.temperature[:, None] * dense.temperature).sqrt()[:, None, :]
    expected = torch.einsum("np,pcqd,mq->ncmd", dense.features, posterior, dense.features).flatten(2).flatten(0, 1)
    error = float((outputs.T @ outputs / count - expected).norm() / expected.norm())
    sampling = float((1 + expected.trace().square() / expected.square().sum()) / count) ** 0.5
    assert error < 2 * sampling < 0.25
    assert readout.draws(2, seed=0).equal(readout.draws(2, seed=0))
    assert not readout.draws(2, seed=1).equal(readout.draws(2, seed=0))


# ---- what must not matter -----------------------------------------------------------------------------------


@every_size
@every_task
def test_order_of_examples_and_columns_solved_together_do_not_matter(
    task: Task, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    observed, queries, order = observation(task, *size), observation(task, 7, size[1], seed=1), permutation(size[0])
    weights = halves(size[0])

    def answers(order: Tensor) -> list[Tensor]:
        readout = fit(task, rows_of(observed, order))
        points, back = readout.points(queries), order.argsort()
        return [
            readout.outputs(points.features),
            readout.influence(points)[:, back],
            readout.self_influence()[back],
            readout.rises(points, readout.refit(weights[order])),
        ]

    expected = answers(torch.arange(size[0]))
    for one, other in zip(answers(order), expected, strict=True):
        close(one, other, 1e-8)
    # One column at a time, and blocks of few examples.
    monkeypatch.setattr(solver_module, "MAX_COLUMNS", 1)
    monkeypatch.setattr(problem_module, "BLOCK_BYTES", 1)
    for one, other in zip(answers(torch.arange(size[0])), expected, strict=True):
        close(one, other, 1e-8)


@every_weighted_task
def test_more_examples_than_a_block_holds(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    observed, queries = observation(task, 200), observation(task, 7, seed=1)
    expected = fit(task, observed)
    monkeypatch.setattr(problem_module, "BLOCK_BYTES", 1)
    monkeypatch.setattr(preconditioner_module, "BLOCK_BYTES", 1)
    monkeypatch.setattr(coordinates_module, "BLOCK_NUMBERS", 1)
    readout = fit(task, observed)
    assert len(list(readout.problem.blocks(1))) == 4
    close(readout.influence(readout.points(queries)), expected.influence(expected.points(queries)), 1e-8)


@every_task
def test_a_start_changes_only_the_way(task: Task) -> None:
    observed = observation(task)
    readout = fit(task, observed)
    outward = readout.coordinates.outward(readout.coefficients)
    assert len(outward) == readout.coordinates.width
    for start in (outward, random_tensor(*outward.shape, seed=3)):
        again = Readout.fit(rows_of(observed, torch.arange(40)), task, start=start)
        close(again.coefficients, readout.coefficients, 1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
@pytest.mark.parametrize("shift", [0.0, 35.0, 2000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shifting_and_scaling_targets_changes_no_ranking(dtype: torch.dtype, shift: float, scale: float) -> None:
    """Scores grow as the square of the targets' scale, and that is all; targets are double, as data sets may have."""
    task = Regression()
    observed, queries = observation(task), observation(task, 7, seed=1)

    def scores(shift: float, scale: float) -> tuple[Tensor, Tensor]:
        def moved(pass_: Observation) -> Observation:
            return Observation(
                pass_.features.to(dtype), pass_.outputs.to(dtype), pass_.encoded * scale + shift, pass_.losses, {}
            )

        readout = fit(task, moved(observed))
        return readout.influence(readout.points(moved(queries))), readout.self_influence()

    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    for got, expected in zip(scores(shift, scale), scores(0.0, 1.0), strict=True):
        close(got.double() / scale**2, expected, tolerance)
        if dtype == torch.float64:
            assert got.flatten().argsort().equal(expected.flatten().argsort())


@every_task
def test_moves_of_single_examples_lose_no_digits_in_single_precision(task: Task) -> None:
    """Their effects lie below the rounding of coefficients and losses."""
    effects = []
    for dtype in (torch.float32, torch.float64):
        observed, queries = observation(task, 400, dtype=dtype), observation(task, 7, seed=1, dtype=dtype)
        readout = fit(task, observed)
        weights = 1 - torch.eye(400, dtype=dtype)[:, :30]
        effects.append(readout.rises(readout.points(queries), readout.refit(weights)).double())
    close(*effects, 1e-3)


@every_weighted_task
def test_all_data_move_nothing(task: Task) -> None:
    readout = fit(task, observation(task, dtype=torch.float32))
    assert float(readout.refit(torch.ones(40, 2)).abs().max()) < 1e-6 * float(readout.coefficients.abs().max())


def test_a_factor_of_the_loss_changes_scores_by_it_and_nothing_else() -> None:
    for task in (Classification(), BinaryClassification(), Regression(0.7)):
        observed, queries = observation(task), observation(task, 7, seed=1)
        one, other = fit(task, observed), fit(task.with_scale(0.25), observed)
        close(other.outputs(other.points(queries).features), one.outputs(one.points(queries).features))
        close(other.influence(other.points(queries)), 0.25 * one.influence(one.points(queries)))
        close(other.draws(5, seed=0), one.draws(5, seed=0))


def test_ignored_examples_have_no_part_in_a_readout() -> None:
    task = Classification(ignore_index=-100, normalised=False)
    observed, queries = observation(Classification()), observation(Classification(), 7, seed=1)
    counted = torch.arange(40) % 4 > 0
    observed.encoded[~counted] = 0
    scores = fit(task, observed).influence(fit(task, observed).points(queries))
    assert float(scores[:, ~counted].abs().max()) == 0
    rest = fit(Classification(), rows_of(observed, counted.nonzero()[:, 0]))
    close(scores[:, counted], rest.influence(rest.points(queries)))


def test_a_regression_with_weights_of_examples_is_refused() -> None:
    task = Regression().changed(parts=Parts((0,), 1, 2))
    observed = observation(Regression())
    observed = replace(observed, encoded=torch.cat([observed.encoded, torch.ones(40, 3).double()], 1))
    with pytest.raises(ValueError, match="A readout is not refit to a regression with weights of examples"):
        fit(task, observed)
