"""Noise and prior by the evidence: how probable the targets are under a ridge, averaged over all weights."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from stride_lightning.runtime.checks import check_positive

_GRID = 97  # ridges of the whole profile, eight a decade
_FINE = 61  # further ones around the best: with many data the peak lies between two steps of the grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Evidence:
    """The log marginal likelihood of targets over the ridge, and where it is largest.

    Args:
        ridge: Prior precision of a weight in units where the noise is 1: the ridge of a :class:`Posterior` of the
            same features.
        noise_variance: Noise variance of the targets.
        log_evidence: In nats, at this ridge and noise; for a classification, up to a constant.
        ridges: The grid of the profile, float64 ``(g,)``.
        log_evidences: Nats of the profile, each at the best noise variance for its ridge unless the noise was given.
        num_rows: Number of target values.
        num_effective: Number of weights that the data determine rather than the prior, ``sum S / (S + ridge)``.
        at_edge: ``"lower"`` or ``"upper"`` where the evidence is largest at an end of the grid.
    """

    ridge: float
    noise_variance: float
    log_evidence: float
    ridges: Tensor
    log_evidences: Tensor
    num_rows: int
    num_effective: float
    at_edge: str | None = None

    def plausible(self, drop: float = 2.0) -> tuple[float, float]:
        """The smallest and the largest ridge of the grid (or the best) within ``drop`` nats of the best."""
        near = self.ridges[self.log_evidences >= self.log_evidence - drop].tolist()
        return min([*near, self.ridge]), max([*near, self.ridge])

    def described(self) -> dict[str, float | str | None]:
        """Plain values for the metadata."""
        return {name: getattr(self, name) for name in ("noise_variance", "log_evidence", "num_effective", "at_edge")}

    def plot(self) -> Figure:
        """The profile: nats below the best, over the ridge. Needs matplotlib, without pyplot; ``savefig`` writes it."""
        from stride_lightning.views.drawing import GREEN, INK, blank_figure, style_axes

        figure = blank_figure(4.8, 3.0)
        axes = figure.add_subplot()
        low, high = self.plausible()
        axes.axvspan(low, high, color=GREEN, alpha=0.12, linewidth=0)
        axes.plot(self.ridges.tolist(), (self.log_evidences - self.log_evidence).tolist(), color=INK, linewidth=1.3)
        axes.plot([self.ridge], [0.0], "o", color=GREEN)
        # Far from the best a profile falls by thousands of nats: show where it decides something.
        low, high = self.plausible(60.0)
        limits = min(low, self.ridge / 30), max(high, self.ridge * 30)
        axes.set(xscale="log", xlim=limits, ylim=(-62.0, 3.0))
        axes.minorticks_off()
        axes.set_title(f"ridge {self.ridge:.3g}, noise variance {self.noise_variance:.3g}", fontsize=9, color=INK)
        style_axes(axes, "ridge (shaded: within 2 nats)", "log evidence less its largest (nats)")
        return figure

    def __repr__(self) -> str:
        low, high = self.plausible()
        edge = f", at the {self.at_edge} end of the grid" if self.at_edge else ""
        return (
            f"Evidence(ridge={self.ridge:.3g} ({low:.3g} to {high:.3g} within 2 nats{edge}), "
            f"noise_variance={self.noise_variance:.3g}, log_evidence={self.log_evidence:.6g}, "
            f"num_effective={self.num_effective:.3g} of {self.num_rows} rows)"
        )


def fit_evidence(
    gram: Tensor, squared_norm: float, squared_residuals: float, num_rows: int, *, noise_variance: float | None = None
) -> Evidence:
    r"""Choose the prior precision, and the noise variance, under which the data are most probable.

    Laplace's approximation at the trained weights w of a linearised model with features X; the targets' noise has
    variance s2, the prior s2 / ridge.

    .. math:: -\frac{1}{2} \Big( N \log 2 \pi s^2 + \frac{|r|^2 + \mathrm{ridge} \, |w|^2}{s^2}
              + \log \det (I + X'X / \mathrm{ridge}) \Big)

    The best s2 of each ridge has a closed form. The grid holds ridges from 1e-8 to 1e4 times the largest eigenvalue,
    and is then refined around the best. If the best is at an end, a ``UserWarning`` explains its meaning.

    Args:
        gram: ``X'X`` over all data, shape ``(k, k)``.
        squared_norm: ``|w|^2``, of all weights that the features stand for.
        squared_residuals: ``|r|^2``, twice the sum of losses in units where the noise is 1.
        num_rows: N, the number of target values.
        noise_variance: A fixed value: 1 for classifications, where the labels give the noise. Estimated by default.

    Raises:
        ValueError: If all features or all weights are zero, or not finite.

    Example:
        >>> evidence = fit_evidence(100 * torch.eye(3).double(), 3.0, 50.0, 100)
        >>> evidence.num_rows, evidence.at_edge
        (100, None)

    Reference: MacKay 1992, A practical Bayesian framework for backpropagation networks; arXiv:2104.04975.
    """
    if noise_variance is not None:
        check_positive("noise_variance", noise_variance)
    if not (math.isfinite(squared_norm + squared_residuals) and bool(gram.isfinite().all())):
        raise ValueError(
            "Features, weights or losses hold NaN or infinite values. Check the model's weights (did training "
            "diverge?) and the data."
        )
    if squared_norm <= 0 or float(gram.trace()) <= 0:
        raise ValueError(
            f"All {'features' if squared_norm > 0 else 'weights'} are zero, so every ridge is equally probable: "
            "give `ridge=`."
        )
    values = np.linalg.eigvalsh(gram.double().cpu().numpy())
    values = values[values > len(values) * np.finfo(float).eps * values[-1]]

    def evaluated(ridge: float) -> tuple[float, float]:
        quadratic = squared_residuals + ridge * squared_norm
        noise = quadratic / num_rows if noise_variance is None else noise_variance
        log_det = num_rows * math.log(2 * math.pi * noise) + float(np.log1p(values / ridge).sum())
        return -0.5 * (log_det + quadratic / noise), noise

    ridges = values[-1] * np.logspace(-8, 4, _GRID)
    profile = np.array([evaluated(ridge)[0] for ridge in ridges])
    best = int(profile.argmax())
    ridge, at_edge = float(ridges[best]), None
    if 0 < best < _GRID - 1:
        bounds = math.log(ridges[best - 1]), math.log(ridges[best + 1])
        options: Any = {"bounds": bounds, "method": "bounded", "options": {"xatol": 1e-6}}
        finer: Any = minimize_scalar(lambda log_ridge: -evaluated(math.exp(log_ridge))[0], **options)
        ridge = max(ridge, math.exp(finer.x), key=lambda ridge: evaluated(ridge)[0])
        ridges = np.unique(np.concatenate([ridges, np.geomspace(ridges[best - 1], ridges[best + 1], _FINE)]))
        profile = np.array([evaluated(ridge)[0] for ridge in ridges])
    else:
        at_edge = "lower" if best == 0 else "upper"
        meaning = "so well determined by the data that they need no prior."
        if at_edge == "upper":
            meaning = "so large that the data hardly count. Are the features those of this model?"
        warnings.warn(
            f"The evidence is largest at the {at_edge} end of the ridges, {ridge:.3g}: the weights are {meaning} "
            "Give `ridge=`.",
            stacklevel=2,
        )
    log_evidence, noise = evaluated(ridge)
    num_effective = float((values / (values + ridge)).sum())
    grid = torch.from_numpy(ridges), torch.from_numpy(profile)
    return Evidence(ridge, noise, log_evidence, *grid, num_rows, num_effective, at_edge)
