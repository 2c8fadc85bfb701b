"""From K measurements to n scores: recovery with a prior, by the ridge or by the lasso."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from stride_lightning.runtime.checks import check_positive
from stride_lightning.runtime.parallel import even_slices, map_chunks
from stride_lightning.steering.lasso import cross_validate_penalty, solve_lasso
from stride_lightning.steering.subsets import Design

RecoveryName = Literal["prior", "lasso", "ridge"]

#: Bytes the K x K systems of queries solved together may take, in each thread.
SYSTEM_BYTES = 2**25
#: Candidates for the noise variance, relative to what the prior explains; the first wins a tie.
NOISES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1)


@dataclass(frozen=True)
class Recovery:
    """Scores recovered from measurements."""

    #: Shape ``(q, n)``, in nats of query loss; positive is helpful.
    scores: Tensor
    #: Posterior standard deviation of every score, same shape, where the recovery is Bayesian.
    std: Tensor | None = None
    #: What was chosen from the data, plain values.
    chosen: dict[str, Any] = field(default_factory=dict)
    #: Factor of the prior in each query's scores, shape ``(q,)``, where the recovery starts from a prior.
    agreement: Tensor | None = None

    def select(self, queries: slice) -> Recovery:
        """The same, of some of the queries."""
        std, agreement = (None if part is None else part[queries] for part in (self.std, self.agreement))
        return Recovery(self.scores[queries], std, self.chosen, agreement)


def recover(
    measurements: Tensor,
    design: Design,
    how: str,
    prior: Tensor | None = None,
    *,
    penalty: float | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> Recovery:
    """Recover scores from measurements ``(q, K)`` in nats.

    With ``"prior"`` by :func:`recover_with_prior`, which alone takes the prior ``(q, n)``; with ``"ridge"`` by
    :func:`recover_ridge`; with ``"lasso"`` by :func:`~stride_lightning.steering.lasso.solve_lasso`. The penalty of the
    last two is by cross-validation over subsets when None, whose folds the seed deals.
    """
    quiet: dict[str, Any] = {"show_progress": show_progress}
    if how == "prior":
        assert prior is not None
        return recover_with_prior(measurements, design, prior.to(measurements), **quiet)
    if how == "ridge":
        return recover_ridge(measurements, design, penalty=penalty, **quiet)
    relative = cross_validate_penalty(measurements, design, seed=seed, **quiet) if penalty is None else penalty
    solution = solve_lasso(measurements, design, relative, **quiet)
    chosen = {
        "penalty": float(torch.as_tensor(relative).median()),
        "duality_gap_max": float(solution.gap.max()),
        "nonzeros_mean": float((solution.scores != 0).sum(1).float().mean()),
    }
    return Recovery(solution.scores, None, chosen)


def recover_with_prior(
    measurements: Tensor,
    design: Design,
    prior: Tensor,
    *,
    noise: float | None = None,
    show_progress: bool = True,
) -> Recovery:
    r"""Recover what a first-order prior misses.

    For each query ``w ~ N(c w0, t^2 V)`` with ``w0`` the prior, ``c`` its (non-negative) least-squares agreement with
    the measurements, ``V = diag|w0|`` scaled to mean 1, and measurement noise ``noise`` times the mean diagonal of
    ``M V M'``:

    .. math:: w = c w_0 + V M' (M V M' + \sigma^2 I)^{-1} (y - c M w_0),

    columns of ``M`` and ``y`` centred over subsets. ``t^2`` is the maximum-likelihood scale and ``noise`` maximises
    the marginal likelihood of each query, so that the posterior standard deviation of each score is in nats too; it
    takes ``c`` and ``V`` as known.

    Memory: the result, twice; and for each thread ``6 K^2`` floats for each query of a block (32 MB in all, or one
    query) and 8192 rows of memberships.

    Measurements have shape ``(q, K)``, the prior ``(q, n)``; its overall scale does not matter.

    Example:
        >>> from stride_lightning.steering.subsets import sample_design
        >>> design = sample_design(num_train=50, num_subsets=20)
        >>> truth = torch.zeros(1, 50)
        >>> truth[0, 7] = 1.0
        >>> recover_with_prior(design.responses(truth), design, truth + 0.01).scores.argmax().item()
        7
    """
    if noise is not None:
        check_positive("noise", noise)
    check_measurements(measurements, design)
    centred = measurements - measurements.mean(1, keepdim=True)
    response = design.responses(prior)
    response -= response.mean(1, keepdim=True)
    energy = response.square().sum(1)
    # Measurements that contradict the prior give it no weight rather than a negative one.
    agreement = torch.where(energy > 0, (centred * response).sum(1) / energy.clamp(min=1e-38), 0.0).clamp(min=0)
    variances = prior.abs()
    scale = variances.mean(1, keepdim=True)
    # A query without first-order influence (a perfect fit) has no preference among examples.
    variances = torch.where(scale > 0, variances / scale.clamp(min=1e-38), 1.0)
    residual = centred - agreement[:, None] * response
    scores, std, noises = posterior(residual, design, variances, noise, show_progress=show_progress)
    scores.addcmul_(agreement[:, None], prior)
    chosen = {"prior_agreement": float(agreement.mean()), "noise": float(noises.median())}
    return Recovery(scores, std, chosen, agreement)


def recover_ridge(
    measurements: Tensor, design: Design, *, penalty: float | None = None, show_progress: bool = True
) -> Recovery:
    """Ridge regression of the measurements on the memberships: every example alike a priori.

    The penalty is relative to the mean diagonal of ``M M'``; chosen by leave-one-subset-out prediction error over all
    queries when None, and returned beside scores and posterior standard deviations.
    """
    if penalty is not None:
        check_positive("penalty", penalty)
    check_measurements(measurements, design)
    centred = measurements - measurements.mean(1, keepdim=True)
    ones = measurements.new_ones(1, design.num_train)
    if penalty is None:
        penalty = _leave_one_out_penalty(centred, _centre(design.gram(ones))[0])
    scores, std, _ = posterior(centred, design, ones, penalty, show_progress=show_progress)
    return Recovery(scores, std, {"penalty": penalty})


def queries_per_system(num_subsets: int, element_size: int = 4) -> int:
    """Queries whose systems are solved together."""
    return max(1, SYSTEM_BYTES // (6 * element_size * num_subsets**2))


def posterior(
    residual: Tensor, design: Design, variances: Tensor, noise: float | None, *, show_progress: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior mean and standard deviation of ``w ~ N(0, t^2 V)`` given centred measurements ``(q, K)``.

    The diagonal of ``V`` has shape ``(q, n)``, or ``(1, n)`` for all queries alike. The noise variance is relative to
    the mean diagonal of ``M V M'``; by marginal likelihood from ``NOISES`` for each query when None. It is returned
    last, shape ``(q,)``.
    """
    num_subsets, device = residual.shape[1], residual.device
    largest = queries_per_system(num_subsets, residual.element_size())

    def solve(queries: slice) -> tuple[Tensor, Tensor, Tensor]:
        shared = variances if len(variances) == 1 else variances[queries]
        factor, solved, noises = _solve(_centre(design.gram(shared)), residual[queries], noise)
        mean = shared * design.backproject(solved)
        fit = (residual[queries] * solved).sum(1) / max(1, num_subsets - 1)  # maximum-likelihood t^2
        # L^-1, so that |L^-1 m|^2 = m' A^-1 m. (A batched `inv` of a triangle trips a bug in MKL.)
        identity = torch.eye(num_subsets, device=device, dtype=factor.dtype)
        whitener = torch.linalg.solve_triangular(factor, identity, upper=False)
        parts = []
        for places, members in design.blocks(residual):
            members -= members.mean(1, keepdim=True)
            explained = torch.stack([(one @ members.T).square().sum(0) for one in whitener])  # (q, b)
            prior = shared[:, places]
            parts.append((fit[:, None] * (prior - prior.square() * explained).clamp(min=0)).sqrt())
        return mean, torch.cat(parts, 1), noises

    chunks = even_slices(len(residual), largest, device)
    solved = map_chunks(solve, chunks, device, "Recovering scores", show_progress=show_progress)
    mean, std, noises = map(torch.cat, zip(*solved, strict=True))
    return mean, std, noises


