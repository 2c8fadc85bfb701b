"""Recovery against dense Gaussian algebra, brute-force evidence and explicit refits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from stride_lightning.steering import recovery
from stride_lightning.steering.recovery import NOISES, Recovery, posterior, recover_ridge, recover_with_prior
from stride_lightning.steering.subsets import Design, sample_design
from tests.helpers.tiny import random_tensor

DESIGNS = {
    "dense": sample_design(30, 12, 6, seed=0),
    "sparse": sample_design(50, 64, 2, seed=0),
    "two subsets": sample_design(7, 2, 1, seed=0),
    "more subsets than examples": sample_design(9, 20, 3, seed=0),
}
every_design = pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS.keys())
QUIET = {"show_progress": False}


def planted(design: Design, num_queries: int = 4, noise: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Measurements with a mean that is not zero, and a prior that agrees with them somewhat."""
    truth = random_tensor(num_queries, design.num_train, seed=seed)
    exact = truth @ design.dense(torch.float64).T
    measurements = exact + 3 + noise * random_tensor(*exact.shape, seed=seed + 1)
    return measurements, 0.2 * truth + 0.1 * random_tensor(*truth.shape, seed=seed + 2)


def centred(design: Design, measurements: Tensor) -> tuple[Tensor, Tensor]:
    matrix = design.dense(torch.float64)
    return matrix - matrix.mean(0), measurements - measurements.mean(1, keepdim=True)


