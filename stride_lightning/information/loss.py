"""Information about queries: lost without training examples, gained with them."""

from __future__ import annotations

import torch
from torch import Tensor

from stride_lightning.information.forms import Form, index_vectors, nats, query_vectors
from stride_lightning.information.posterior import Features, Posterior, check_features, feature_batches

_ELEMENTS = 1 << 21  # of the products of one chunk of pairs


def information(train: Features, queries: Tensor, posterior: Posterior, form: Form = "loss") -> Tensor:
    """How much less is known about each query without each single example, or how much more with it.

    A ``"loss"`` is ``1/2 logdet(I + V_(D-i)) - 1/2 logdet(I + V_D)``, the rise of the entropy of the predictive
    distribution, which is the mutual information of the two outputs given all other examples: for one output
    ``1/2 log(1 + c^2 / ((1 - s) (1 + v)))`` with the posterior covariance c and variances s and v. A ``"gain"`` is
    ``-1/2 log(1 - c^2 / ((1 + s) (1 + v)))`` of the prior, a cosine of the two gradients, damped by the ridge. Both are
    nats of shape ``(q, n)``, never negative, and do not say whether the example helps: labels are not used.

    Args:
        train: Noise-whitened features, ``(n, C, k)`` or batches of them; for a loss, those of the posterior, or a
            ``ValueError`` is raised.
        queries: Features of the queries, ``(q, C', k)``.
        posterior: Of all training data; a ``"gain"`` uses no more of it than the prior.
        form: ``"loss"``; ``"gain"`` when nothing else is known; ``"copy"`` for one more copy, given all data.

    Example:
        >>> train = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
        >>> posterior = Posterior.fit(train, ridge=1.0)
        >>> information(train, train[:1], posterior), information(train, train[:1], posterior, "gain")
        (tensor([[0.1438, 0.0000]]), tensor([[0.1438, 0.0000]]))

    Reference: arXiv:2604.03858.
    """
    query_side = query_vectors(queries, posterior, form)
    blocks = [queries.new_empty(len(queries), 0)]
    for batch in feature_batches(train):
        vectors = index_vectors(batch, posterior, form)
        blocks.append(pair_nats(query_side.to(vectors.dtype), vectors, form))
    return torch.cat(blocks, 1)


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


def subset_information(subset: Tensor, queries: Tensor, posterior: Posterior, form: Form = "loss") -> Tensor:
    """How much less is known about each query without a whole subset of the training examples, or more with it.

    Nats of shape ``(q,)``, exact for the Gaussian posterior: ``V_(D-S) = V + k' (I - B_S A^-1 B_S')^-1 k`` with
    ``k = B_S A^-1 B_q'``. Copies of an example together lose much more than the sum of each alone. The subset has shape
    ``(m, C, k)``; the other arguments are those of :func:`information`.

    Raises:
        ValueError: If the subset cannot be among the data of the posterior.

    Example:
        >>> train = torch.tensor([[[1.0]], [[1.0]], [[1.0]]])
        >>> posterior = Posterior.fit(train, ridge=1.0)
        >>> subset_information(train[:2], train[:1], posterior)  # variance 1/2 in place of 1/4
        tensor([0.0912])
        >>> information(train[:2], train[:1], posterior).sum()
        tensor(0.0645)
    """
    check_features(subset)
    if not subset.numel():
        return query_vectors(queries, posterior, form).new_zeros(len(queries))
    # A subset is one example with all its outputs. Of more than k rows only the k x k moments matter.
    rows = subset.flatten(0, 1).double()
    if len(rows) > rows.shape[1]:
        values, axes = torch.linalg.eigh(rows.T @ rows)
        rows = values.clamp(min=0.0).sqrt()[:, None] * axes.T
    vectors, query_side = index_vectors(rows[None], posterior, form), query_vectors(queries, posterior, form)
    return pair_nats(query_side.double(), vectors, form)[:, 0].to(query_side.dtype)