def _solve(system: Tensor, residual: Tensor, noise: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Factor ``A = M V M' + noise * level * I`` ``(q, K, K)``, solve for ``(q, K)``, choose the noise if not given."""
    num_subsets = residual.shape[1]
    level = system.diagonal(dim1=1, dim2=2).mean(1)
    level = torch.where(level > 0, level, 1.0)  # no variation at all: any ridge gives the right answer, zero
    best: tuple[Tensor, ...] = ()
    best_evidence = residual.new_full((len(residual),), -torch.inf)
    for candidate in NOISES if noise is None else (noise,):
        ridged = system.clone()
        ridged.diagonal(dim1=1, dim2=2).add_((candidate * level)[:, None])
        factor = torch.linalg.cholesky(ridged)
        solved = torch.cholesky_solve(residual[:, :, None], factor)[..., 0]
        quadratic = (residual * solved).sum(1).clamp(min=1e-38)
        # Centring took one direction: it holds no data, only ridge.
        log_determinant = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1) - (candidate * level).log()
        evidence = -0.5 * (log_determinant + (num_subsets - 1) * quadratic.log())
        better = evidence > best_evidence + 1e-5  # two subsets leave all alike, but for rounding
        new = (factor, solved, torch.full_like(evidence, candidate))
        masks = (better[:, None, None], better[:, None], better)
        best = tuple(map(torch.where, masks, new, best)) if best else new
        best_evidence = torch.where(better, evidence, best_evidence)
    factor, solved, noises = best  # pyright: ignore[reportAssignmentType]
    return factor, solved, noises


def check_measurements(measurements: Tensor, design: Design) -> None:
    """Refuse measurements that do not fit the design or are not finite, naming the queries."""
    if measurements.ndim != 2 or measurements.shape[1] != design.num_subsets:
        raise ValueError(
            f"Measurements must have shape (q, {design.num_subsets}), one per subset; got {tuple(measurements.shape)}."
        )
    bad = (~torch.isfinite(measurements)).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"The measurements of queries {bad[:10]} are not finite ({len(bad)} of {len(measurements)}). Leave these "
            "queries out."
        )


def _centre(gram: Tensor) -> Tensor:
    """``H G H`` with ``H = I - 11'/K``: the Gram matrices of centred columns."""
    rows = gram.mean(1, keepdim=True)
    return gram - rows - rows.transpose(1, 2) + rows.mean(2, keepdim=True)


def _leave_one_out_penalty(centred: Tensor, gram: Tensor) -> float:
    """The relative ridge that best predicts each subset's measurement from the others (closed form)."""
    values, vectors = torch.linalg.eigh(gram.double())
    rotated = centred.double() @ vectors
    level = float(gram.diagonal().mean())
    errors = {}
    for penalty in torch.logspace(-3, 2, 26, dtype=torch.float64).tolist():
        shrunk = penalty * level / (values.clamp(min=0) + penalty * level)
        remaining = (rotated * shrunk) @ vectors.T
        # The mean over subsets was fitted as well, hence the 1/K.
        left = (vectors.square() * shrunk).sum(1) - 1 / len(gram)
        errors[penalty] = float((remaining / left.clamp(min=1e-9)).square().mean())
    return min(errors, key=errors.__getitem__)
