"""The forms of information between two examples: vectors whose inner products are information, whatever the query."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from stride_lightning.information.posterior import Posterior

#: ``"loss"``: information about a query lost when the example is removed from the data. ``"gain"``: told by the example
#: when nothing else is known. ``"copy"``: told by one more copy of the example, given the data.
Form: TypeAlias = Literal["loss", "gain", "copy"]

#: A share of at least this of an example's outputs is left to noise, however alone the example stands.
MARGIN = 1e-6


def index_vectors(features: Tensor, posterior: Posterior, form: Form = "loss") -> Tensor:
    """Training examples as vectors to store: ``(I - S)^(-1/2) B L``, or with ``I + S`` for the gains.

    ``A^-1 = L L'`` is the posterior (the prior for a gain), ``S = B A^-1 B'`` the variance of the example's outputs.
    With the vectors ``x`` of :func:`query_vectors`, one output each, information is a function of ``(x . y)^2``: an
    inner-product search with ``x`` and with ``-x``, merged, ranks all examples. With several outputs there is one
    vector per output, and the exact value needs the products of all (:func:`nats`); for t, the sum of their squares, a
    loss is at least ``1/2 log(1 + t)`` and at most ``r/2 log(1 + t / r)``, r the smaller number of outputs.

    Features are noise-whitened, of shape ``(b, C, k)``, for a loss among the data of the posterior; so are the vectors,
    of the features' precision (float32 at least). In a loss, eigenvalues of ``S`` are at most ``1 - 1e-6``:
    an output that one example alone determines is worth 6.6 nats, not infinitely many.

    Raises:
        ValueError: If an example cannot be among the data of the posterior, or the form is unknown.

    Example:
        >>> train = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
        >>> posterior = Posterior.fit(train, ridge=1.0)
        >>> dots = query_vectors(train[:1], posterior) @ index_vectors(train, posterior).mT
        >>> nats(dots)  # log(4 / 3) / 2: the variance of the first rises from 1/2 to 1, that of the noise is 1
        tensor([0.1438, 0.0000])
    """
    whitened, variance = known(posterior, form).whitened(features)
    if form == "loss":
        check_members(variance)
    return _scaled(noise_given(variance, form), whitened, features)


def query_vectors(queries: Tensor, posterior: Posterior, form: Form = "loss") -> Tensor:
    """Queries ``(q, C', k)`` as vectors to search with, same shape: ``(I + V)^(-1/2) B L``, V the variance of outputs.

    The posterior and the form are those of the index vectors; C' need not be the C of training examples.
    """
    whitened, variance = known(posterior, form).whitened(queries)
    return _scaled(noise_with(variance), whitened, queries)


def _scaled(noise: Tensor, whitened: Tensor, features: Tensor) -> Tensor:
    """Whitened features over the root of a noise, of the features' precision."""
    scaled = small_product(inverse_root(noise), whitened)
    return scaled.to(torch.promote_types(features.dtype, torch.float32))


def nats(products: Tensor, form: Form = "loss") -> Tensor:
    """Information from inner products X of query and index vectors: ``+-1/2 logdet(I +- X X')``, plus for a loss.

    Of products ``(..., C', C)``, outputs of a query by outputs of a training example, to nats ``(...)``. The
    smallest values are precise; a gain of one output is resolved up to 8 nats in float32 and 18 in float64.

    Example:
        >>> nats(torch.tensor([[1.0]])), nats(torch.tensor([[0.5]]), "gain")
        (tensor(0.3466), tensor(0.1438))
    """
    if products.shape[-2] > products.shape[-1]:
        products = products.mT
    # Pairs last: every step of the elimination is then one pass over long rows.
    outputs = products.flatten(0, -3).permute(1, 2, 0) if products.ndim > 2 else products[..., None]
    squares = [[(row * other).sum(0) for other in outputs[: place + 1]] for place, row in enumerate(outputs)]
    sign, least = (1.0, 0.0) if form == "loss" else (-1.0, torch.finfo(products.dtype).eps - 1)
    total = outputs.new_zeros(outputs.shape[2:])
    # Pivots of I +- X X' minus one, by elimination: the one would absorb small entries of X X'.
    for place in range(len(squares)):
        pivot = (sign * squares[place][place]).clamp(min=least)
        total += sign * pivot.log1p()
        column = {row: squares[row][place] for row in range(place + 1, len(squares))}
        for row, entry in column.items():
            scaled = entry * (sign / (1 + pivot))
            for other in range(place + 1, row + 1):
                squares[row][other] = squares[row][other] - scaled * column[other]
    return (0.5 * total).reshape(products.shape[:-2])


def known(posterior: Posterior, form: Form) -> Posterior:
    """The posterior before the example is added or removed: that of the data, or for a gain the prior."""
    if form not in get_args(Form):
        raise ValueError(f"`form` must be one of {', '.join(get_args(Form))}; got {form!r}.")
    return posterior.prior() if form == "gain" else posterior


def check_members(variance: Tensor) -> None:
    """Refuse variances ``(b, C, C)`` of outputs that cannot be among the data: their noise bounds them by 1."""
    # The largest eigenvalue of a positive semi-definite matrix is at most its trace; most examples end here.
    suspects = variance[variance.diagonal(dim1=1, dim2=2).sum(1) > 1.01]
    largest = torch.linalg.eigvalsh(suspects)[:, -1]
    if bool((largest > 1.01).any()):
        raise ValueError(
            f"The leverage of an example is {float(largest.max()):.3g}; expected at most 1, as for any of the data. "
            "Fit the posterior on the features that are scored, with each example as often as it is removed."
        )


def noise_given(variance: Tensor, form: Form) -> Tensor:
    """The scale of an example of variance S: ``I + S``; for a loss ``I - S``, its eigenvalues at least ``1e-6``."""
    if form != "loss":
        return noise_with(variance)
    remaining = noise_with(-variance)
    if variance.shape[-1] == 1:
        return remaining.clamp(min=MARGIN)
    failed = torch.linalg.cholesky_ex(remaining - MARGIN * eye_of(variance)).info != 0
    if bool(failed.any()):
        values, axes = torch.linalg.eigh(remaining[failed])
        remaining[failed] = (axes * values.clamp(min=MARGIN)[..., None, :]) @ axes.mT
    return remaining


def noise_with(variance: Tensor) -> Tensor:
    """``I + S``, the predictive variance of outputs whose noise is 1."""
    return eye_of(variance) + variance


def eye_of(matrices: Tensor) -> Tensor:
    """The identity that fits square matrices ``(..., C, C)``."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def inverse_root(matrices: Tensor) -> Tensor:
    """``G^-1`` of every ``G G'``, shape ``(..., C, C)``, G lower triangular."""
    if matrices.shape[-1] == 1:
        return matrices.rsqrt()
    factors = torch.linalg.cholesky(matrices)
    return torch.linalg.solve_triangular(factors, eye_of(factors).expand_as(factors), upper=False)


def small_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, without a call per pair where the inner dimension is 1."""
    return left * right if left.shape[-1] == 1 else left @ right
