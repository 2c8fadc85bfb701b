"""Second moments of all training tokens, and the curvature they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stride_lightning.runtime.randomness import seeded
from stride_lightning.steering.language.output_space import OutputSpace
from stride_lightning.steering.language.tokens import TokenBatch

#: Damping of the features' factor, relative to its mean eigenvalue.
FEATURE_DAMPING = 0.1
#: Damping of the outputs' factor, relative to its mean eigenvalue.
OUTPUT_DAMPING = 1.0
#: Leading directions of the features that are kept whatever the vocabulary.
MIN_FEATURES = 16


@dataclass
class TokenMoments:
    """Sums over tokens, weighted as in the losses; float64."""

    #: ``sum w phi phi'``, shape ``(r, r)``.
    features: Tensor
    #: ``sum w e e'``, shape ``(c, c)``, or its diagonal, shape ``(c,)``.
    downhill: Tensor
    #: Sum of weights, of losses, and number of tokens and of sequences, shape ``(4,)``.
    sums: Tensor

    @classmethod
    def zeros(cls, num_features: int, space: OutputSpace, device: torch.device) -> TokenMoments:
        """No tokens yet."""
        where = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        shapes = (num_features, num_features), (space.width,) * (1 if space.is_diagonal else 2), (4,)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=where) for shape in shapes))

    def update(self, batch: TokenBatch) -> None:
        """Take in a batch."""
        root = batch.weights.sqrt()[..., None]
        for moment, rows in ((self.features, batch.features), (self.downhill, batch.downhill)):
            weighted = (rows * root).flatten(0, 1)
            moment += (weighted.T @ weighted if moment.ndim == 2 else weighted.square().sum(0)).to(moment)
        counts = batch.weights.sum(), batch.losses.sum(), (batch.weights > 0).sum(), torch.tensor(len(batch.losses))
        self.sums += torch.stack([count.to(self.sums) for count in counts])

    @property
    def mean_loss(self) -> float:
        """Mean loss of a sequence, in nats."""
        return float(self.sums[1] / self.sums[3].clamp(min=1))


class TokenCurvature:
    r"""Curvature of the training loss in one operator, factored: ``H = A \otimes B``, both damped.

    ``A`` is the second moment of the features, every layer scaled to unit energy, and ``B`` that of the gradients of
    token losses, which is their expected curvature under the model's own labels; in large vocabularies its diagonal.
    Where ``r c`` is more than ``max_values``, features are cut to their leading principal directions, and below
    ``MIN_FEATURES`` of them the steered space too unless it is the vocabulary.

    Args:
        moments: Of all training tokens.
        widths: Features of each layer, then 1 for the constant.
        damping: Of ``A``, relative to its mean eigenvalue.
        max_values: Largest ``r c``.
        dtype: Of the results, as is ``device``.

    Reference: arXiv:1503.05671 (Kronecker-factored curvature), read off activations without a backward pass.
    """

    def __init__(
        self,
        moments: TokenMoments,
        widths: Sequence[int],
        *,
        damping: float = FEATURE_DAMPING,
        max_values: int = 2**22,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        weight = moments.sums[0]
        features, outputs = moments.features / weight, moments.downhill / weight
        energies = torch.stack([part.sum() for part in features.diagonal().split(list(widths))])
        # A layer that is zero everywhere adds nothing, and must not divide by zero.
        scales = torch.where(energies > 0, energies.clamp(min=1e-300).rsqrt(), 1.0)
        scale = torch.cat([s.expand(width) for s, width in zip(scales, widths, strict=True)])
        features = scale[:, None] * features * scale
        rank, width = min(len(features), max(MIN_FEATURES, max_values // len(outputs))), len(outputs)
        if outputs.ndim == 2:  # features give way first
            width = min(width, max(1, max_values // rank))
        self.shape = rank, width
        left, right = _leading(features, rank), _leading(outputs, width)
        a, damped_a, energy_a = _damped(features, left, damping)
        b, damped_b, energy_b = _damped(outputs, right, OUTPUT_DAMPING)
        #: Share of the mean square of features and of gradients that is kept; 1 where nothing is cut.
        self.energy_shares = energy_a, energy_b
        inverse_b = 1 / damped_b if damped_b.ndim == 1 else torch.linalg.inv(damped_b)
        self._left = (scale if left is None else scale[:, None] * left).to(device, dtype)
        self._right = None if right is None else right.to(device, dtype)
        self._a, self._damped_a, self._inverse_a, self._b, self._damped_b, self._inverse_b = (
            factor.to(device, dtype) for factor in (a, damped_a, torch.linalg.inv(damped_a), b, damped_b, inverse_b)
        )
        #: Sum of the weights of all training tokens.
        self.weight = float(weight)
        #: Whether nothing is cut; else operators stand in directions that another device would choose otherwise.
        self.is_whole = left is None and right is None

    def zeros(self, *count: int) -> Tensor:
        """Operators that are zero, shape ``(*count, r, c)``."""
        return torch.zeros(*count, *self.shape, dtype=self._inverse_a.dtype, device=self._inverse_a.device)

    def features(self, features: Tensor) -> Tensor:
        """Scaled (and projected) features of tokens."""
        return features * self._left if self._left.ndim == 1 else features @ self._left

    def outputs(self, downhill: Tensor) -> Tensor:
        """Gradients in the (projected) steered space."""
        return downhill if self._right is None else downhill @ self._right

    def steering(self, moved: Tensor) -> Tensor:
        """Undo :meth:`outputs`, for what an operator gives."""
        return moved if self._right is None else moved @ self._right.T

    def gradients(self, batch: TokenBatch) -> Tensor:
        """Gradient of each sequence's loss in one operator, shape ``(B, r, c)``."""
        features = self.features(batch.features) * batch.weights[..., None]
        return features.transpose(1, 2) @ self.outputs(batch.downhill)

    def solve(self, gradients: Tensor) -> Tensor:
        """``H^-1`` times gradients of shape ``(..., r, c)``, where ``H`` is the mean over the training weight."""
        return _times(self._inverse_a @ gradients, self._inverse_b)

    def influence(self, solved: Tensor, gradients: Tensor) -> Tensor:
        """Scores ``(q, n)``: how much a query's loss would rise without a sequence, in nats.

        ``solved`` is what :meth:`solve` gives for queries, ``(q, r, c)``, and ``gradients`` of sequences ``(n, r, c)``.
        """
        return solved.flatten(1) @ gradients.flatten(1).T / self.weight


def _times(values: Tensor, factor: Tensor) -> Tensor:
    """Times a symmetric matrix, or a diagonal one."""
    return values * factor if factor.ndim == 1 else values @ factor


def _damped(moment: Tensor, basis: Tensor | None, relative: float) -> tuple[Tensor, Tensor, float]:
    """A factor in its leading directions, the same with damping relative to the mean of all, and its share of all."""
    trace = moment.sum() if moment.ndim == 1 else moment.trace()
    # A loss of 0 everywhere has no scale.
    amount = (relative * trace / len(moment)).clamp(min=1e-30)
    factor = moment if basis is None else basis.T @ moment @ basis
    share = 1.0 if basis is None or trace == 0 else float(factor.trace() / trace)
    return factor, factor + (amount if factor.ndim == 1 else amount * torch.eye(len(factor)).to(factor)), share


def _leading(moment: Tensor, count: int) -> Tensor | None:
    """An orthonormal basis of the leading principal directions, by power iteration where they are few; None for all."""
    if count == len(moment):
        return None
    if 2 * count > len(moment):
        return torch.linalg.eigh(moment)[1][:, -count:]
    with seeded(count):
        return torch.svd_lowrank(moment.float(), q=count, niter=2)[0].to(moment)
