"""The evidence of a ridge against dense Gaussian algebra."""

import math

import numpy as np
import pytest
import torch

from stride_lightning.information.evidence import fit_evidence

N, K = 40, 6


def problem(seed=0, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(N, K, generator=generator, dtype=torch.float64)
    w = torch.randn(K, generator=generator, dtype=torch.float64)
    return X, w, X @ w + noise * torch.randn(N, generator=generator, dtype=torch.float64)


def normal(values, variance):
    return -0.5 * (values.square() / variance + math.log(2 * math.pi * variance)).sum()


def dense(X, w, z, ridge, noise):
    """Laplace's approximation term by term: likelihood and prior at w, and the volume of the posterior."""
    likelihood, prior = normal(z - X @ w, noise), normal(w, noise / ridge)
    hessian = (X.T @ X + ridge * torch.eye(K, dtype=torch.float64)) / noise
    return float(likelihood + prior + 0.5 * K * math.log(2 * math.pi) - 0.5 * torch.logdet(hessian))


def fitted(X, w, z, **options):
    return fit_evidence(X.T @ X, float(w @ w), float((z - X @ w).square().sum()), N, **options)


@pytest.mark.parametrize("noise", [None, 1.0, 0.05])
def test_the_profile_is_the_laplace_approximation(noise):
    X, w, z = problem()
    evidence = fitted(X, w, z, noise_variance=noise)
    for ridge, value in list(zip(evidence.ridges.tolist(), evidence.log_evidences.tolist(), strict=True))[::7]:
        residual = float((z - X @ w).square().sum() + ridge * w @ w)
        assert value == pytest.approx(dense(X, w, z, ridge, residual / N if noise is None else noise), rel=1e-10)
    assert evidence.log_evidence == pytest.approx(dense(X, w, z, evidence.ridge, evidence.noise_variance), abs=1e-9)


def test_it_is_the_exact_evidence_of_a_linear_model_at_its_optimum():
    X, _, z = problem()
    evidence = fitted(X, torch.linalg.solve(X.T @ X + 0.7 * torch.eye(K).double(), X.T @ z), z)
    w = torch.linalg.solve(X.T @ X + 0.7 * torch.eye(K).double(), X.T @ z)
    noise = float((z - X @ w).square().sum() + 0.7 * w @ w) / N
    covariance = noise * (X @ X.T / 0.7 + torch.eye(N).double())
    exact = torch.distributions.MultivariateNormal(torch.zeros(N).double(), covariance).log_prob(z)
    assert dense(X, w, z, 0.7, noise) == pytest.approx(float(exact), abs=1e-9)
    assert evidence.log_evidence >= float(exact)


@pytest.mark.parametrize("noise", [None, 1.0])
def test_the_best_of_a_fine_grid(noise):
    X, w, z = problem(1)
    evidence = fitted(X, w, z, noise_variance=noise)
    ridges = np.geomspace(evidence.ridge / 3, evidence.ridge * 3, 2001)
    residual = float((z - X @ w).square().sum())
    values = [
        dense(X, w, z, ridge, (residual + ridge * float(w @ w)) / N if noise is None else noise) for ridge in ridges
    ]
    assert evidence.ridge == pytest.approx(float(ridges[int(np.argmax(values))]), rel=2e-3)
    low, high = evidence.plausible()
    assert low <= evidence.ridge <= high
    shrunk = X @ torch.linalg.solve(X.T @ X + evidence.ridge * torch.eye(K).double(), X.T)
    assert evidence.num_effective == pytest.approx(float(shrunk.trace()), rel=1e-9)


def test_known_noise_and_prior_are_found():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4000, 200, generator=generator, dtype=torch.float64)
    w = 0.5 * torch.randn(200, generator=generator, dtype=torch.float64)
    residuals = 2.0 * torch.randn(4000, generator=generator, dtype=torch.float64)
    evidence = fit_evidence(X.T @ X, float(w @ w), float(residuals.square().sum()), 4000)
    assert evidence.noise_variance == pytest.approx(4.0, rel=0.1)
    assert evidence.ridge == pytest.approx(4.0 / 0.25, rel=0.25)


def test_ends_of_the_grid_are_warned_of():
    for squared_norm, edge in ((1e-9, "upper"), (1e12, "lower")):
        with pytest.warns(UserWarning, match=f"{edge} end"):
            assert fit_evidence(torch.eye(2).double(), squared_norm, 1.0, 10, noise_variance=1.0).at_edge == edge


def test_a_plot_and_a_summary():
    pytest.importorskip("matplotlib")
    X, w, z = problem()
    evidence = fitted(X, w, z)
    assert evidence.plot().axes
    assert f"{evidence.ridge:.3g}" in repr(evidence)


@pytest.mark.parametrize(
    ("gram", "squared_norm", "noise", "message"),
    [
        (torch.zeros(2, 2), 1.0, None, "All features are zero"),
        (torch.eye(2), 0.0, None, "All weights are zero"),
        (torch.eye(2), math.nan, None, "diverge"),
        (torch.full((2, 2), math.inf), 1.0, None, "diverge"),
        (torch.eye(2), 1.0, 0.0, "positive"),
    ],
)
def test_nothing_to_choose_by(gram, squared_norm, noise, message):
    with pytest.raises(ValueError, match=message):
        fit_evidence(gram, squared_norm, 1.0, 3, noise_variance=noise)
