"""First-order influence on the basis: the prior of the recovery."""

from __future__ import annotations

import torch
from torch import Tensor

from stride_lightning.runtime.conjugate_gradients import conjugate_gradients
from stride_lightning.runtime.parallel import even_slices, map_chunks
from stride_lightning.steering.basis import Observation
from stride_lightning.steering.solvers import BLOCK_BYTES
from stride_lightning.tasks.likelihoods import Task

#: Queries solved together.
QUERY_CHUNK = 64


def influence(
    train: Observation,
    queries: Observation,
    train_means: Tensor,
    query_means: Tensor,
    task: Task,
    ridge: float,
    *,
    tolerance: float = 5e-2,
    max_iterations: int = 200,
    show_progress: bool = True,
) -> Tensor:
    r"""First-order influence of every training example on every query's loss, in the basis.

    .. math:: w_{qi} = \frac{1}{n} \, (\phi_q \otimes e_q)' (G + \rho I)^{-1} (\phi_i \otimes e_i),
              \qquad e = (\mu - y) / s, \quad G = \frac{1}{n} \sum_i \phi_i \phi_i' \otimes \ell''(\mu_i)

    with the exact Gauss-Newton matrix ``G`` of the predictions ``mu``, by preconditioned conjugate gradients for
    blocks of queries.

    Memory beyond its arguments: the result, twice; and for each thread six arrays of ``64 C r`` floats and three
    blocks of directions (8 MB each).

    The predictions at which to linearise have shapes ``(n, C)`` and ``(q, C)``; ``ridge`` is ``rho``. A query counts as
    solved at a relative residual of ``tolerance``.

    The result, shape ``(q, n)``, is to first order how much a query's loss would rise without an example.

    Reference: arXiv:1703.04730 (influence functions), on the readouts of the basis.
    """
    features, size = train.features, len(train)
    means = train_means.T.contiguous()  # (C, n)
    surprise = ((train_means - train.encoded) / task.dispersion).T.contiguous()
    query_surprise = (query_means - queries.encoded) / task.dispersion
    typical = task.curvature_diagonal(train_means).mean(0)  # (C,)
    energies = features.square().mean(0)
    preconditioner = 1 / (typical[:, None] * energies + ridge)[..., None]  # (C, r, 1)

    def solve(chosen: slice) -> Tensor:
        right = query_surprise[chosen].T[:, None, :] * queries.features[chosen].T  # (C, r, q)
        block = max(64, BLOCK_BYTES // (right.element_size() * right.shape[0] * right.shape[2]))
        blocks = [slice(first, first + block) for first in range(0, size, block)]

        def product(direction: Tensor) -> Tensor:
            total = ridge * direction
            for rows in blocks:
                curved = task.curvature(means[:, rows, None], features[rows] @ direction, dim=0)
                total += (features[rows].T / size) @ curved
            return total

        stop = {"tolerance": tolerance, "max_iterations": max_iterations}
        solution = conjugate_gradients(product, right, lambda residual: preconditioner * residual, **stop).values
        # (C, b, q) outputs moved, times what surprises about the examples
        parts = [((features[rows] @ solution) * surprise[:, rows, None]).sum(0) for rows in blocks]
        return torch.cat(parts).T / size

    chunks = even_slices(len(queries), QUERY_CHUNK, features.device)
    solved = map_chunks(solve, chunks, features.device, "Influence", show_progress=show_progress)
    return torch.cat([features.new_empty(0, size), *solved])
