"""Tangent features: the gradients of an example's outputs, projected and whitened by the noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stride_lightning.gradients.own_batch import OwnBatch
from stride_lightning.gradients.projection import EVERYTHING, JointProjection
from stride_lightning.gradients.reading import AnyBatch, AnyReader
from stride_lightning.gradients.signs import count_directions
from stride_lightning.model.blocks import Gradients
from stride_lightning.model.capture import Capture, Effort
from stride_lightning.runtime.randomness import mix

#: The noise that counts: that of all outputs, or of the target's log-odds alone.
Likelihood = Literal["gauss-newton", "margin"]


@dataclass
class Tangents:
    """The features of the examples at `places` in the reading order."""

    places: slice
    rows: Tensor  # whitened features (B, C, k)
    losses: Tensor  # (B,)
    downhill: Tensor | None  # projected gradients of minus the loss (B, k), if scores are signed

    @property
    def num_bytes(self) -> int:
        """Size of the features."""
        return self.rows.nbytes + (0 if self.downhill is None else self.downhill.nbytes)

    def between(self, places: slice) -> Tangents:
        """The features of the examples at some places."""
        start = max(places.start, self.places.start)
        stop = max(start, min(places.stop, self.places.stop))
        part = slice(start - self.places.start, stop - self.places.start)
        downhill = None if self.downhill is None else self.downhill[part]
        return Tangents(slice(start, stop), self.rows[part], self.losses[part], downhill)


class TangentFeatures:
    r"""Rows ``B_i`` of shape ``(C, k)`` for every example, such that ``sum_i B_i' B_i`` is the Gauss-Newton matrix.

    With ``likelihood="gauss-newton"`` there is one row per output, ``B_i = \Lambda_i^{1/2} J_i`` (eight random
    combinations beyond 32 outputs), whose noise is that of the labels the model expects: linearised Laplace.
    With ``"margin"`` there is one row, ``\sqrt{p_i (1 - p_i)}`` times the gradient of the margin: C times less work.
    Rows of a regression are divided by the standard deviation of the noise of its task.

    Rows are projected to `projection_dim` numbers, unless the model has no more parameters than that; with `signed`
    the gradients of losses too.

    Reference: arXiv:2604.03858, with this library's derivations; arXiv:2303.14186 for the margin.
    """

    def __init__(
        self, capture: Capture, likelihood: Likelihood, projection_dim: int, seed: int, *, signed: bool
    ) -> None:
        self.capture, self.likelihood, self.seed, self.signed = capture, likelihood, seed, signed
        self.dim = min(projection_dim, capture.num_parameters)
        #: C, how many rows an example has; known once examples have been read.
        self.num_rows = 0
        #: Whether rows are those of all outputs, not random combinations; known once examples have been read.
        self.is_exact = True
        self._project = JointProjection(projection_dim, seed, capture.num_parameters)

    def work(self, effort: Effort, num_outputs: int) -> float:
        """Multiplications for the features of one example with so many outputs."""
        count = 1 if self.likelihood == "margin" else count_directions(num_outputs, 1)
        return (1 + 2 * count) * effort.forward + count * self._project.work(effort.shapes)

    def batches(
        self, reader: AnyReader, share: slice | None = None, description: str = "", *, as_queries: bool = False
    ) -> Iterator[Tangents]:
        """The features of some examples, batch by batch; every pass runs the model again.

        Features of queries (`as_queries`) combine many outputs by other random weights than those of training examples:
        with the same weights a query and an example would seem to have more in common.
        """
        for batch in reader.run(share, description):
            rows = self._rows(batch, mix(self.seed, int(as_queries)))
            self.num_rows = rows.shape[1]
            downhill = -self._vectors(batch.loss()) if self.signed else None
            assert isinstance(batch.places, slice)
            yield Tangents(batch.places, rows, batch.losses, downhill)

    def _rows(self, batch: AnyBatch, seed: int) -> Tensor:
        self.is_exact = self.likelihood == "margin" or batch.is_exact
        last = not self.signed
        if self.likelihood == "gauss-newton":
            rows = [self._vectors(gradients) for gradients in batch.curvature(seed, last=last)]
            if isinstance(batch, OwnBatch):  # of what `training_step` skips there are fewer
                like = next(iter(self.capture.parameters.values()))
                rows += [like.new_zeros(len(batch), self.dim)] * (batch.num_directions - len(rows))
            return torch.stack(rows, 1)
        try:
            batch.check_margin()
        except ValueError as error:
            raise ValueError(
                f"likelihood='margin' needs a margin: {error} Use likelihood='gauss-newton', which takes no more work "
                "with a single output."
            ) from error
        return (self._vectors(batch.margin(last=last)) * batch.margin_curvature.sqrt()[:, None])[:, None]

    def _vectors(self, gradients: Gradients) -> Tensor:
        return self._project(gradients)[EVERYTHING].dense()
