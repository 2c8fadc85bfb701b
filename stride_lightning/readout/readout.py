"""Readout: a convex model refit on the features of a network; its losses, influence and refits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from stride_lightning.readout.coordinates import Coordinates, principal_coordinates
from stride_lightning.readout.features import Observation
from stride_lightning.readout.noise import relative_noise, ridge_of
from stride_lightning.readout.preconditioner import Preconditioner
from stride_lightning.readout.problem import Curvature, Problem
from stride_lightning.readout.solver import column_chunks, minimise, solve
from stride_lightning.runtime.progress import counting, track
from stride_lightning.tasks.likelihoods import Regression, Task

#: Prior variance of an output: 3 for logits, whatever n, r and C are. Between 2 and 5 the LDS is flat on all data.
PRIOR_VARIANCE = 3.0
#: The same for a regression, over the variance of the targets: a priori the readout may explain all of it.
REGRESSION_VARIANCE = 1.0
#: Prior variance of a logit where groups of examples are left out rather than single ones.
GROUP_VARIANCE = 10.0


@dataclass(frozen=True)
class Points:
    """Examples as a readout sees them."""

    #: Coordinates, shape ``(B, m)``.
    features: Tensor
    #: Targets without the readout's shift, shape ``(B, C)``.
    encoded: Tensor
    #: Squared norm of the features that the training set does not span, shape ``(B,)``.
    outside: Tensor

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.features)

    def select(self, rows: slice | Tensor) -> Points:
        """Some of the examples."""
        return Points(self.features[rows], self.encoded[rows], self.outside[rows])


@dataclass(frozen=True)
class Readout:
    r"""A readout ``o(x) = b + phi(x) a``, refit from scratch on the features of a network.

    The network's answers have no part in it. A network that has memorised its data has residuals that are noise; those
    of the readout say which examples were surprising. Its prior is ``a ~ N(0, v)`` with v = 3 for logits. A regression
    has centred targets, a constant without a penalty, and a ridge from its noise, which is measured by leaving examples
    out.

    Args:
        problem: The convex problem that it solves.
        coordinates: The map from features to those of the problem.
        coefficients: Its solution, shape ``(m, C)``.
        shift: Mean of a regression's targets, float64 of shape ``(C,)``; else zeros.

    Memory beyond the features, for n examples and m coordinates: ``4 m^2`` bytes, and the larger of two: 130 MB, or
    ``28 m^2`` if that is more, while it is fit; and the result with five blocks of ``4 n C c`` (32 MB each at most) and
    ``32 m C c`` (64 MB at most) for the ``c <= 64`` columns that are solved together.
    """

    problem: Problem
    coordinates: Coordinates
    coefficients: Tensor
    shift: Tensor

    @classmethod
    def fit(
        cls, observed: Observation, task: Task, *, start: Tensor | None = None, show_progress: bool = False
    ) -> Readout:
        """Refit a readout on an evaluation pass, whose features become those of the problem (their memory is used).

        ``start`` are coefficients on features to start from, as :meth:`Coordinates.outward` gives them.
        """
        task = task.scaled_to(observed.encoded)
        with counting(1, "Readout", show_progress) as bar:
            coordinates, features = principal_coordinates(observed.features, is_centred=isinstance(task, Regression))
            problem, shift = _problem(task, coordinates, features, observed.encoded)
            inward = None if start is None else coordinates.inward(start.to(features))[..., None]
            coefficients, preconditioner = minimise(problem, start=inward)
            readout = cls(problem, coordinates, coefficients[..., 0], shift)
            # One that is the whole curvature is made again at the solution, where it is exact.
            if preconditioner is not None and not preconditioner.is_whole:
                vars(readout)["preconditioner"] = preconditioner
            bar.update(1)
        return readout

    def points(self, observed: Observation) -> Points:
        """Examples of an evaluation pass."""
        features = observed.features.to(self.coefficients)
        shift = F.pad(self.shift, (0, observed.encoded.shape[1] - len(self.shift)))  # weights stay
        encoded = (observed.encoded.to(shift) - shift).to(features)
        return Points(self.coordinates(features), encoded, self.coordinates.outside(features))

    def outputs(self, features: Tensor) -> Tensor:
        """Natural parameters of examples with coordinates ``(B, m)``, shape ``(B, C)``."""
        outputs = self.problem.outputs(self.coefficients[..., None], features)[..., 0]
        return (outputs.to(self.shift) + self.shift).to(outputs)

    def moved(self, move: Tensor) -> Readout:
        """The same with other coefficients, by a move of shape ``(m, C)``."""
        return replace(self, coefficients=self.coefficients + move)

    def residuals(self, points: Points, moved: Tensor | float = 0.0) -> Tensor:
        """Gradient of each example's loss in its outputs, which may be moved; shape ``(B, C)``."""
        outputs = self.problem.outputs(self.coefficients[..., None], points.features)[..., 0] + moved
        return self.problem.residuals(outputs, points.encoded)

    def losses(self, points: Points) -> Tensor:
        """Losses of examples, shape ``(B,)``."""
        return self.problem.losses(self.coefficients[..., None], points.features, points.encoded)[:, 0]

    def rises(self, points: Points, moves: Tensor) -> Tensor:
        """Rise of the losses of examples under K moves of the coefficients ``(m, C, K)``, shape ``(B, K)``.

        Losses are compared in double precision, since a single example may change them by less than their rounding.
        """
        before = self.problem.outputs(self.coefficients[..., None], points.features).double()  # (B, C, 1)
        encoded = points.encoded.double()[..., None]
        losses = self.problem.task.loss(before, encoded, dim=1)
        rises = points.features.new_empty(len(points), moves.shape[2])
        for columns in self._chunks(moves.shape[2]):
            moved = (points.features @ moves[..., columns].flatten(1)).view(
                len(points), self.problem.shape[1], len(columns)
            )
            rises[:, columns] = (self.problem.task.loss(before + moved, encoded, dim=1) - losses).to(rises)
        return rises

    @cached_property
    def training_points(self) -> Points:
        """The training examples."""
        problem = self.problem
        return Points(problem.features, problem.encoded, problem.features.new_zeros(len(problem)))

    @cached_property
    def curvature(self) -> Curvature:
        """The curvature ``H`` of the problem at its solution."""
        return Curvature(self.problem, self.coefficients[..., None])

    @cached_property
    def preconditioner(self) -> Preconditioner:
        """An approximate inverse of it."""
        return Preconditioner(self.curvature)

    def influence(
        self, points: Points, residuals: tuple[Tensor, Tensor] | None = None, *, show_progress: bool = False
    ) -> Tensor:
        r"""First-order influence of every training example on the loss of some others, shape ``(q, n)``.

        .. math:: w_{qi} = \langle \phi_q \otimes e_q, \, H^{-1} (\phi_i \otimes e_i) \rangle

        Positive: without example i the loss of q would rise by so much. ``residuals`` of the examples ``(q, C)`` and of
        the training set ``(n, C)`` take the place of the readout's.

        Reference: arXiv:1703.04730 (influence functions).
        """
        mine, of_training = residuals or (self.residuals(points), self.residuals(self.training_points))
        scores = points.features.new_empty(len(points), len(self.problem))
        for rows in track(self._chunks(len(points)), "Influence", show=show_progress):
            right = points.features[rows].T[:, None, :] * mine[rows].T
            solved = solve(self.curvature, self.preconditioner, right)  # (m, C, k)
            for places in self.problem.blocks(len(rows)):
                features = self.problem.features[places]
                moved = (features @ solved.flatten(1)).view(len(features), *solved.shape[1:])
                scores[rows, places] = (moved * of_training[places][..., None]).sum(1).T
        return scores

    def _chunks(self, count: int) -> list[Tensor]:
        return column_chunks(*self.problem.shape, self.coefficients, count)

    def self_influence(self, *, show_progress: bool = False) -> Tensor:
        """Effect of leaving each training example out on its own loss, shape ``(n,)``, never negative.

        It is the influence divided by one minus the leverage, along the residual's direction: the step of Newton's
        method from the readout on all data to the one without the example.
        """
        points, parts = self.training_points, []
        residuals = self.residuals(points)
        for rows in track(self._chunks(len(points)), "Self-influence", show=show_progress):
            right = points.features[rows].T[:, None, :] * residuals[rows].T
            # A product takes as long as the number of examples, and there are as many systems.
            is_exact = self.preconditioner.is_whole
            solved = self.preconditioner(right) if is_exact else solve(self.curvature, self.preconditioner, right)
            moved = torch.einsum("km,mck->kc", points.features[rows], solved)  # outputs, (k, C)
            influence = (moved * residuals[rows]).sum(1).clamp(min=0)
            means = self.curvature.means(slice(None))[rows, :, 0]
            bent = (moved * self.problem.curved(rows, means[..., None], moved[..., None])[..., 0]).sum(1)
            # In exact arithmetic a leverage is below 1.
            leverage = torch.where(influence > 0, bent / influence, 0.0).clamp(max=1 - 1e-6)
            parts.append(influence / (1 - leverage))
        return torch.cat(parts)

    def refit(self, weights: Tensor, description: str = "Operators", *, show_progress: bool = False) -> Tensor:
        """Moves of the coefficients to those of K weightings of the training data ``(n, K)``, shape ``(m, C, K)``.

        The prior is the same; offset and noise stay.
        """
        problem = self.problem.around(self.coefficients)
        moves = self.coefficients.new_empty(*problem.shape, weights.shape[1])
        for columns in track(self._chunks(weights.shape[1]), description, show=show_progress):
            chosen = weights[:, columns].to(self.coefficients)
            moves[..., columns] = minimise(problem, chosen, preconditioner=self.preconditioner)[0]
        return moves

    def for_groups(self) -> Readout:
        """The readout whose refits tell the effects of groups: of logits, with a wider prior."""
        if isinstance(self.problem.task, Regression):
            return self
        problem = replace(self.problem, precision=self.problem.precision * PRIOR_VARIANCE / GROUP_VARIANCE)
        coefficients, _ = minimise(problem, start=self.coefficients[..., None])
        return Readout(problem, self.coordinates, coefficients[..., 0], self.shift)

    def draws(self, count: int, seed: int) -> Tensor:
        """Moves of the coefficients to draws from ``N(a, H^-1)``, shape ``(m, C, count)``."""
        generator = torch.Generator().manual_seed(seed)
        problem, task = self.problem, self.problem.task

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.coefficients)

        right = noise(*problem.shape, count) * problem.precision.sqrt()[..., None]
        for place in range(count):
            for rows in problem.blocks(1):
                means = self.curvature.means(rows)[..., 0]
                weights = torch.as_tensor(task.output_weights(problem.encoded[rows]))
                root = task.curvature_root(means, noise(*means.shape)) * weights.sqrt()
                right[..., place] += problem.features[rows].T @ root
        parts = [solve(self.curvature, self.preconditioner, right[..., columns]) for columns in self._chunks(count)]
        return torch.cat(parts, 2) * problem.temperature.sqrt()[None, :, None]


