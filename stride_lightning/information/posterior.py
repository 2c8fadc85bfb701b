"""The Gaussian posterior of linear weights: the uncertainty that the features of the data leave."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

#: Noise-whitened features, shape ``(n, C, k)``, or batches of them.
Features: TypeAlias = "Tensor | Iterable[Tensor]"

_ROWS = 4096  # of features in double precision at a time
_EPS = torch.finfo(torch.float64).eps


class Posterior:
    """Weights ``w ~ N(0, I / ridge)`` seen through outputs ``B_i w`` with unit noise: covariance ``A^-1``.

    ``A = ridge I + sum_i B_i' B_i``, where ``B_i`` of shape ``(C, k)`` holds the features of example i divided by the
    root of its noise: gradients over ``sigma`` for a regression, times ``sqrt(p (1 - p))`` for a margin (both C = 1),
    or ``Lambda^(1/2) J`` for the linearised Laplace form of a softmax. Labels are not used. A is computed in
    double precision; :meth:`fit` is the usual way to make a posterior.

    Args:
        gram: ``sum_i B_i' B_i``, float64 of shape ``(k, k)``.
        ridge: Prior precision of every weight, in the units of ``gram``; 0 where the data determine all weights.
        num_examples: How many examples are in ``gram``.
        precision: Relative rounding of the features, which decides when ``A`` counts as singular.

    Raises:
        ValueError: If ``A`` is singular, or features were not finite.

    Example:
        >>> posterior = Posterior.fit(torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]), ridge=1.0)
        >>> posterior
        Posterior(num_examples=2, num_features=2, ridge=1)
        >>> posterior.variance(torch.eye(2)[:, None])[:, 0, 0]  # seen twice, and never
        tensor([0.3333, 1.0000], dtype=torch.float64)
    """

    def __init__(self, gram: Tensor, ridge: float, *, num_examples: int, precision: float = _EPS) -> None:
        self.gram, self.ridge, self.num_examples, self.precision = gram, check_ridge(ridge), num_examples, precision
        self.num_features = len(gram)
        if not bool(gram.isfinite().all()):
            raise ValueError(
                "Features hold NaN or infinite values, or overflow when squared. Check the model's weights (did "
                "training diverge?) and the inputs."
            )
        if num_examples == 0:
            # The root of the prior is a number: nothing to factorise or to multiply by.
            if self.ridge == 0:
                raise ValueError(
                    "Without data a `ridge` of 0 leaves all weights undetermined: give a positive `ridge=`."
                )
            self._root = None
            return
        matrix = gram.clone()
        matrix.diagonal().add_(self.ridge)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        # Rounding of the features adds spurious directions, squared in A: below that size a pivot is noise.
        noise = max(self.num_features * _EPS, precision**2) * float(matrix.diagonal().max())
        if int(failed) or float(factor.diagonal().square().min()) <= noise:
            mean = float(gram.trace()) / self.num_features
            raise ValueError(
                f"The posterior precision of {num_examples} examples and {self.num_features} features is singular "
                f"with a ridge of {self.ridge:g}: nothing determines some direction of the weights. Give a "
                f"larger `ridge=` (the mean eigenvalue of the data is {mean:.3g}), or fewer features (a smaller "
                "`projection_dim=`)."
            )
        identity = torch.eye(self.num_features, dtype=factor.dtype, device=factor.device)
        self._root = torch.linalg.solve_triangular(factor, identity, upper=False).mT.contiguous()

    @classmethod
    def fit(cls, features: Features, *, ridge: float) -> Posterior:
        """Accumulate features ``(n, C, k)``, or batches ``(b, C, k)`` whose C may differ, in one pass."""
        gram, num_examples, precision = None, 0, _EPS
        for batch in feature_batches(features):
            rows = batch.flatten(0, 1).double()
            if gram is None:
                gram = rows.new_zeros(rows.shape[1], rows.shape[1])
            elif rows.shape[1] != len(gram):
                raise ValueError(f"Batches must have the same number of features, got {len(gram)} and {rows.shape[1]}.")
            gram.addmm_(rows.T, rows)
            num_examples += len(batch)
            precision = max(precision, torch.finfo(batch.dtype).eps)
        if gram is None:
            raise ValueError(
                "Expected the features of at least one example, got none: use `Posterior.without_data` for the prior."
            )
        return cls(gram, ridge, num_examples=num_examples, precision=precision)

    @classmethod
    def without_data(cls, num_features: int, *, ridge: float, device: torch.device | str = "cpu") -> Posterior:
        """The prior: nothing seen yet; ``ridge`` must be positive."""
        gram = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        return cls(gram, ridge, num_examples=0)

    def prior(self) -> Posterior:
        """The same weights before any data."""
        return self.without_data(self.num_features, ridge=self.ridge, device=self.gram.device)

    def whiten(self, features: Tensor) -> Tensor:
        """Features ``(..., k)`` times ``L`` with ``A^-1 = L L'``: their inner products are posterior covariances.

        Computed in double precision, rounded to the features' precision (float32 at least).
        """
        if features.shape[-1] != self.num_features:
            raise ValueError(
                f"Expected features of size {self.num_features}, those of the posterior; got {tuple(features.shape)}."
            )
        exact = features.double()
        whitened = exact * self.ridge**-0.5 if self._root is None else exact @ self._root
        return whitened.to(torch.promote_types(features.dtype, torch.float32))

    def whitened(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(b, C, k)`` whitened in double precision, and the variance of their outputs, ``(b, C, C)``."""
        check_features(features)
        rows = self.whiten(features.double())
        return rows, rows @ rows.mT

    def variance(self, features: Tensor) -> Tensor:
        """Posterior covariance of the outputs, ``B A^-1 B'``, in units of the noise; float64 ``(b, C, C)``."""
        return self.whitened(features)[1]

    def __repr__(self) -> str:
        return f"Posterior(num_examples={self.num_examples}, num_features={self.num_features}, ridge={self.ridge:g})"


def check_ridge(ridge: float) -> float:
    """Refuse a ridge that is not a non-negative number."""
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 <= ridge < math.inf:
        raise ValueError(f"`ridge` must be a number of at least 0, the prior precision of a weight; got {ridge!r}.")
    return float(ridge)


def check_features(features: object) -> None:
    """Refuse features that are not one real matrix per example."""
    if not isinstance(features, Tensor) or features.ndim != 3 or not features.is_floating_point():
        kind = f"{features.dtype} of shape {tuple(features.shape)}" if isinstance(features, Tensor) else repr(features)
        raise ValueError(
            "Expected features of shape (examples, outputs, features), floating point (one output: "
            f"`features[:, None]`); got {kind}."
        )


def feature_batches(features: Features) -> Iterator[Tensor]:
    """Consecutive batches ``(b, C, k)`` that are small enough to be copied in double precision."""
    for batch in [features] if isinstance(features, Tensor) else features:
        check_features(batch)
        if len(batch):
            yield from batch.split(max(1, _ROWS // max(1, batch.shape[1])))
