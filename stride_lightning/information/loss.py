"""Information about queries: lost when training examples are removed, gained when they are seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from stride_lightning.information.forms import Form, index_vectors, inverse_root, nats, noise_with, query_vectors
from stride_lightning.information.posterior import Features, Posterior, check_features, feature_batches

_ELEMENTS = 1 << 21  # of the products of one chunk of pairs


def information_loss(train: Features, queries: Tensor, posterior: Posterior) -> Tensor:
    """How much less is known about each query without each single training example.

    ``1/2 logdet(I + V_(D-i)) - 1/2 logdet(I + V_D)``, the rise of the entropy of the predictive distribution, which is
    the mutual information of the two outputs given all other examples. For one output,
    ``1/2 log(1 + c^2 / ((1 - s) (1 + v)))`` with the posterior covariance c and variances s and v. It is never
    negative and says nothing about whether the example helps: labels do not enter.

    Args:
        train: Noise-whitened features of the examples, ``(n, C, k)`` or batches of them, as the posterior was fitted.
        queries: Those of the queries, ``(q, C', k)``.
        posterior: Of all training data.

    Returns:
        Nats, shape ``(q, n)``.

    Raises:
        ValueError: If an example cannot be among the data of the posterior.

    Example:
        >>> train = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
        >>> information_loss(train, train[:1], Posterior.fit(train, ridge=1.0))
        tensor([[0.1438, 0.0000]])

    Reference: arXiv:2604.03858.
    """
    blocks = information_blocks(train, queries, posterior, "loss")
    return torch.cat([queries.new_empty(len(queries), 0), *blocks], 1)


def information_gain(
    train: Features, queries: Tensor, posterior: Posterior, *, form: Literal["gain", "copy"] = "gain"
) -> Tensor:
    """How much more is known about each query with each single training example.

    For one output ``-1/2 log(1 - c^2 / ((1 + s) (1 + v)))``: a cosine of the two gradients, damped by the ridge.

    Args:
        train: Noise-whitened features of the examples, ``(n, C, k)`` or batches of them.
        queries: Those of the queries, ``(q, C', k)``.
        posterior: Of all training data; a ``"gain"`` uses no more of it than the prior.
        form: ``"gain"`` when nothing else is known; ``"copy"`` for one more copy of the example, given all data.

    Returns:
        Nats, shape ``(q, n)``.

    Example:
        >>> train = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
        >>> information_gain(train, train[:1], Posterior.fit(train, ridge=1.0))
        tensor([[0.1438, 0.0000]])
    """
    blocks = information_blocks(train, queries, posterior, form)
    return torch.cat([queries.new_empty(len(queries), 0), *blocks], 1)


def information_blocks(train: Features, queries: Tensor, posterior: Posterior, form: Form = "loss") -> Iterator[Tensor]:
    """The columns of :func:`information_loss` or :func:`information_gain`, some examples after the other.

    Args:
        train: Features of the examples, or batches of them; read once.
        queries: Features of the queries.
        posterior: Of all training data.
        form: Which information.

    Yields:
        Nats, shape ``(q, b)``, for consecutive training examples; at most 4096 at a time, fewer than a batch if that
        is large.
    """
    searched = query_vectors(queries, posterior, form)
    for batch in feature_batches(train):
        vectors = index_vectors(batch, posterior, form)
        yield pair_nats(searched.to(vectors.dtype), vectors, form)


def pair_nats(queries: Tensor, vectors: Tensor, form: Form = "loss") -> Tensor:
    """Information between all query vectors ``(q, C', k)`` and index vectors ``(n, C, k)``, shape ``(q, n)``."""
    num_rows, (num_train, num_columns, size) = queries.shape[1], vectors.shape
    columns = vectors.transpose(0, 1).reshape(-1, size).T  # outputs first: pairs end up side by side
    step = max(1, _ELEMENTS // max(1, num_rows * num_columns * num_train))
    blocks = [queries.new_empty(0, num_train)]
    for some in queries.split(step):
        products = (some.transpose(0, 1).reshape(-1, size) @ columns).view(num_rows, len(some), num_columns, num_train)
        blocks.append(nats(products.permute(1, 3, 0, 2), form))
    return torch.cat(blocks)


def subset_information_loss(subset: Tensor, queries: Tensor, posterior: Posterior) -> Tensor:
    """How much less is known about each query without a whole subset of the training examples.

    Exact for the Gaussian posterior, ``V_(D-S) = V + k' (I - B_S A^-1 B_S')^-1 k`` with ``k = B_S A^-1 B_q'``. Copies
    of an example together tell much more than the sum of each alone.

    Args:
        subset: Features of the examples to be removed, shape ``(m, C, k)``.
        queries: Features of the queries, ``(q, C', k)``.
        posterior: Of all training data.

    Returns:
        Nats, shape ``(q,)``.

    Raises:
        ValueError: If the subset cannot be among the data of the posterior.

    Example:
        >>> train = torch.tensor([[[1.0]], [[1.0]], [[1.0]]])
        >>> posterior = Posterior.fit(train, ridge=1.0)
        >>> subset_information_loss(train[:2], train[:1], posterior)  # variance 1/2 in place of 1/4
        tensor([0.0912])
        >>> information_loss(train[:2], train[:1], posterior).sum()
        tensor(0.0645)
    """
    return _subset_information(subset, queries, posterior, "loss")


def subset_information_gain(
    subset: Tensor, queries: Tensor, posterior: Posterior, *, form: Literal["gain", "copy"] = "gain"
) -> Tensor:
    """How much more is known about each query with a whole subset of examples, nats of shape ``(q,)``.

    Args:
        subset: Features of the examples, shape ``(m, C, k)``.
        queries: Features of the queries, ``(q, C', k)``.
        posterior: Of all training data; a ``"gain"`` uses no more of it than the prior.
        form: ``"gain"`` when nothing else is known; ``"copy"`` given all data.
    """
    return _subset_information(subset, queries, posterior, form)


def predictive_entropy(queries: Tensor, posterior: Posterior) -> Tensor:
    """Differential entropy of the outputs of each query, noise included, in nats of shape ``(q,)``.

    Args:
        queries: Features of the queries, ``(q, C', k)``.
        posterior: What is known.

    Example:
        >>> predictive_entropy(torch.zeros(1, 1, 2), Posterior.without_data(2, ridge=1.0))  # of a standard normal
        tensor([1.4189], dtype=torch.float64)
    """
    root = inverse_root(noise_with(posterior.variance(queries)))
    unit = 0.5 * queries.shape[1] * math.log(2 * math.pi * math.e)
    return unit - root.diagonal(dim1=1, dim2=2).log().sum(1)


def _subset_information(subset: Tensor, queries: Tensor, posterior: Posterior, form: Form) -> Tensor:
    check_features(subset)
    if not subset.numel():
        return query_vectors(queries, posterior, form).new_zeros(len(queries))
    # A subset is one example with all its outputs. Of more than k rows only the k x k moments matter.
    rows = subset.flatten(0, 1).double()
    if len(rows) > rows.shape[1]:
        values, axes = torch.linalg.eigh(rows.T @ rows)
        rows = values.clamp(min=0.0).sqrt()[:, None] * axes.T
    vectors = index_vectors(rows[None], posterior, form)
    searched = query_vectors(queries, posterior, form)
    return pair_nats(searched.double(), vectors, form)[:, 0].to(searched.dtype)
