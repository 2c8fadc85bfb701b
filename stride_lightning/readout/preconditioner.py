"""An approximate inverse of a readout's curvature, and the exact one where it is small."""

from __future__ import annotations

import torch
from torch import Tensor

from stride_lightning.readout.problem import BLOCK_BYTES, Curvature, Problem

#: Unknowns of which the curvature is factorised as a whole: those of the leading features, for all outputs.
MAX_WHOLE = 2048


class Preconditioner:
    """The whole curvature of the leading features, and its diagonal for the others.

    Features are principal coordinates, strongest first. So the curvature's large entries lie in its head, and with
    ``C m`` up to ``MAX_WHOLE`` the head is all of it. Memory: ``16 MAX_WHOLE^2`` bytes and one block.
    """

    def __init__(self, curvature: Curvature) -> None:
        problem = curvature.problem
        num_features, num_outputs = problem.shape
        means = curvature.means(slice(None))[..., 0]
        diagonal = problem.precision.clone()
        for rows in problem.blocks(1):
            weights = problem.task.output_weights(problem.encoded[rows])
            diagonal += problem.features[rows].square().T @ (weights * problem.task.curvature_diagonal(means[rows]))
        self._inverse_diagonal = (1 / diagonal)[..., None]
        self._size = min(num_features, MAX_WHOLE // num_outputs)
        self._factor = self._factorised(problem, means) if self._size else None
        #: Whether it is the inverse of the whole curvature.
        self.is_whole = self._size == num_features

    def _factorised(self, problem: Problem, means: Tensor) -> Tensor:
        """Cholesky factor of the head, shape ``(k C, k C)``."""
        size, num_outputs = self._size, problem.shape[1]
        head = means.new_zeros(num_outputs, size * num_outputs, size)  # (C', k C, k)
        step = max(64, BLOCK_BYTES // (means.element_size() * size * num_outputs))
        for start in range(0, len(problem), step):
            rows = slice(start, start + step)
            leading = problem.features[rows, :size]
            for output, unit in enumerate(torch.eye(num_outputs, dtype=means.dtype, device=means.device)):
                curved = problem.curved(rows, means[rows, :, None], unit.expand_as(means[rows])[..., None])[..., 0]
                head[output] += (leading[:, :, None] * curved[:, None, :]).flatten(1).T @ leading
        whole = head.permute(1, 2, 0).flatten(1)  # (k C, k C)
        whole.diagonal().add_(problem.precision[:size].flatten())
        return torch.linalg.cholesky((whole + whole.T) / 2)

    def __call__(self, vectors: Tensor) -> Tensor:
        """The approximate inverse times vectors of shape ``(m, C, K)``."""
        solved = self._inverse_diagonal * vectors
        if self._factor is not None:
            leading = vectors[: self._size].flatten(0, 1)
            solved[: self._size] = torch.cholesky_solve(leading, self._factor).view_as(solved[: self._size])
        return solved
