"""StrideModule: both bases against their parts, and the learned one through a Trainer."""

from __future__ import annotations

import logging
import random
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stride_lightning.readout.features import Observation
from stride_lightning.readout.readout import Readout
from stride_lightning.steering import module as module_module
from stride_lightning.steering.module import StrideModule
from stride_lightning.steering.published import fitting, learned_basis
from stride_lightning.steering.recovery import recover
from stride_lightning.steering.subsets import Design, sample_design
from stride_lightning.tasks.likelihoods import Classification, Task
from tests.helpers.tiny import every_task, observation, random_tensor

DESIGN = sample_design(40, 8, 4, seed=0)
QUIET = {"show_progress": False}


def readout_of(task: Task, size: int = 40, dtype: torch.dtype = torch.float64) -> tuple[Readout, Observation]:
    """A readout and the pass it was fit on, in its coordinates."""
    observed = observation(task, size=size, dtype=dtype)
    readout = Readout.fit(observed, task)
    return readout, replace(observed, features=readout.problem.features)


def statistics_module(task: Task | None = None) -> tuple[StrideModule, Readout, Observation]:
    task = task or Classification()
    readout, observed = readout_of(task)
    return StrideModule(DESIGN, task).fit(observation(task), **QUIET), readout, observed


def learned_module(
    task: Task | None = None, max_steps: int = 60, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[StrideModule, Readout, Observation]:
    task = task or Classification()
    readout, observed = readout_of(task, dtype=dtype)
    module = StrideModule(DESIGN, task, basis="learned", max_steps=max_steps, **({"rank": 3} | options))
    return module.fit(observation(task, dtype=dtype), **QUIET), readout, observed


# ---- the statistics basis -----------------------------------------------------------------------------------


@every_task
def test_operators_are_refits_on_the_subsets(task: Task) -> None:
    module, readout, _ = statistics_module(task)
    problem, members = readout.problem, DESIGN.dense(torch.float64)
    assert module.operators.shape == (*problem.shape, 8)
    assert torch.equal(module.operators, readout.refit(members.T))
    for operator, inside in zip(module.operators.unbind(2), members.bool(), strict=True):
        # The subset's own objective has no slope there, and no other prior than the whole's.
        coefficients = (readout.coefficients + operator).requires_grad_()
        outputs = problem.offset + problem.features[inside] @ coefficients
        loss = task.loss(outputs, problem.encoded[inside]).sum()
        (slope,) = torch.autograd.grad(loss + 0.5 * (problem.precision * coefficients.square()).sum(), coefficients)
        assert slope.abs().max() < 1e-6
        assert operator.abs().max() > 1e-3


@every_task
def test_measurements_are_losses_of_the_readout_less_those_under_the_operators(task: Task) -> None:
    module, readout, _ = statistics_module(task)
    queries = observation(task, size=6, seed=1)
    points = readout.points(queries)
    measured = module.measure(queries, points)
    assert measured.shape == (6, 8)
    before = task.loss(readout.outputs(points.features), queries.encoded)
    for operator, column in zip(module.operators.unbind(2), measured.unbind(1), strict=True):
        outputs = readout.outputs(points.features) + points.features @ operator
        torch.testing.assert_close(column, before - task.loss(outputs, queries.encoded))
    assert measured.abs().max() > 1e-3


@every_task
def test_members_gain_and_the_others_lose(task: Task) -> None:
    module, readout, observed = statistics_module(task)
    measured, members = module.measure(observed, readout.training_points), DESIGN.dense(torch.bool).T
    assert measured[members].mean() > 0 > measured[~members].mean()


@pytest.mark.parametrize("recovery", ["prior", "lasso", "ridge"])
def test_scores_are_recovered_from_the_measurements(recovery: str) -> None:
    module, readout, _ = statistics_module()
    queries = observation(Classification(), size=6, seed=1)
    points = readout.points(queries)
    measured, prior = module.measure(queries, points), readout.influence(points)
    options = {"penalty": None if recovery == "prior" else 0.1, **QUIET}
    scores = module.recover(queries, recovery, **options).scores
    assert scores.shape == (6, 40)
    assert torch.equal(scores, recover(measured, DESIGN, recovery, prior, **options).scores)


@pytest.mark.parametrize("shards", [2, 3, 12])
def test_ranks_share_the_operators(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank fits its slice; put side by side they are what one process fits, even with more ranks than subsets."""
    whole, _, _ = statistics_module()
    parts: list[Tensor] = []

    def collect(part: Tensor, length: int, dim: int = 0) -> Tensor:
        assert (length, dim) == (8, 2)
        parts.append(part)
        return part

    monkeypatch.setattr(module_module, "gather", collect)
    for rank in range(shards):
        size, extra = divmod(8, shards)
        start = rank * size + min(rank, extra)
        share = slice(start, start + size + (rank < extra))
        monkeypatch.setattr(module_module, "shard", lambda _, share=share: share)
        StrideModule(DESIGN, Classification()).fit(observation(Classification()), **QUIET)
        assert parts[-1].shape[2] == share.stop - share.start
    torch.testing.assert_close(torch.cat(parts, 2), whole.operators, rtol=1e-6, atol=1e-8)


def test_stored_operators_come_back() -> None:
    module, readout, observed = statistics_module()
    known = {"start": readout.coordinates.outward(readout.coefficients)}
    known["operators"] = readout.coordinates.outward(module.state_dict()["operators"])
    other = StrideModule(DESIGN, Classification()).fit(observation(Classification()), **known, **QUIET)
    points = readout.training_points
    torch.testing.assert_close(other.measure(observed, points), module.measure(observed, points))


@pytest.mark.parametrize("basis", ["statistics", "learned"])
def test_modules_that_are_not_fitted_say_so(basis: str) -> None:
    readout, observed = readout_of(Classification())
    module = StrideModule(DESIGN, Classification(), basis=basis)
    with pytest.raises(RuntimeError, match=r"not fitted yet: call fit\(train\) first, with a design"):
        module.measure(observed, readout.training_points)


def test_wrong_options_are_refused() -> None:
    for options, message in (
        ({"basis": "fourier"}, r"`basis` must be one of \('statistics', 'learned'\), got 'fourier'"),
        ({"rank": 0}, "`rank` must be an integer of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            StrideModule(DESIGN, Classification(), **options)
    with pytest.raises(ValueError, match="The design is for 40 examples, but the pass read 39"):
        StrideModule(DESIGN, Classification()).fit(observation(Classification(), size=39), **QUIET)
    without = StrideModule(None, Classification()).fit(observation(Classification()), **QUIET)
    with pytest.raises(ValueError, match="recovery='prior' needs operators: make the module with a design"):
        without.recover(observation(Classification(), size=6, seed=1))


@every_task
def test_in_closed_form_scores_are_the_influence(task: Task) -> None:
    queries = observation(task, size=6, seed=1)
    module = StrideModule(None, task).fit(observation(task), **QUIET)
    recovered = module.recover(queries, "closed-form")
    assert torch.equal(recovered.scores, module.readout.influence(module.readout.points(queries)))
    assert recovered.std is None


# ---- the learned basis --------------------------------------------------------------------------------------


def fidelity(module: StrideModule, readout: Readout, observed: Observation) -> float:
    """Mean loss on their subsets under the operators."""
    members = module.design.dense(observed.losses.dtype)
    losses = observed.losses[:, None] - module.measure(observed, readout.training_points)
    return float(((members @ losses).diagonal() / module.design.sizes).mean())


@every_task
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_lowers_the_loss_on_the_subsets(task: Task, dtype: torch.dtype) -> None:
    module, readout, observed = learned_module(task, dtype=dtype)
    network = float((DESIGN.dense(dtype) @ observed.losses / DESIGN.sizes).mean())
    assert fidelity(module, readout, observed) < network - 0.02
    assert module.operators.shape == (*readout.problem.shape, 8)
    assert module.operators.dtype == dtype
    assert not module.operators.requires_grad
    # Rank 3: all operators lie in the span of three features.
    assert torch.linalg.matrix_rank(module.operators.flatten(1).double(), rtol=1e-5) == 3


@every_task
def test_learned_operators_steer_the_network(task: Task) -> None:
    """They stand on top of the network's outputs: without them nothing changes, whatever the readout says."""
    module, readout, _ = learned_module(task, max_steps=5, dtype=torch.float64)
    queries = observation(task, size=6, seed=1)
    points = readout.points(queries)
    measured = module.measure(queries, points)
    for operator, column in zip(module.operators.unbind(2), measured.unbind(1), strict=True):
        steered = task.loss(queries.outputs + points.features @ operator, queries.encoded)
        torch.testing.assert_close(column, queries.losses - steered)
    module.operators = torch.zeros_like(module.operators)
    still = module.measure(queries, points)
    assert torch.equal(still, torch.zeros(6, 8).double())


def test_learning_more_fits_more() -> None:
    assert fidelity(*learned_module(max_steps=150)) < fidelity(*learned_module(max_steps=2))


def test_stability_holds_the_rest_at_the_network() -> None:
    task, drifts = Classification(), []
    readout, observed = readout_of(task)
    for stability in (0.0, 30.0):
        options = {"rank": 3, "stability": stability, "max_steps": 150, "learning_rate": 3e-2, "seed": 0}
        learned = learned_basis.LearnedBasis(DESIGN, task, observed, readout.problem.features, **options)
        operators = learned.fit(**QUIET)
        soft = replace(observed, encoded=task.mean(observed.outputs))
        steered = learned_basis.steered_losses(task, soft, readout.problem.features, operators)
        drift = steered - task.loss(soft.outputs, soft.encoded)[:, None]
        outside = 1 - DESIGN.dense(torch.float64).T
        drifts.append(float((outside * drift).sum() / outside.sum()))
    assert drifts[1] < drifts[0] / 4


def test_learning_is_deterministic_by_seed() -> None:
    first, other, again = (learned_module(seed=seed, max_steps=10)[0].operators for seed in (3, 4, 3))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def random_states() -> list[Any]:
    return [random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]  # noqa: NPY002


@pytest.mark.parametrize("fit", [learned_module, statistics_module])
def test_fitting_leaves_the_caller_s_random_state(fit: Any) -> None:
    torch.manual_seed(11)
    before = random_states()
    fit()
    assert random_states() == before


def test_learning_is_quiet(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lightning's advice on workers depends on the number of cores: let there be many.
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.data_connector.suggested_max_num_workers", lambda _: 16)
    level = logging.getLogger("lightning.pytorch").level
    with warnings.catch_warnings(record=True) as raised:
        # As a user sees it: every warning that is not switched off by the test configuration.
        warnings.simplefilter("always")
        learned_module(max_steps=5)
    assert [str(one.message) for one in raised if "LeafSpec" not in str(one.message)] == []
    assert not [one for one in caplog.records if one.levelno >= logging.INFO and "lightning" in one.name]
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lightning.pytorch").level == level


def test_gradients_switched_off_by_the_caller_do_not_matter() -> None:
    with torch.no_grad():
        module = learned_module(max_steps=5)[0]
        assert not torch.is_grad_enabled()
    assert torch.equal(module.operators, learned_module(max_steps=5)[0].operators)


def test_operators_are_all_of_the_learned_module_that_stays() -> None:
    module = learned_module(max_steps=5)[0]
    assert list(module.parameters()) == []
    assert [name for name, _ in module.named_buffers()] == ["operators"]
    assert not any(isinstance(value, Observation) for value in vars(module).values())


@every_task
@pytest.mark.parametrize("num_seen", [40, 10])
def test_training_step_adds_up_its_three_losses(task: Task, num_seen: int) -> None:
    observed = observation(task)
    module = learned_basis.LearnedBasis(DESIGN, task, observed, observed.features, rank=2, stability=0.7)
    module.operators.data.copy_(0.3 * random_tensor(3, 2, 8, seed=5))
    positions = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:num_seen]
    members, sizes = DESIGN.dense(torch.float64), DESIGN.sizes
    fidelity, stability, responses = 0.0, 0.0, []
    for k in range(8):
        steered = observed.outputs + observed.features @ module.basis @ module.operators[..., k].T
        losses, predicted = task.loss(steered, observed.encoded), task.mean(observed.outputs)
        drift = task.loss(steered, predicted) - task.loss(observed.outputs, predicted)
        for i in positions.tolist():
            fidelity += members[k, i] * losses[i] / sizes[k] / 8 * (40 / num_seen)
            stability += (1 - members[k, i]) * drift[i] / (40 - sizes[k]) / 8 * (40 / num_seen)
        responses.append(observed.losses[positions] - losses[positions])
    response = torch.stack(responses, 1)
    response = response - response.mean(1, keepdim=True)
    linearity = (response @ module.unexplained).square().sum() / response.square().sum()
    expected = fidelity + 0.7 * stability + linearity
    torch.testing.assert_close(module.training_step([positions], 0), expected)
    assert drift.min() > -1e-12  # a divergence
    assert 0 < linearity < 1


def test_linearity_matrix_is_the_residual_of_a_ridge_on_a_sketch() -> None:
    design = sample_design(60, 20, 10, seed=0)
    matrix = fitting.unexplained(design, torch.Generator().manual_seed(3))
    sketch = torch.randn(5, 60, generator=torch.Generator().manual_seed(3)).double()
    columns = design.dense(torch.float64) @ sketch.T  # M R, a quarter as many columns as subsets
    columns = columns - columns.mean(0)
    ridge = 1e-3 * columns.square().sum(0).mean()
    response = random_tensor(20, seed=4)
    # Ridge regression as least squares with extra rows.
    system = torch.cat([columns, ridge.sqrt() * torch.eye(5, dtype=torch.float64)])
    target = torch.cat([response, torch.zeros(5, dtype=torch.float64)])
    weights = torch.linalg.lstsq(system, target[:, None]).solution[:, 0]
    torch.testing.assert_close(matrix @ response, response - columns @ weights, rtol=1e-5, atol=1e-6)
    assert matrix.dtype == torch.float64
    assert torch.linalg.eigvalsh(matrix).min() > 0
    # Fewer columns than subsets: most responses stay unexplained.
    assert matrix.trace() > 14.9


def test_small_designs_have_a_sketch_of_one_column() -> None:
    matrix = fitting.unexplained(sample_design(6, 2, 1), torch.Generator())
    assert torch.isfinite(matrix).all()
    design = Design(2, 6, 1, 0, bits=torch.tensor([[128]] * 3 + [[64]] * 3, dtype=torch.uint8))
    observed = observation(Classification(), size=6)
    module = StrideModule(design, Classification(), basis="learned", rank=1, max_steps=3)
    assert torch.isfinite(module.fit(observed, **QUIET).operators).all()
