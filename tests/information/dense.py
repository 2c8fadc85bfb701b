"""The Gaussian process of linear features, by dense inverses over outputs: what the package is checked against."""

from __future__ import annotations

import torch
from torch import Tensor

from stride_lightning.information.posterior import Posterior
from tests.helpers.gradient_models import gradients_of, jacobians_of, margin_of, second_derivatives
from tests.helpers.tiny import random_tensor

RIDGE = 0.7
SIGNAL_TO_NOISE = 1e6  # of diverse examples under the prior


def case(num_outputs: int, query_outputs: int | None = None, n: int = 14, k: int = 9, q: int = 5):
    """Training features, queries and their posterior."""
    train = random_tensor(n, num_outputs, k, seed=1)
    queries = random_tensor(q, query_outputs or num_outputs, k, seed=2)
    return train, queries, Posterior.fit(train, ridge=RIDGE)


def entropies(queries: Tensor, train: Tensor, ridge: float = RIDGE, noise: float = 1.0) -> Tensor:
    """Of the noisy outputs of every query given those of the training rows, by the kernel matrix; in nats.

    ``noise`` is the variance of the labels of training rows; that of the queries is 1.
    """
    rows = train.flatten(0, 1)
    kernel = rows @ rows.T / ridge + noise * torch.eye(len(rows), dtype=rows.dtype)
    nats = []
    for query in queries:
        cross = query @ rows.T / ridge
        variance = query @ query.T / ridge - cross @ torch.linalg.inv(kernel) @ cross.T
        predictive = variance + torch.eye(len(query), dtype=rows.dtype)
        nats.append(0.5 * torch.logdet(2 * torch.pi * torch.e * predictive))
    return torch.stack(nats)


def without(train: Tensor, places: list[int]) -> Tensor:
    return train[[place for place in range(len(train)) if place not in places]]


def loss(queries: Tensor, train: Tensor, places: list[int], ridge: float = RIDGE) -> Tensor:
    return entropies(queries, without(train, places), ridge) - entropies(queries, train, ridge)


def gain(queries: Tensor, train: Tensor, places: list[int], ridge: float = RIDGE, noise: float = 1.0) -> Tensor:
    return entropies(queries, train[:0], ridge) - entropies(queries, train[places], ridge, noise)


def copy(queries: Tensor, train: Tensor, places: list[int], ridge: float = RIDGE) -> Tensor:
    return entropies(queries, train, ridge) - entropies(queries, torch.cat([train, train[places]]), ridge)


FORMS = {"loss": loss, "gain": gain, "copy": copy}


def about_weights(train: Tensor, places: list[int], ridge: float = RIDGE) -> float:
    rows = train[places].flatten(0, 1)
    return 0.5 * float(torch.logdet(torch.eye(len(rows), dtype=rows.dtype) + rows @ rows.T / ridge))


# ---- features of a model, one example after the other -----------------------------------------------------------


def tangents_of(model, task, data, likelihood: str = "gauss-newton") -> Tensor:
    """Whitened features ``(n, C, p)``: roots of torch's own Hessians times Jacobians; of a margin, ``(n, 1, p)``."""
    if likelihood == "margin":
        rows, (inputs, targets) = gradients_of(model, task, data, margin_of), data.tensors
        margins = torch.stack([margin_of(task, model(x[None]), y[None]) for x, y in zip(inputs, targets, strict=True)])
        p = torch.sigmoid(margins.detach().flatten())
        return (rows * (p * (1 - p)).sqrt()[:, None])[:, None]
    values, axes = torch.linalg.eigh(second_derivatives(model, task, data))
    roots = axes @ torch.diag_embed(values.clamp(min=0).sqrt()) @ axes.mT
    return roots @ jacobians_of(model, data)


def single(form: str, queries: Tensor, train: Tensor, ridge: float) -> Tensor:
    """Information of every single example about every query, ``(q, n)``."""
    return torch.stack([FORMS[form](queries, train, [i], ridge) for i in range(len(train))], 1)


def signs_of(model, task, data, queries, train: Tensor, ridge: float) -> Tensor:
    """Of the first-order influence ``g_q' A^-1 g_i``, by gradients of losses."""
    precision = torch.einsum("ncp,ncq->pq", train, train) + ridge * torch.eye(train.shape[2], dtype=train.dtype)
    return (
        gradients_of(model, task, queries) @ torch.linalg.solve(precision, gradients_of(model, task, data).T)
    ).sign()


def next_to_no_noise(train: Tensor, ridge: float) -> float:
    """Of the labels of diverse examples, in units of the noise there is."""
    return float(train.square().sum()) / len(train) / (SIGNAL_TO_NOISE * ridge)


# ---- sets ---------------------------------------------------------------------------------------------------------


def greedy(worth, candidates, size: int) -> tuple[list[int], list[float]]:
    """Examples chosen one after the other by trying all, the first of equals, and what each adds to the worth."""
    chosen, gains = [], []
    for _ in range(size):
        left = [i for i in candidates if i not in chosen]
        tried = torch.tensor([float(worth([*chosen, i])) for i in left], dtype=torch.float64)
        best = int((tried >= tried.max() - 1e-9).int().argmax())
        chosen.append(left[best])
        gains.append(float(tried[best]) - sum(gains))
    return chosen, gains


def greedy_gain(query: Tensor, train: Tensor, candidates, size: int, ridge: float) -> tuple[list[int], list[float]]:
    """For one query, labels with next to no noise."""
    noise = next_to_no_noise(train, ridge)
    return greedy(lambda chosen: gain(query[None], train, chosen, ridge, noise), candidates, size)


def greedy_about_weights(train: Tensor, size: int, ridge: float = RIDGE) -> tuple[list[int], list[float]]:
    return greedy(lambda chosen: about_weights(train, chosen, ridge), range(len(train)), size)