def _problem(task: Task, coordinates: Coordinates, features: Tensor, encoded: Tensor) -> tuple[Problem, Tensor]:
    """The problem of a readout, and the shift of its targets."""
    encoded = encoded.to(features.device)
    shape = features.shape[1], task.split(encoded)[0].shape[1]
    if not isinstance(task, Regression):
        # The prior is that of logits, whatever the loss's factor is.
        precision = features.new_full(shape, 1 / (PRIOR_VARIANCE * task.dispersion))
        offset = task.constant(encoded).to(features)
        return Problem(task, features, encoded.to(features), offset, precision), encoded.new_zeros(shape[1]).double()
    if task.is_weighted:
        raise ValueError(
            f"A readout is not refit to a {task.name} with weights of examples. Use a method that reads gradients: "
            "method='ekfac', for instance."
        )
    shift = encoded.double().mean(0)
    targets = encoded.double() - shift
    noise = relative_noise(features, coordinates.energies, targets, REGRESSION_VARIANCE)
    ridge = ridge_of(noise, REGRESSION_VARIANCE) / task.dispersion
    precision = ridge.to(features).expand(shape).clone()
    precision[-1] = 0
    variances = targets.square().mean(0)
    offset = features.new_zeros(shape[1])
    problem = Problem(task, features, targets.to(features), offset, precision, (noise * variances).to(features))
    return problem, shift