def dense_posterior(matrix: Tensor, residual: Tensor, variances: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviations for one query, with ``t^2`` by maximum likelihood, from the textbook."""
    system = (matrix * variances) @ matrix.T
    system = system + noise * system.diagonal().mean() * torch.eye(len(system), dtype=torch.float64)
    gain = (matrix * variances).T @ torch.linalg.inv(system)  # (n, K)
    scale = residual @ torch.linalg.inv(system) @ residual / max(1, len(residual) - 1)
    explained = torch.einsum("nk,kn->n", gain, matrix * variances)
    return gain @ residual, (scale * (variances - explained)).clamp(min=0).sqrt()


def assert_same(obtained: Recovery, scores: Tensor, std: Tensor | None) -> None:
    torch.testing.assert_close(obtained.scores, scores, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(obtained.std, std, rtol=1e-6, atol=1e-8)


def log_evidence(matrix: Tensor, residual: Tensor, variances: Tensor, noise: float) -> float:
    """Log marginal likelihood of the K - 1 numbers that centring leaves, at its best scale ``t^2``."""
    size = len(residual)
    # An orthonormal basis of the vectors that sum to zero.
    directions = torch.linalg.qr(torch.eye(size, dtype=torch.float64) - 1 / size)[0][:, : size - 1]
    system = matrix @ torch.diag(variances) @ matrix.T
    system = system + noise * system.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    system, data = directions.T @ system @ directions, directions.T @ residual
    scale = data @ torch.linalg.inv(system) @ data / (size - 1)
    return float(multivariate_normal.logpdf(data.numpy(), cov=(scale * system).numpy()))


def prior_reference(
    design: Design, measurements: Tensor, prior: Tensor, noise: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    matrix, target = centred(design, measurements)
    scores, std, noises = [], [], []
    for y, w0 in zip(target, prior, strict=True):
        response = matrix @ w0
        agreement = ((y @ response) / (response @ response)).clamp(min=0)
        variances = w0.abs() / w0.abs().mean()
        residual = y - agreement * response
        chosen = noise or max(NOISES, key=lambda one: log_evidence(matrix, residual, variances, one))
        mean, deviations = dense_posterior(matrix, residual, variances, chosen)
        scores.append(agreement * w0 + mean)
        std.append(deviations)
        noises.append(chosen)
    return torch.stack(scores), torch.stack(std), torch.tensor(noises)


# With two subsets the agreement explains the one number there is, and nothing is left to choose a noise from.
@pytest.mark.parametrize(
    ("name", "noise"),
    [(name, noise) for name in DESIGNS for noise in (0.05, 2.0, None) if noise is not None or name != "two subsets"],
)
def test_prior_recovery_equals_dense_algebra(name: str, noise: float | None) -> None:
    design = DESIGNS[name]
    measurements, prior = planted(design)
    obtained = recover_with_prior(measurements, design, prior, noise=noise, **QUIET)
    scores, std, noises = prior_reference(design, measurements, prior, noise)
    torch.testing.assert_close(obtained.scores, scores, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(obtained.std, std, rtol=1e-6, atol=1e-7)
    assert obtained.chosen["noise"] == pytest.approx(float(noises.median()))


def test_two_subsets_leave_the_prior_alone() -> None:
    design = DESIGNS["two subsets"]
    measurements, prior = planted(design)
    obtained = recover_with_prior(measurements, design, prior, **QUIET)
    effects = design.responses(prior).diff()
    agreeing = (measurements.diff() / effects > 0).flatten()
    assert agreeing.any()
    torch.testing.assert_close(obtained.scores[agreeing], (measurements.diff() / effects * prior)[agreeing])
    assert torch.isfinite(obtained.std).all()


@pytest.mark.parametrize("noise", [0.0, 1.0, 5.0, 30.0])
def test_noise_maximises_the_marginal_likelihood(noise: float) -> None:
    design = DESIGNS["dense"]
    measurements, _ = planted(design, num_queries=12, noise=noise, seed=5)
    matrix, target = centred(design, measurements)
    variances = random_tensor(12, 30, seed=8).abs()
    chosen = posterior(target, design, variances, None, **QUIET)[2]
    for i in range(12):
        evidences = {one: log_evidence(matrix, target[i], variances[i], one) for one in NOISES}
        assert float(chosen[i]) == pytest.approx(max(evidences, key=evidences.__getitem__))


def test_more_noise_is_chosen_for_noisier_measurements() -> None:
    design = sample_design(100, 60, 30, seed=0)
    medians = []
    for noise in (0.1, 5.0, 50.0):
        _, target = centred(design, planted(design, num_queries=20, noise=noise)[0])
        medians.append(float(posterior(target, design, torch.ones(1, 100).double(), None, **QUIET)[2].median()))
    assert medians[0] < medians[1] < medians[2]


@pytest.mark.parametrize("noise", [0.3, None])
def test_standard_deviations_are_calibrated(noise: float | None) -> None:
    """Scores and measurements drawn from the model itself: errors over standard deviations have variance one."""
    design = sample_design(80, 120, 60, seed=0)
    prior = random_tensor(60, 80, seed=1).pow(3)
    variances = prior.abs() / prior.abs().mean(1, keepdim=True)
    scale = 0.7
    truth = 1.3 * prior + scale * variances.sqrt() * random_tensor(60, 80, seed=2)
    matrix = design.dense(torch.float64)
    centred_matrix = matrix - matrix.mean(0)
    level = torch.einsum("kn,qn,kn->qk", centred_matrix, variances, centred_matrix).mean(1, keepdim=True)
    measurements = truth @ matrix.T + scale * (0.3 * level).sqrt() * random_tensor(60, 120, seed=3)
    obtained = recover_with_prior(measurements, design, prior, noise=noise, **QUIET)
    assert obtained.std is not None
    errors = (obtained.scores - truth) / obtained.std
    # Noise that was chosen from the data is taken as known, which makes one a little too sure.
    assert float(errors.square().mean()) == pytest.approx(1, abs=0.1 if noise else 0.2)
    assert abs(float(errors.mean())) < 0.05
    assert obtained.chosen["prior_agreement"] == pytest.approx(1.3, abs=0.1)
    # The measurements did say something: uncertainty fell below the prior's.
    assert obtained.std.square().mean() < 0.9 * (scale**2 * variances).mean()


@every_design
def test_scale_of_the_prior_and_shift_of_the_measurements_do_not_matter(design: Design) -> None:
    measurements, prior = planted(design)
    first = recover_with_prior(measurements, design, prior, **QUIET)
    other = recover_with_prior(measurements + 100, design, 50 * prior, **QUIET)
    assert_same(other, first.scores, first.std)
    tripled = recover_with_prior(3 * measurements, design, prior, **QUIET)
    assert_same(tripled, 3 * first.scores, 3 * first.std)


@every_design
def test_blocks_of_queries_change_nothing(design: Design, monkeypatch: pytest.MonkeyPatch) -> None:
    measurements, prior = planted(design, num_queries=5)
    whole = recover_with_prior(measurements, design, prior, **QUIET), recover_ridge(measurements, design, **QUIET)
    for at_once in (1, 2):
        monkeypatch.setattr(recovery, "SYSTEM_BYTES", at_once * 4 * 8 * design.num_subsets**2)
        parts = recover_with_prior(measurements, design, prior, **QUIET), recover_ridge(measurements, design, **QUIET)
        for part, one in zip(parts, whole, strict=True):
            assert_same(part, one.scores, one.std)
            assert part.chosen == pytest.approx(one.chosen)


def test_many_examples_go_through_blocks() -> None:
    """More examples than one block of memberships holds."""
    design = sample_design(8200, 6, 3, seed=0)
    measurements, prior = planted(design, num_queries=2)
    obtained = recover_with_prior(measurements, design, prior, noise=0.3, **QUIET)
    assert_same(obtained, *prior_reference(design, measurements, prior, 0.3)[:2])


@every_design
def test_queries_without_a_prior_have_no_preference(design: Design) -> None:
    measurements, prior = planted(design)
    prior[1] = 0
    obtained = recover_with_prior(measurements, design, prior, noise=0.3, **QUIET)
    flat = recover_ridge(measurements, design, penalty=0.3, **QUIET)
    assert_same(obtained.select(slice(1, 2)), flat.scores[1:2], flat.std[1:2])
    assert (obtained.scores[0] - flat.scores[0]).abs().max() > 1e-3


@every_design
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_measurements_give_zero_scores(design: Design, dtype: torch.dtype) -> None:
    measurements, prior = (value.to(dtype) for value in planted(design))
    measurements[:] = 0.1
    for obtained in (
        recover_with_prior(measurements, design, prior, **QUIET),
        recover_with_prior(measurements, design, 0 * prior, **QUIET),
        recover_ridge(measurements, design, **QUIET),
    ):
        assert obtained.scores.abs().max() < 1e-6
        assert torch.isfinite(obtained.std).all()


@every_design
@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_ridge_equals_its_closed_form(design: Design, penalty: float) -> None:
    measurements, _ = planted(design)
    obtained = recover_ridge(measurements, design, penalty=penalty, **QUIET)
    matrix, target = centred(design, measurements)
    ridge = penalty * (matrix @ matrix.T).diagonal().mean()
    system = matrix.T @ matrix + ridge * torch.eye(design.num_train, dtype=torch.float64)
    torch.testing.assert_close(obtained.scores, torch.linalg.solve(system, matrix.T @ target.T).T)
    assert obtained.chosen == {"penalty": penalty}
    for i in range(4):
        _, std = dense_posterior(matrix, target[i], torch.ones(design.num_train).double(), penalty)
        torch.testing.assert_close(obtained.std[i], std, rtol=1e-6, atol=1e-8)


def leave_one_out(matrix: Tensor, measurements: Tensor, ridge: float) -> float:
    """Mean square error of each subset's measurement predicted by a ridge, with intercept, refit on the others."""
    errors = []
    for k in range(len(matrix)):
        rest = [i for i in range(len(matrix)) if i != k]
        columns, means = matrix[rest].mean(0), measurements[:, rest].mean(1)
        rows, targets = matrix[rest] - columns, measurements[:, rest] - means[:, None]
        system = rows.T @ rows + ridge * torch.eye(matrix.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(system, rows.T @ targets.T).T
        errors.append(measurements[:, k] - means - weights @ (matrix[k] - columns))
    return float(torch.stack(errors).square().mean())


@pytest.mark.parametrize("noise", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("name", ["dense", "more subsets than examples"])
def test_ridge_penalty_has_the_least_leave_one_out_error(name: str, noise: float) -> None:
    design = DESIGNS[name]
    measurements, _ = planted(design, noise=noise, seed=3)
    matrix, _ = centred(design, measurements)
    level = float((matrix @ matrix.T).diagonal().mean())
    grid = np.logspace(-3, 2, 26).tolist()
    errors = {penalty: leave_one_out(design.dense(torch.float64), measurements, penalty * level) for penalty in grid}
    obtained = recover_ridge(measurements, design, **QUIET)
    assert obtained.chosen["penalty"] == pytest.approx(min(errors, key=errors.__getitem__))


def test_single_precision_is_close_to_double() -> None:
    design = sample_design(300, 100, 50, seed=0)
    measurements, prior = planted(design)
    single = recover_with_prior(measurements.float(), design, prior.float(), noise=0.3, **QUIET)
    double = recover_with_prior(measurements, design, prior, noise=0.3, **QUIET)
    assert single.scores.dtype == torch.float32
    torch.testing.assert_close(single.scores.double(), double.scores, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_recovered_is_refused() -> None:
    design = DESIGNS["dense"]
    measurements, prior = planted(design)
    for bad, shape in ((measurements[:, 1:], r"\(4, 11\)"), (measurements[0], r"\(12,\)")):
        with pytest.raises(ValueError, match=rf"shape \(q, 12\), one per subset; got {shape}"):
            recover_ridge(bad, design)
    for noise in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="`noise` must be a positive number, got"):
            recover_with_prior(measurements, design, prior, noise=noise)
        with pytest.raises(ValueError, match="`penalty` must be a positive number, got"):
            recover_ridge(measurements, design, penalty=noise)
    measurements[1, 3], measurements[3, 0] = math.nan, math.inf
    for recover in (
        lambda: recover_with_prior(measurements, design, prior),
        lambda: recover_ridge(measurements, design),
    ):
        with pytest.raises(ValueError, match=r"measurements of queries \[1, 3\] are not finite \(2 of 4\)"):
            recover()


def test_contradicting_measurements_give_the_prior_no_weight() -> None:
    design = DESIGNS["dense"]
    _, prior = planted(design)
    measurements = design.responses(-prior)
    obtained = recover_with_prior(measurements, design, prior, **QUIET)
    assert obtained.chosen["prior_agreement"] == 0
    # What is left is the correction alone, which follows the measurements.
    assert (torch.cosine_similarity(obtained.scores, prior) < -0.5).all()
