"""The standard deviation of influence over draws of the readout; computed when it is first read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stride_lightning.readout.readout import Points, Readout
from stride_lightning.runtime.progress import call, expect, track

#: Number of draws.
NUM_DRAWS = 16


@dataclass(frozen=True)
class Spread:
    r"""Standard deviation of ``<phi_q x e_q, H^-1 (phi_i x e_i)>`` over draws of the readout from ``N(a, H^-1)``.

    The residuals e of query and training example move with the draw, H does not. It knows nothing of training seeds or
    of features that would move, so it is not calibrated.

    Args:
        readout: The readout.
        queries: The queries, q of them.
        factor: Factor of the influence in each query's scores, shape ``(q,)``; None for 1.
        of_recovery: Standard deviation that the recovery from subsets adds, shape ``(q, n)``; None without.
        seed: Seed of the draws.
        show_progress: Show a progress bar.
    """

    readout: Readout
    queries: Points
    factor: Tensor | None = None
    of_recovery: Tensor | None = None
    seed: int = 0
    show_progress: bool = True

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Compute it: shape ``(q, n)``, on the CPU. It takes ``NUM_DRAWS`` times as long as the scores."""
        readout, problem, queries = self.readout, self.readout.problem, self.queries
        generator = torch.Generator().manual_seed(self.seed + 1)
        # Directions that the training set does not span have their prior variance. A constant that stands apart has
        # precision 0, and where it is all there is, nothing is known of others.
        precision = problem.precision.amax(0)
        of_prior = torch.where(precision > 0, problem.temperature / precision, 0.0)
        outside = (queries.outside[:, None] * of_prior).sqrt()
        mean = torch.zeros(len(queries), len(problem), dtype=problem.features.dtype)
        squares = torch.zeros_like(mean)
        with call(show=self.show_progress):
            expect("Standard deviations", NUM_DRAWS)
            moves = readout.draws(NUM_DRAWS, self.seed)
            for number in track(range(NUM_DRAWS), "Standard deviations", show=self.show_progress):
                drawn = readout.moved(moves[..., number])
                noise = torch.randn(outside.shape, generator=generator, dtype=torch.float64).to(outside)
                residuals = drawn.residuals(queries, outside * noise), drawn.residuals(readout.training_points)
                scores = readout.influence(queries, residuals).cpu()
                gap = scores - mean
                mean += gap / (number + 1)
                squares += gap * (scores - mean)
        variance = squares / (NUM_DRAWS - 1)
        if self.factor is not None:
            variance *= self.factor.cpu().to(variance)[:, None].square()
        if self.of_recovery is not None:
            variance += self.of_recovery.cpu().to(variance).square()
        return variance.sqrt().float()
