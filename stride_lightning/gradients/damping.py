"""Damping: relative to the mean eigenvalue, and never an answer from a singular matrix."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override


def check_damping(damping: float) -> float:
    """The damping, if it is a non-negative number."""
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 <= damping < math.inf:
        raise ValueError(
            "`damping` must be a number of at least 0, relative to the mean eigenvalue of the curvature; "
            f"got {damping!r}."
        )
    return float(damping)


def singular(what: str, damping: float) -> str:
    """The message about a curvature that is singular with some damping."""
    return (
        f"The curvature of {what} is singular with a damping of {damping:g}: scores would be noise. Give a larger "
        "`damping=` (it is relative to the mean eigenvalue: 0.1 is a tenth of it), or fewer features (a smaller "
        "`projection_dim=`)."
    )


class RelativeDamping:
    """The rule of all curvatures: ``damping`` is relative to the mean eigenvalue of all blocks together.

    The mean is over eigenvalues that can be non-zero: ``trace / min(n, p)``; ``trace / p`` for EK-FAC and diagonals.
    """

    def __init__(self, damping: float) -> None:
        self.damping, self.mean_eigenvalue = damping, 0.0  # until fit sets it

    @property
    def absolute_damping(self) -> float:
        """What is added to the eigenvalues."""
        return self.damping * self.mean_eigenvalue

    def set_mean_eigenvalue(self, mean: float) -> None:
        """Set what the damping is relative to; zero is refused, since no damping would help."""
        if not mean > 0:
            raise ValueError(
                f"The curvature is {mean:g} in all directions: the outputs of the model are sure of every training "
                "example, or do not depend on these parameters, so there is nothing to divide by. "
                "method='grad-dot' needs no curvature."
            )
        self.mean_eigenvalue = mean


class Damped(ABC):
    """A positive semi-definite matrix H and the damped systems it makes, from a factorised one, float64 ``(m, m)``."""

    def __init__(self, factored: Tensor, name: str) -> None:
        self._matrix, self._name = factored, name
        self._factor: tuple[float, Tensor] | None = None  # of the damping it was made with
        #: Number of features, and the sum of eigenvalues.
        self.size, self.trace = len(factored), float(factored.trace())

    @abstractmethod
    def solve(self, vectors: Tensor, damping: float) -> Tensor:
        """``(H + damping I)^-1 v`` for each row v of ``vectors``, shape ``(q, k)``.

        Raises:
            ValueError: If the damped matrix is singular to the precision of the features.
        """

    def _solved(self, right: Tensor, damping: float, precision: float) -> Tensor:
        if self._factor is None or self._factor[0] != damping:
            damped = self._matrix.diagonal_scatter(self._matrix.diagonal() + damping)
            factor, failed = torch.linalg.cholesky_ex(damped)
            rounding = len(damped) * precision * float(damped.diagonal().max())
            del damped  # as large as the factor, so not to be held beside it
            # The smallest pivot bounds the smallest eigenvalue from above; below the features' rounding it is noise.
            if int(failed) or float(factor.diagonal().square().min()) <= rounding:
                raise ValueError(singular(f"{self._name} ({self.size} features)", damping))
            self._factor = damping, factor
        return torch.cholesky_solve(right, self._factor[1])


class DampedMatrix(Damped):
    """The matrix itself, shape ``(k, k)``."""

    @override
    def solve(self, vectors: Tensor, damping: float) -> Tensor:
        return self._solved(vectors.T.double(), damping, torch.finfo(vectors.dtype).eps).T.to(vectors)


class DampedKernel(Damped):
    """The mean of the outer products of n rows of k features, by their ``(n, n)`` kernel, for n < k."""

    def __init__(self, rows: Tensor, name: str) -> None:
        super().__init__((rows @ rows.T).double() / len(rows), name)
        self._rows = rows
        self.size = rows.shape[1]

    @override
    def solve(self, vectors: Tensor, damping: float) -> Tensor:
        if damping == 0:
            raise ValueError(singular(f"{self._name} ({self.size} features of {len(self._rows)} examples)", damping))
        products = (vectors @ self._rows.T).double()  # (q, n)
        inner = self._solved(products.T, damping, torch.finfo(vectors.dtype).eps).T / len(self._rows)
        # In double precision: what is left along the rows is small beside what is subtracted.
        return ((vectors.double() - inner @ self._rows.double()) / damping).to(vectors)
