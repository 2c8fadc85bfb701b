"""StrideModule: both bases against their parts, and the learned one through a Trainer."""

from __future__ import annotations

import logging
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stride_lightning.steering import module as module_module
from stride_lightning.steering.basis import Observation
from stride_lightning.steering.influence import influence
from stride_lightning.steering.module import StrideModule
from stride_lightning.steering.operators import mean_prediction, measure
from stride_lightning.steering.published import learned_basis
from stride_lightning.steering.solvers import fit_operators
from stride_lightning.steering.subsets import Design, sample_design
from stride_lightning.tasks.likelihoods import Classification, Task
from tests.helpers.tiny import CPU, every_task, observation, random_tensor

DESIGN = sample_design(40, 8, 4, seed=0)
QUIET = {"show_progress": False}


def statistics_module(task: Task | None = None, **options: Any) -> tuple[StrideModule, Observation]:
    task = task or Classification()
    observed = observation(task)
    return StrideModule(DESIGN, task, **options).fit_operators(observed, **QUIET), observed


def learned_module(
    task: Task | None = None, max_steps: int = 60, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[StrideModule, Observation]:
    task = task or Classification()
    observed = observation(task, dtype=dtype)
    module = StrideModule(DESIGN, task, basis="learned", max_steps=max_steps, **({"rank": 3} | options))
    return module.fit_operators(observed, **QUIET), observed


# ---- the statistics basis -----------------------------------------------------------------------------------


@every_task
@pytest.mark.parametrize("stability", [None, 0.0, 0.5])
def test_operators_are_those_of_the_solver(task: Task, stability: float | None) -> None:
    module, observed = statistics_module(task, stability=stability)
    tau = stability or 0.0
    expected = fit_operators(observed, DESIGN, task, module.chosen["ridge"], stability=tau, tolerance=1e-8, **QUIET)
    assert module.anchored == (tau > 0)
    assert module.coefficients.shape == (3, 5, 8)
    gap = (module.coefficients - expected.coefficients).norm() / expected.coefficients.norm()
    assert gap < 0.02  # both solved, to different tolerances
    assert module.chosen["relative_gradient_max"] == pytest.approx(float(module.relative_gradient.max()))
    assert module.chosen["relative_gradient_max"] <= 5e-3
    measured = measure(observed, module.coefficients, task, anchored=module.anchored)
    assert torch.equal(module.measure(observed), measured)
    predicted = mean_prediction(observed, module.coefficients, task, anchored=module.anchored)
    assert torch.equal(module.mean_prediction(observed), predicted)


@every_task
def test_priors_are_influences_at_both_predictions(task: Task) -> None:
    module, train = statistics_module(task)
    queries = observation(task, size=6, seed=1)
    priors = module.priors(train, queries, module.mean_prediction(train), **QUIET)
    at_subset = module.mean_prediction(train), module.mean_prediction(queries)
    at_frozen = task.mean(train.outputs), task.mean(queries.outputs)
    for prior, means, ridge in zip(priors, (at_subset, at_frozen), ("operator_ridge", "frozen_ridge"), strict=True):
        expected = influence(train, queries, *means, task, module.chosen[ridge], **QUIET)
        torch.testing.assert_close(prior, expected)


@pytest.mark.parametrize("shards", [2, 3, 12])
def test_ranks_share_the_operators(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank fits its slice; put side by side they are what one process fits, even with more ranks than subsets."""
    whole, observed = statistics_module()
    parts: list[Tensor] = []

    def collect(part: Tensor, length: int, dim: int = 0) -> Tensor:
        if dim == 2:
            parts.append(part)
        return torch.cat([part, part.new_zeros(1)]) if dim == 0 else part

    monkeypatch.setattr(module_module, "gather", collect)
    for rank in range(shards):
        size, extra = divmod(8, shards)
        start = rank * size + min(rank, extra)
        share = slice(start, start + size + (rank < extra))
        monkeypatch.setattr(module_module, "shard", lambda _, share=share: share)
        StrideModule(DESIGN, Classification()).fit_operators(observed, **QUIET)
    joined = torch.cat(parts, 2)
    assert joined.shape == whole.coefficients.shape
    assert (joined - whole.coefficients).norm() < 0.02 * whole.coefficients.norm()


@pytest.mark.parametrize("learned", [False, True])
def test_stored_operators_come_back(learned: bool) -> None:
    module, observed = learned_module(max_steps=5) if learned else statistics_module()
    stored, info = module.tensors(), module.info()
    assert sorted(stored) == ["coefficients", "relative_gradient"]
    assert info["basis"] == ("learned" if learned else "statistics")
    assert info["stability"] == float(learned)
    other = StrideModule(DESIGN, Classification(), basis=info["basis"])
    other.restore(info, stored, CPU)
    assert torch.equal(other.measure(observed), module.measure(observed))
    assert other.chosen == module.chosen
    assert other.chosen is not module.chosen


@pytest.mark.parametrize("basis", ["statistics", "learned"])
def test_modules_that_are_not_fitted_say_so(basis: str) -> None:
    module, queries = StrideModule(DESIGN, Classification(), basis=basis), observation(Classification(), size=3)
    for ask in (lambda: module.measure(queries), lambda: module.mean_prediction(queries), module.tensors):
        with pytest.raises(RuntimeError, match=r"not fitted yet: call fit_operators\(observed\) first"):
            ask()


def test_wrong_options_are_refused() -> None:
    for options, message in (
        ({"basis": "fourier"}, r"`basis` must be one of \('statistics', 'learned'\), got 'fourier'"),
        ({"rank": 0}, "`rank` must be an integer of at least 1, got 0"),
        ({"stability": -0.1}, "`stability` must be a number of at least 0, got -0.1"),
        ({"stability": float("nan")}, "`stability` must be a number of at least 0, got nan"),
        ({"ridge": 0.0}, "`ridge` must be a positive number, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            StrideModule(DESIGN, Classification(), **options)
    with pytest.raises(ValueError, match="The design is for 40 examples, but the pass read 39"):
        StrideModule(DESIGN, Classification()).fit_operators(observation(Classification(), size=39), **QUIET)


# ---- the learned basis --------------------------------------------------------------------------------------


def fidelity(module: StrideModule, observed: Observation) -> float:
    """Mean loss on their subsets under the operators."""
    members = module.design.dense(observed.losses.dtype)
    losses = observed.losses[:, None] - module.measure(observed)
    return float(((members @ losses).diagonal() / module.design.sizes).mean())


@every_task
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_lowers_the_loss_on_the_subsets(task: Task, dtype: torch.dtype) -> None:
    module, observed = learned_module(task, dtype=dtype)
    frozen = float((DESIGN.dense(dtype) @ observed.losses / DESIGN.sizes).mean())
    assert fidelity(module, observed) < frozen - 0.02
    assert module.anchored
    assert module.stability == 1
    assert module.coefficients.shape == (3, 5, 8)
    assert module.coefficients.dtype == dtype
    assert not module.coefficients.requires_grad
    # Rank 3: all operators lie in the span of three features.
    assert torch.linalg.matrix_rank(module.coefficients.movedim(1, 0).flatten(1).double(), rtol=1e-5) == 3


def test_learning_more_fits_more() -> None:
    first, observed = learned_module(max_steps=2)
    longer, _ = learned_module(max_steps=150)
    assert fidelity(longer, observed) < fidelity(first, observed)
    assert longer.chosen["steps"] == 150


def test_stability_holds_the_rest_at_the_frozen_model() -> None:
    drifts = []
    for stability in (0.0, 30.0):
        module, observed = learned_module(stability=stability, max_steps=150)
        predicted = module.task.mean(observed.outputs)
        soft = Observation(observed.features, observed.outputs, predicted, observed.losses, fingerprint={})
        base = module.task.loss(observed.outputs, predicted)
        losses = observed.losses[:, None] - module.measure(soft)
        outside = 1 - DESIGN.dense().T
        drifts.append(float((outside * (losses - base[:, None])).sum() / outside.sum()))
    assert drifts[1] < drifts[0] / 4


def test_learning_is_deterministic_by_seed() -> None:
    first, other, again = (learned_module(seed=seed, max_steps=10)[0].coefficients for seed in (3, 4, 3))
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
        module, _ = learned_module(max_steps=5)
        assert not torch.is_grad_enabled()
    assert torch.equal(module.coefficients, learned_module(max_steps=5)[0].coefficients)


def test_nothing_of_the_training_set_stays_in_the_module() -> None:
    module, _ = learned_module(max_steps=5)
    assert list(module.parameters()) == []
    assert sorted(name for name, _ in module.named_buffers()) == ["coefficients", "relative_gradient"]
    assert not any(isinstance(value, Observation) for value in vars(module).values())


@every_task
@pytest.mark.parametrize("num_seen", [40, 10])
def test_training_step_adds_up_its_three_losses(task: Task, num_seen: int) -> None:
    observed = observation(task)
    module = learned_basis.LearnedBasis(DESIGN, task, observed, rank=2, stability=0.7)
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
    matrix = learned_basis.unexplained(design, torch.Generator().manual_seed(3))
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
    matrix = learned_basis.unexplained(sample_design(6, 2, 1), torch.Generator())
    assert torch.isfinite(matrix).all()
    design = Design(2, 6, 1, 0, bits=torch.tensor([[128]] * 3 + [[64]] * 3, dtype=torch.uint8))
    observed = observation(Classification(), size=6)
    module = StrideModule(design, Classification(), basis="learned", rank=1, max_steps=3)
    assert torch.isfinite(module.fit_operators(observed, **QUIET).coefficients).all()
