"""First-order influence against the inverse of the dense Gauss-Newton matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stride_lightning.steering import influence as influence_module
from stride_lightning.steering.basis import Observation
from stride_lightning.steering.influence import influence
from stride_lightning.steering.solvers import refit
from stride_lightning.tasks.likelihoods import BinaryClassification, Classification, Task
from tests.helpers.tiny import every_task, observation, rows_of

EXACT = {"tolerance": 1e-11, "max_iterations": 2000, "show_progress": False}


def curvatures(task: Task, means: Tensor) -> Tensor:
    """Second derivative of the loss in the outputs, ``(n, C, C)``, from its textbook form."""
    if isinstance(task, Classification):
        return torch.diag_embed(means) - means[:, :, None] * means[:, None, :]
    if isinstance(task, BinaryClassification):
        return torch.diag_embed(means * (1 - means))
    return torch.eye(means.shape[1]).double().expand(len(means), -1, -1) / task.dispersion


def gauss_newton(train: Observation, means: Tensor, task: Task) -> Tensor:
    """The matrix ``G``, dense: ``(C r, C r)``."""
    blocks = torch.einsum("nr,ncd,ns->crds", train.features, curvatures(task, means), train.features) / len(train)
    return blocks.reshape(2 * (blocks.shape[0] * blocks.shape[1],))


def gradients(observed: Observation, means: Tensor, task: Task) -> Tensor:
    surprise = (means - observed.encoded) / task.dispersion
    return torch.einsum("nc,nr->ncr", surprise, observed.features).flatten(1)


def brute_force(
    train: Observation, queries: Observation, means: Tensor, query_means: Tensor, task: Task, ridge: float
) -> Tensor:
    matrix = gauss_newton(train, means, task)
    inverse = torch.linalg.inv(matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype))
    return gradients(queries, query_means, task) @ inverse @ gradients(train, means, task).T / len(train)


def setting(task: Task, size: int = 40) -> tuple[Observation, Observation, Tensor, Tensor]:
    train, queries = observation(task, size=size), observation(task, size=9, seed=1)
    # Linearised elsewhere than at the frozen model, as the recovery does.
    return train, queries, task.mean(0.7 * train.outputs + 0.1), task.mean(0.7 * queries.outputs + 0.1)


@every_task
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_equals_the_dense_inverse(task: Task, ridge: float) -> None:
    train, queries, means, query_means = setting(task)
    query_means[4] = queries.encoded[4]  # predicted perfectly
    obtained = influence(train, queries, means, query_means, task, ridge, **EXACT)
    expected = brute_force(train, queries, means, query_means, task, ridge)
    assert obtained.shape == (9, 40)
    assert (obtained[4] == 0).all()
    torch.testing.assert_close(obtained, expected, rtol=1e-7, atol=1e-10)


@every_task
def test_default_tolerance_is_close_and_in_single_precision(task: Task) -> None:
    train, queries, means, query_means = setting(task)
    expected = brute_force(train, queries, means, query_means, task, 0.05)
    single = (observation(task, dtype=torch.float32), observation(task, size=9, seed=1, dtype=torch.float32))
    obtained = influence(*single, means.float(), query_means.float(), task, 0.05, show_progress=False)
    assert obtained.dtype == torch.float32
    assert (obtained - expected).norm() < 0.05 * expected.norm()


@every_task
def test_predicts_leaving_examples_out(task: Task) -> None:
    """The unit: to first order, how much a query's loss rises when an example is left out of a refit."""
    train, queries = observation(task, size=300), observation(task, size=5, seed=1)
    ridge, settings = 0.05, {"tolerance": 1e-10, "max_iterations": 5000}
    coefficients = refit(train, task, torch.tensor([ridge]).double(), **settings)[..., 0]
    means = task.mean(train.features @ coefficients.T)
    before = queries.features @ coefficients.T
    scores = influence(train, queries, means, task.mean(before), task, ridge, **EXACT)
    chosen = [0, 57, 123, 200]
    rises = []
    for i in chosen:
        rest = rows_of(train, torch.tensor([j for j in range(300) if j != i]))
        # The mean is over one example fewer; the penalty on the summed loss stays.
        without = refit(rest, task, torch.tensor([ridge * 300 / 299]).double(), **settings)[..., 0]
        rises.append(task.loss(queries.features @ without.T, queries.encoded) - task.loss(before, queries.encoded))
    torch.testing.assert_close(scores[:, chosen], torch.stack(rises, 1), rtol=0.15, atol=2e-4)


@every_task
def test_chunks_and_blocks_change_only_rounding(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    train, queries, means, query_means = setting(task, size=200)
    whole = influence(train, queries, means, query_means, task, 0.05, **EXACT)
    monkeypatch.setattr(influence_module, "QUERY_CHUNK", 2)
    monkeypatch.setattr(influence_module, "BLOCK_BYTES", 1)  # blocks of 64 examples, the smallest
    torch.testing.assert_close(influence(train, queries, means, query_means, task, 0.05, **EXACT), whole)
