"""Steering operators in front of a linear head: one for each subset of the training sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stride_lightning.runtime.distributed import total
from stride_lightning.steering.language.curvature import TokenCurvature
from stride_lightning.steering.language.output_space import OutputSpace
from stride_lightning.steering.language.passes import TrainingPasses
from stride_lightning.steering.language.tokens import TokenBatch, exact
from stride_lightning.steering.subsets import Design

#: Bytes that steered logits of one block, (sequences, tokens, operators, V), may take.
STEERED_BYTES = 2**26


@dataclass
class TokenOperators:
    r"""Operators ``a_k`` that steer a frozen language model: logits become ``o + S a_k phi``.

    Each minimises the mean loss of its subset, less the slope that all data together have at the frozen model, plus
    the penalty that damping stands for:

    .. math:: F_k(a) = \frac{1}{|S_k|} \sum_{i \in S_k} \ell_i(o + S a \phi)
              - \Big\langle \frac{1}{n} \sum_i g_i, a \Big\rangle + \frac{1}{2} \langle a, \Omega a \rangle,

    ``Omega`` the damped curvature less the curvature, so that the operator of all data is 0. ``F_k`` is convex where
    the steered space is the logits or in front of a linear head. The first step is Newton's with the factored
    curvature, in closed form: operators are then linear in their subsets, ``a_k = -H^{-1} (g_{S_k} - g)``. Further
    steps, one pass over the data each, go on from there with the same preconditioner; a step that raises ``F_k`` is
    taken back and halved.

    Reference: arXiv:2606.05165 (STRIDE), the operators; here convex.
    """

    #: Shape ``(K, r, c)``.
    coefficients: Tensor
    #: Norm of the preconditioned gradient where operators stand over that at 0, shape ``(K,)``; NaN after the closed
    #: form alone, which does not look back.
    relative_gradient: Tensor


def fit_token_operators(
    passes: TrainingPasses, design: Design, curvature: TokenCurvature, space: OutputSpace, *, steps: int = 1
) -> TokenOperators:
    """Fit all operators; ranks share the sequences.

    One step is the closed form, from one pass over the training sequences; each of several steps takes one pass more.

    Memory: ``K r c`` floats and one batch; six times that for more than one step.
    """
    summed = curvature.zeros(design.num_subsets)
    mean = curvature.zeros()
    for batch in passes("Operators", False):
        gradients = curvature.gradients(batch)
        members = design.rows(batch.places).to(gradients)  # (B, K)
        summed.flatten(1).addmm_(members.T, gradients.flatten(1))
        mean += gradients.sum(0)
    sizes = design.sizes.clamp(min=1).to(summed)[:, None, None]
    mean = total(mean) / design.num_train
    first = total(summed).div_(sizes).sub_(mean)
    start = torch.zeros_like(sizes[:, 0, 0])  # energy of the gradient at 0 in the preconditioner's metric
    for subset, slope in enumerate(first):  # in place, as operators are the largest thing there is
        newton = curvature.solve(slope)
        start[subset] = (slope * newton).sum()
        slope.copy_(-newton)
    operators = TokenOperators(first, torch.full((design.num_subsets,), torch.nan))
    if steps == 1:
        return operators
    step, best = torch.ones_like(start), torch.zeros_like(start)
    reached, direction = torch.zeros_like(first), first  # F_k(0) = mean loss at 0, taken as 0
    for number in range(1, steps + 1):
        current = reached + step[:, None, None] * direction
        training_pass = passes(f"Operators, step {number}", True)
        losses, gradients = _slopes(training_pass, design, curvature, space, current)
        penalty = curvature.penalty(current)
        objective = losses / sizes.flatten() + (current * (penalty / 2 - mean)).sum((1, 2))
        gradients = gradients / sizes - mean + penalty
        rose = objective > best + 1e-7 * best.abs().clamp(min=1e-12)
        step = torch.where(rose, step / 2, step)
        # Where it rose: go again from where we were, half as far.
        reached = torch.where(rose[:, None, None], reached, current)
        best = torch.where(rose, best, objective)
        latest = -curvature.solve(gradients)
        energy = (gradients * -latest).sum((1, 2))
        direction = torch.where(rose[:, None, None], direction, latest)
        operators.relative_gradient = torch.where(
            rose, operators.relative_gradient.to(energy), (energy / start.clamp(min=1e-38)).clamp(min=0).sqrt()
        )
    operators.coefficients = reached
    return operators


def measure_tokens(batch: TokenBatch, coefficients: Tensor, curvature: TokenCurvature, space: OutputSpace) -> Tensor:
    """How much each operator lowers the loss of each sequence below the frozen model's, in nats, shape ``(B, K)``.

    Positive: the subset helps. The batch has logits; operators, shape ``(K, r, c)``, are taken in blocks of
    ``STEERED_BYTES``, so that logits of ``K`` times all tokens are never held.
    """
    parts = [losses for _, losses, _ in _steered(batch, coefficients, curvature, space, with_slopes=False)]
    return batch.losses[:, None] - torch.cat(parts, 1)


def _slopes(
    batches: Iterable[TokenBatch], design: Design, curvature: TokenCurvature, space: OutputSpace, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over the members of each subset: change of loss ``(K,)``, and gradients ``(K, r, c)`` under the operator."""
    losses, gradients = torch.zeros_like(coefficients[:, 0, 0]), torch.zeros_like(coefficients)
    for batch in batches:
        members = design.rows(batch.places).to(gradients)
        features = curvature.features(batch.features)
        for subsets, steered, slopes in _steered(batch, coefficients, curvature, space, with_slopes=True):
            counted = members[:, subsets]
            losses[subsets] += (counted * (steered - batch.losses[:, None])).sum(0)
            weights = batch.weights[:, :, None] * counted[:, None]  # (B, T, k)
            assert slopes is not None
            pulled = (slopes * weights[..., None]).flatten(0, 1)  # (BT, k, c)
            product = features.flatten(0, 1).T @ pulled.flatten(1)
            gradients[subsets] += product.unflatten(1, pulled.shape[1:]).transpose(0, 1)
    return total(losses), total(gradients)


def _steered(
    batch: TokenBatch, coefficients: Tensor, curvature: TokenCurvature, space: OutputSpace, *, with_slopes: bool
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """For blocks of operators: steered losses ``(B, k)`` and, if asked, gradients ``(B, T, k, c)``."""
    assert batch.logits is not None
    assert batch.labels is not None
    features = curvature.features(batch.features)
    num_sequences, num_tokens, _ = features.shape
    block = max(1, STEERED_BYTES // (8 * num_sequences * num_tokens * space.vocabulary))
    with exact(features.device):
        for first in range(0, len(coefficients), block):
            chosen = coefficients[first : first + block]  # (k, r, c)
            moved = features.flatten(0, 1) @ chosen.transpose(0, 1).flatten(1)
            moved = moved.reshape(num_sequences, num_tokens, len(chosen), -1)
            logits = batch.logits[:, :, None] + space.push(curvature.steering(moved))  # (B, T, k, V)
            labels = batch.labels[:, :, None].expand(logits.shape[:3])
            losses = logits.logsumexp(-1) - logits.gather(-1, labels[..., None])[..., 0]
            slopes = curvature.outputs(space.gradient(logits, labels)) if with_slopes else None
            yield slice(first, first + len(chosen)), (losses * batch.weights[..., None]).sum(1), slopes
