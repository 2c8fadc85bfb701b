"""The Lasso against scikit-learn, its own optimality conditions and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor

from stride_lightning.steering.lasso import cross_validate_penalty, solve_lasso
from stride_lightning.steering.subsets import Design, sample_design

DESIGNS = {
    "sparse": sample_design(200, 128, 4, seed=0),
    "dense": sample_design(150, 30, 15, seed=0),
    "fewer examples than subsets": sample_design(20, 64, 2, seed=1),
    "few subsets": sample_design(40, 4, 2, seed=1),
}
every_design = pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS.keys())


def planted(design: Design, num_queries: int = 3, support: int = 4, noise: float = 0.3, seed: int = 0) -> Tensor:
    """Measurements of a few planted examples, with a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(num_queries, design.num_train, dtype=torch.float64)
    for row in weights:
        chosen = torch.randperm(design.num_train, generator=generator)[:support]
        row[chosen] = torch.randn(support, generator=generator, dtype=torch.float64)
    exact = weights @ design.dense(torch.float64).T
    return exact + 5 + noise * torch.randn(exact.shape, generator=generator, dtype=torch.float64)


def centred(design: Design, measurements: Tensor) -> tuple[Tensor, Tensor]:
    """``M_c`` ``(K, n)`` and ``y_c`` ``(q, K)``, formed the slow way."""
    matrix = design.dense(torch.float64)
    return matrix - matrix.mean(0), measurements - measurements.mean(1, keepdim=True)


def objective(design: Design, measurements: Tensor, scores: Tensor, penalty: Tensor) -> Tensor:
    matrix, target = centred(design, measurements)
    return (target - scores @ matrix.T).square().sum(1) / 2 + penalty * scores.abs().sum(1)


def sklearn_scores(matrix: np.ndarray, target: np.ndarray, alpha: float) -> Lasso:
    return Lasso(alpha=alpha, tol=1e-10, max_iter=100_000).fit(matrix, target)


@every_design
@pytest.mark.parametrize("penalty", [0.5, 0.1])
def test_objective_equals_sklearn(design: Design, penalty: float) -> None:
    measurements = planted(design)
    matrix, target = centred(design, measurements)
    largest = (target @ matrix).abs().amax(1)
    solution = solve_lasso(measurements, design, penalty, tolerance=1e-10)
    torch.testing.assert_close(solution.penalty, penalty * largest)
    columns, alphas = design.dense().double().numpy(), (solution.penalty / design.num_subsets).tolist()
    fits = [sklearn_scores(columns, row.numpy(), alpha) for row, alpha in zip(measurements, alphas, strict=True)]
    reference = torch.from_numpy(np.stack([fit.coef_ for fit in fits]))
    expected = objective(design, measurements, reference, solution.penalty)
    obtained = objective(design, measurements, solution.scores, solution.penalty)
    torch.testing.assert_close(obtained, expected, rtol=1e-8, atol=1e-10)


@every_design
def test_optimality_conditions(design: Design) -> None:
    measurements = planted(design)
    solution = solve_lasso(measurements, design, 0.2, tolerance=1e-12)
    matrix, target = centred(design, measurements)
    correlations = (target - solution.scores @ matrix.T) @ matrix / solution.penalty[:, None]
    support = solution.scores != 0
    assert support.any(1).all()
    assert correlations.abs().max() <= 1 + 1e-4
    torch.testing.assert_close(correlations[support], solution.scores[support].sign(), rtol=0, atol=1e-4)


@every_design
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gap_is_the_true_gap(design: Design, dtype: torch.dtype) -> None:
    measurements = planted(design)
    solution = solve_lasso(measurements.to(dtype), design, 0.1, tolerance=1e-3)
    matrix, target = centred(design, measurements)
    scores, penalty = solution.scores.double(), solution.penalty.double()
    residual = target - scores @ matrix.T
    dual = residual * (penalty / (residual @ matrix).abs().amax(1)).clamp_max(1)[:, None]
    value = target.square().sum(1) / 2 - (target - dual).square().sum(1) / 2
    gap = (objective(design, measurements, scores, penalty) - value) / (target.square().sum(1) / 2)
    torch.testing.assert_close(solution.gap.double(), gap, rtol=1e-2, atol=5e-6 if dtype == torch.float32 else 1e-12)
    assert solution.scores.dtype == dtype
    assert gap.max() <= 1.01e-3


