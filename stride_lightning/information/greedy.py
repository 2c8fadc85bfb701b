"""Sets of training examples chosen one after the other: which to remove, or which to see, for most information."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stride_lightning.information import forms
from stride_lightning.information.forms import Form, inverse_root, nats, noise_given, noise_with, small_product
from stride_lightning.information.posterior import Features, Posterior, feature_batches
from stride_lightning.runtime.checks import check_count

TIE = 1e-9  # relative difference below which scores count as equal
_ELEMENTS = 1 << 22  # of the state of one group of queries


class GreedySets(NamedTuple):
    """A set per query, in order of choice."""

    #: Rows of the training features, shape ``(q, t)``.
    places: Tensor
    #: Information lost or gained with the first 1, 2, ... of them together, float64 of the same shape.
    nats: Tensor


def greedy_sets(
    train: Features, queries: Tensor, posterior: Posterior, size: int, *, form: Form = "loss"
) -> GreedySets:
    """For each query the training examples that change its entropy most, one after the other, given those before.

    A ``"gain"`` explains a query by examples that differ, since a copy tells little that is new. A ``"loss"`` gathers
    copies, since something is lost only without all of them. Neither is submodular for single queries: greedy sets need
    not be near the best ones. Nothing is fitted again: a choice is a rank-C update of all covariances,
    ``O(n C^2 (k + C))`` per query. Memory: the whitened features in double precision, and ``O(n C (C + C'))`` for a
    group of queries.

    Args:
        train: Noise-whitened features of the candidates, ``(n, C, k)`` or batches of them.
        queries: Features of the queries, ``(q, C', k)``.
        posterior: Of all training data; a ``"gain"`` uses no more of it than the prior.
        size: How many to choose, at most n.
        form: ``"loss"`` to remove them, ``"gain"`` when nothing else is known, ``"copy"`` for one more of each.

    Example:
        >>> train = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.8]]])
        >>> posterior, query = Posterior.fit(train, ridge=0.1), torch.tensor([[[1.0, 0.7]]])
        >>> greedy_sets(train, query, posterior, 2, form="gain").places  # a copy would tell little that is new
        tensor([[0, 2]])
    """
    before = forms.known(posterior, form)
    parts = [before.whitened(batch) for batch in feature_batches(train)]
    num_train = sum(len(rows) for rows, _ in parts)
    check_count("size", size, maximum=num_train)
    whitened, variance = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if form == "loss":
        forms.check_members(variance)
    query_rows, _ = before.whitened(queries)
    width = variance.shape[-1] + queries.shape[1]
    step = max(1, _ELEMENTS // (num_train * variance.shape[-1] * width))
    sets = [_choose(whitened, variance, some, size, form) for some in query_rows.split(step)]
    places, gains = (torch.cat(tensors) for tensors in zip(*sets, strict=True))
    return GreedySets(places, gains.cumsum(1))


def _choose(whitened: Tensor, variance: Tensor, queries: Tensor, size: int, form: Form) -> tuple[Tensor, Tensor]:
    """Places and marginal nats, ``(q, t)``, for whitened features ``(n, C, k)`` and queries ``(q, C', k)``."""
    sign = -1.0 if form == "loss" else 1.0
    every = torch.arange(len(queries), device=queries.device)
    # Covariances given the examples chosen so far: outputs with the query, outputs with each other, query with itself.
    covariance = torch.einsum("ncf,qdf->qncd", whitened, queries)
    variance = variance.expand(len(queries), *variance.shape).clone()
    query_variance = queries @ queries.mT
    # The posterior covariance in whitened space is I - sign * basis' basis, one block of rows per choice.
    basis = whitened.new_zeros(len(queries), 0, whitened.shape[2])
    taken = torch.zeros(variance.shape[:2], dtype=torch.bool, device=queries.device)
    places, gains = [], []
    for _ in range(size):
        root = inverse_root(noise_given(variance, form))  # (q, n, C, C)
        scaled = small_product(root, covariance)  # (q, n, C, C')
        query_root = inverse_root(noise_with(query_variance))[:, None]  # (q, 1, C', C')
        scores = nats(small_product(query_root, scaled.mT), form).masked_fill_(taken, -torch.inf)
        chosen = first_best(scores)
        places.append(chosen)
        gains.append(scores[every, chosen])
        taken[every, chosen] = True

        rows = whitened[chosen]  # (q, C, k)
        rows = rows - sign * (rows @ basis.mT) @ basis
        rows = small_product(root[every, chosen], rows)
        basis = torch.cat([basis, rows], 1)
        column, step = torch.einsum("ncf,qbf->qncb", whitened, rows), scaled[every, chosen]
        covariance -= sign * small_product(column, step[:, None])
        variance -= sign * small_product(column, column.mT)
        query_variance -= sign * step.mT @ step
    return torch.stack(places, 1), torch.stack(gains, 1)


def first_best(scores: Tensor) -> Tensor:
    """Place of the largest score of each row ``(..., n)``; the first of those that differ by rounding alone."""
    largest = scores.max(-1, keepdim=True).values
    # Copies of an example may differ in the last digit, depending on how a product is split.
    return (scores >= largest - TIE * largest.abs()).to(torch.uint8).argmax(-1)
