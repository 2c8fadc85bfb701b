"""Damping, relative to the mean eigenvalue; singular matrices are refused."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override


def check_damping(damping: float) -> float:
    """The damping as a float; anything but a finite non-negative number is refused."""
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 <= damping < math.inf:
        raise ValueError(
            "`damping` must be a number of at least 0 (it is relative to the mean eigenvalue of the curvature), "
            f"got {damping!r}."
        )
    return float(damping)


def singular(what: str, damping: float) -> str:
    """The message about a curvature that is singular with a damping."""
    return (
        f"The curvature of {what} is singular with damping={damping:g}, so scores would be noise. Give a larger "
        "`damping=` (it is relative to the mean eigenvalue: 0.1 is a tenth of it), or a smaller "
        "`projection_dim=` where the method has one."
    )


class RelativeDamping:
    """The rule of all curvatures: ``damping`` is relative to the mean eigenvalue of all blocks together.

    The mean is over eigenvalues that can be non-zero: ``trace / min(n, p)``; ``trace / p`` for EK-FAC and diagonals.
    """

    def __init__(self, damping: float) -> None:
        self.damping, self.mean_eigenvalue = damping, 0.0  # until fit sets it

    @property
    def absolute_damping(self) -> float:
        """The number that is added to the eigenvalues."""
        return self.damping * self.mean_eigenvalue

    def set_mean_eigenvalue(self, mean: float) -> None:
        """Set the mean that the damping is relative to; zero is refused, since no damping would help."""
        if not mean > 0:
            raise ValueError(
                f"The curvature must be positive somewhere, but it is {mean:g} in all directions: either the model is "
                "certain about every training example, or its outputs do not depend on these parameters. Use "
                "method='grad-dot', which needs no curvature."
            )
        self.mean_eigenvalue = mean


class Damped(ABC):
    """A positive semi-definite matrix H and its damped systems, by factors of a float64 matrix of shape ``(m, m)``."""

    def __init__(self, factored: Tensor, name: str) -> None:
        self._matrix, self._name = factored, name
        self._factor: tuple[float, Tensor] | None = None  # the damping, and the factor with it
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
            del damped  # as large as the factor: only one of them needs memory from here on
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
    """The mean outer product of n rows of k features, for n < k, by the ``(n, n)`` kernel of the rows."""

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
        # In double precision: along the rows the difference is small beside its two terms.
        return ((vectors.double() - inner @ self._rows.double()) / damping).to(vectors)
