"""A subset of examples that tells most about all weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stride_lightning.information.forms import inverse_root, noise_with, small_product
from stride_lightning.information.greedy import TIE, first_best
from stride_lightning.information.posterior import Posterior, check_features
from stride_lightning.runtime.checks import check_count

_BATCH = 64  # examples whose gains are updated together


class Coreset(NamedTuple):
    """Chosen examples, best first: the first m are the coreset of size m."""

    #: Rows of the features, shape ``(size,)``.
    places: Tensor
    #: The nats that each adds to those before, float64 of the same shape; never increasing.
    gains: Tensor
    #: How many gains were computed; plain greedy choice computes ``n * size``.
    num_updates: int


def choose_coreset(features: Tensor, size: int, posterior: Posterior) -> Coreset:
    """Choose examples one after the other for most information about all weights.

    The information of a set, ``1/2 logdet(I + B_S A^-1 B_S')``, is monotone and submodular: a greedy set of any size
    has at least ``1 - 1/e`` (63 %) of that of the best one. Choice is lazy: gains only shrink, so an example is looked
    at again only when its last gain exceeds all current ones. Ties go to the first. Labels are not used.

    Features are noise-whitened, shape ``(n, C, k)``; the posterior holds the data seen so far. Memory:
    ``O(n (k + C^2) + size C k)``. Gains add up to the information of the whole set.

    Example:
        >>> features = torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]], [[0.0, 1.0]]])
        >>> choose_coreset(features, 3, Posterior.without_data(2, ridge=1.0)).places
        tensor([0, 2, 1])

    Reference: Nemhauser, Wolsey and Fisher 1978; lazy evaluation: Minoux 1978.
    """
    check_features(features)
    num_train, num_outputs, _ = features.shape
    check_count("size", size, maximum=num_train)
    whitened = posterior.whiten(features)
    variance = torch.cat([(rows.double() @ rows.double().mT) for rows in whitened.split(4096)])
    bounds = _gains(variance)
    fresh = torch.ones(num_train, dtype=torch.bool, device=bounds.device)
    left = fresh.clone()
    # How many rows of the basis each variance accounts for.
    seen = torch.zeros(num_train, dtype=torch.int64, device=bounds.device)
    # The posterior covariance in whitened space is I - basis' basis, one block of rows per choice.
    basis = variance.new_zeros(size * num_outputs, whitened.shape[2])
    places, gains, num_updates = [], [], num_train
    for step in range(size):
        filled = step * num_outputs
        while True:
            largest = float(bounds.masked_fill(~fresh, -torch.inf).max())
            rivals = (left & ~fresh & (bounds >= largest - TIE * abs(largest))).nonzero()[:, 0]
            if len(rivals) == 0:
                break
            rivals = rivals[bounds[rivals].topk(min(_BATCH, len(rivals))).indices]
            oldest = int(seen[rivals].min())
            columns = whitened[rivals].double() @ basis[oldest:filled].T  # (m, C, t C)
            missed = torch.arange(oldest, filled, device=seen.device) >= seen[rivals, None]
            columns *= missed[:, None]
            variance[rivals] -= columns @ columns.mT
            bounds[rivals], seen[rivals], fresh[rivals] = _gains(variance[rivals]), filled, True
            num_updates += len(rivals)
        place = int(first_best(bounds.masked_fill(~fresh, -torch.inf)))
        places.append(place)
        gains.append(float(bounds[place]))
        rows = whitened[place].double()
        rows = rows - (rows @ basis[:filled].T) @ basis[:filled]
        root = inverse_root(noise_with(variance[place]))
        basis[filled : filled + num_outputs] = small_product(root, rows)
        bounds[place], left[place] = -torch.inf, False
        fresh[:] = False
    return Coreset(torch.tensor(places), torch.tensor(gains, dtype=torch.float64), num_updates)


def _gains(variance: Tensor) -> Tensor:
    """``1/2 logdet(I + S)`` of variances ``(b, C, C)``."""
    if variance.shape[-1] == 1:
        return 0.5 * variance[:, 0, 0].log1p()
    return torch.linalg.cholesky(noise_with(variance)).diagonal(dim1=1, dim2=2).log().sum(1)