@every_design
def test_batched_equals_one_by_one(design: Design) -> None:
    measurements = planted(design, num_queries=5)
    penalty = torch.tensor([0.05, 0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    together = solve_lasso(measurements, design, penalty, tolerance=1e-12)
    for row in range(5):
        one, scores = measurements[row : row + 1], together.scores[row : row + 1]
        alone = solve_lasso(one, design, float(penalty[row]), tolerance=1e-12)
        reached, expected = (objective(design, one, each, alone.penalty) for each in (scores, alone.scores))
        torch.testing.assert_close(reached, expected, rtol=1e-9, atol=1e-12)


def test_sparse_and_dense_storage_agree() -> None:
    sparse = DESIGNS["sparse"]
    dense, measurements = Design.from_masks(sparse.dense().bool()), planted(sparse)
    one, other = (solve_lasso(measurements, design, 0.3, tolerance=1e-12).scores for design in (sparse, dense))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert one.abs().max() > 0.1


def test_working_sets_grow_to_the_whole_support() -> None:
    design = sample_design(2000, 320, 10, seed=0)
    measurements = planted(design, num_queries=2, support=200, noise=1.0)
    solution = solve_lasso(measurements, design, 0.02, tolerance=1e-6)
    assert ((solution.scores != 0).sum(1) > 200).all()  # more than the first working set holds
    assert (solution.gap <= 1e-6).all()


def test_memory_bound_splits_queries_without_changing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    design, measurements = DESIGNS["dense"], planted(DESIGNS["dense"], num_queries=7)
    whole = solve_lasso(measurements, design, 0.3, tolerance=1e-12).scores
    monkeypatch.setattr("stride_lightning.steering.lasso._WORKER_NUMBERS", 1)
    torch.testing.assert_close(solve_lasso(measurements, design, 0.3, tolerance=1e-12).scores, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.1, 1e6])
def test_constant_measurements_have_zero_scores(level: float) -> None:
    design = DESIGNS["sparse"]
    measurements = planted(design, num_queries=2).float()
    measurements[0] = level
    solution = solve_lasso(measurements, design, 0.1)
    assert not solution.scores[0].any()
    assert solution.gap[0] == 0
    assert solution.scores[1].any()


def test_no_scores_from_the_largest_penalty_on() -> None:
    design, measurements = DESIGNS["dense"], planted(DESIGNS["dense"])
    assert not solve_lasso(measurements, design, 1.0).scores.any()
    assert not solve_lasso(measurements, design, 3.0).scores.any()
    assert solve_lasso(measurements, design, 0.9).scores.any(1).all()


def test_identical_examples() -> None:
    base = DESIGNS["sparse"]
    assert base.indices is not None
    twice = Design(128, 400, 4, 0, indices=base.indices.repeat(2, 1))
    measurements = planted(base)
    one = solve_lasso(measurements, base, 0.1, tolerance=1e-12)
    both = solve_lasso(measurements, twice, 0.1, tolerance=1e-12)
    torch.testing.assert_close(both.scores[:, :200] + both.scores[:, 200:], one.scores, rtol=0, atol=1e-5)


def test_stopping_early_warns_with_the_gap() -> None:
    design, measurements = DESIGNS["dense"], planted(DESIGNS["dense"])
    with pytest.warns(UserWarning, match=r"3 of 3 Lasso fits stopped after 2 iterations .* gap is 0\.\d+"):
        solution = solve_lasso(measurements, design, 0.01, tolerance=1e-8, max_iterations=2)
    assert solution.num_iterations == 2
    assert (solution.gap > 1e-8).all()


def test_a_tolerance_below_rounding_ends_with_a_warning() -> None:
    measurements = planted(DESIGNS["sparse"]).float()
    with pytest.warns(UserWarning, match="above the tolerance 1e-14"):
        solution = solve_lasso(measurements, DESIGNS["sparse"], 0.2, tolerance=1e-14, max_iterations=1000)
    assert (solution.gap < 1e-5).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measurements": torch.zeros(2, 5)}, r"shape \(2, 5\); expected \(q, 30\)"),
        ({"measurements": torch.zeros(30)}, r"shape \(30,\); expected \(q, 30\)"),
        ({"measurements": torch.zeros(0, 30)}, "at least one query"),
        ({"penalty": 0.0}, "`penalty` must be positive and finite"),
        ({"penalty": float("nan")}, "`penalty` must be positive and finite"),
        ({"penalty": torch.ones(4)}, r"`penalty` has shape \(4,\); expected a number or \(3,\)"),
        ({"tolerance": 0.0}, "`tolerance` and `max_iterations` must be positive, got 0.0"),
        ({"max_iterations": 0}, "`tolerance` and `max_iterations` must be positive, got 0.0001 and 0"),
    ],
)
def test_unusable_arguments(change: dict, message: str) -> None:
    arguments = {"measurements": planted(DESIGNS["dense"]), "penalty": 0.1, "design": DESIGNS["dense"], **change}
    with pytest.raises(ValueError, match=message):
        solve_lasso(**arguments)


