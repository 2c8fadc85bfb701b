"""Steering operators in front of a linear head: one for each subset of the training sequences."""

from __future__ import annotations

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
    the steered space is the logits or in front of a linear head. Operators are one step of Newton's method with the
    factored curvature, in closed form, and linear in their subsets: ``a_k = -H^{-1} (g_{S_k} - g)``.

    Reference: arXiv:2606.05165 (STRIDE), the operators; here convex.
    """

    #: Shape ``(K, r, c)``.
    coefficients: Tensor


def fit_token_operators(passes: TrainingPasses, design: Design, curvature: TokenCurvature) -> TokenOperators:
    """Fit all operators in one pass over the training sequences; ranks share these.

    Memory: ``K r c`` floats and one batch.
    """
    summed = curvature.zeros(design.num_subsets)
    mean = curvature.zeros()
    for batch in passes("Operators"):
        gradients = curvature.gradients(batch)
        members = design.rows(batch.places).to(gradients)  # (B, K)
        summed.flatten(1).addmm_(members.T, gradients.flatten(1))
        mean += gradients.sum(0)
    sizes = design.sizes.clamp(min=1).to(summed)[:, None, None]
    slopes = total(summed).div_(sizes).sub_(total(mean) / design.num_train)
    # Slopes are means over sequences, and the curvature is one over tokens.
    slopes.mul_(design.num_train / curvature.weight)
    for slope in slopes:  # in place, as operators are the largest thing there is
        slope.copy_(-curvature.solve(slope))
    return TokenOperators(slopes)


def measure_tokens(batch: TokenBatch, coefficients: Tensor, curvature: TokenCurvature, space: OutputSpace) -> Tensor:
    """How much each operator lowers the loss of each sequence below the frozen model's, in nats, shape ``(B, K)``.

    Positive: the subset helps. The batch has logits; operators, shape ``(K, r, c)``, are taken in blocks of
    ``STEERED_BYTES``, so that logits of ``K`` times all tokens are never held.
    """
    assert batch.logits is not None
    assert batch.labels is not None
    features, losses = curvature.features(batch.features), []
    num_sequences, num_tokens, _ = features.shape
    block = max(1, STEERED_BYTES // (8 * num_sequences * num_tokens * space.vocabulary))
    with exact(features.device):
        for chosen in coefficients.split(block):  # (k, r, c)
            moved = features.flatten(0, 1) @ chosen.transpose(0, 1).flatten(1)
            moved = moved.reshape(num_sequences, num_tokens, len(chosen), -1)
            logits = batch.logits[:, :, None] + space.push(curvature.steering(moved))  # (B, T, k, V)
            labels = batch.labels[:, :, None].expand(logits.shape[:3])
            surprise = logits.logsumexp(-1) - logits.gather(-1, labels[..., None])[..., 0]
            losses.append((surprise * batch.weights[..., None]).sum(1))
    return batch.losses[:, None] - torch.cat(losses, 1)