def test_measurements_that_are_not_finite_are_named() -> None:
    measurements = planted(DESIGNS["dense"], num_queries=4)
    measurements[1, 3], measurements[3, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"queries \[1, 3\] are not finite"):
        solve_lasso(measurements, DESIGNS["dense"], 0.1)


@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_cross_validation_equals_a_loop_over_sklearn(name: str) -> None:
    design, grid, num_folds, seed = DESIGNS[name], [0.8, 0.5, 0.3, 0.15], 3, 4
    measurements = planted(design, num_queries=4, noise=0.6)
    folds = torch.randperm(design.num_subsets, generator=torch.Generator().manual_seed(seed)) % num_folds
    matrix, errors = design.dense().double().numpy(), np.zeros((len(grid), 4))
    for query, row in enumerate(measurements.numpy()):
        for fold in range(num_folds):
            others = (folds != fold).numpy()
            centred_columns = matrix[others] - matrix[others].mean(0)
            largest = np.abs(centred_columns.T @ (row[others] - row[others].mean())).max()
            for index, penalty in enumerate(grid):
                model = sklearn_scores(matrix[others], row[others], penalty * largest / others.sum())
                errors[index, query] += np.square(row[~others] - model.predict(matrix[~others])).sum()
    expected = np.array(grid)[errors.argmin(0)]
    how = {"penalties": grid, "num_folds": num_folds, "seed": seed, "tolerance": 1e-10}
    chosen = cross_validate_penalty(measurements, design, **how)
    np.testing.assert_array_equal(chosen.numpy(), expected)


def test_cross_validation_follows_the_noise() -> None:
    design = sample_design(500, 120, 20, seed=0)
    quiet, loud = (planted(design, num_queries=4, support=3, noise=noise) for noise in (0.02, 3.0))
    chosen = cross_validate_penalty(torch.cat([quiet, loud]), design)
    assert (chosen[:4] <= 0.12).all()
    assert (chosen[4:] >= 0.18).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_folds": 1}, r"`num_folds` must be from 2 to the number of subsets \(30\), got 1"),
        ({"num_folds": 31}, "`num_folds` must be from 2"),
        ({"penalties": []}, "`penalties` is empty"),
        ({"penalties": [-1.0]}, "`penalty` must be positive and finite"),
    ],
)
def test_unusable_folds_and_grids(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_validate_penalty(planted(DESIGNS["dense"]), DESIGNS["dense"], **change)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_design
def test_gpu_equals_cpu(design: Design) -> None:
    measurements = planted(design)
    there = solve_lasso(measurements.cuda(), design, 0.2, tolerance=1e-10)
    here = solve_lasso(measurements, design, 0.2, tolerance=1e-10)
    assert there.scores.is_cuda
    both = (objective(design, measurements, scores, here.penalty) for scores in (there.scores.cpu(), here.scores))
    torch.testing.assert_close(*both)
