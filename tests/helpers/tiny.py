"""Tiny tasks, observations and data that several tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_lightning.data.examples import Examples
from stride_lightning.data.reading import Reading
from stride_lightning.readout.features import Observation
from stride_lightning.tasks.likelihoods import BinaryClassification, Classification, Regression, Task

CPU = torch.device("cpu")
TASKS: dict[str, Task] = {
    "softmax": Classification(),
    "binary": BinaryClassification(),
    "Gaussian": Regression(noise_std=0.7),
}
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.double().flatten(), other.double().flatten()]))[0, 1])


def permutation(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))


def random_targets(task: Task, size: int, num_outputs: int, seed: int) -> Tensor:
    """Targets in the form a data set gives them."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(task, Classification):
        return torch.randint(num_outputs, (size,), generator=generator)
    if isinstance(task, BinaryClassification):
        return torch.randint(2, (size, num_outputs), generator=generator)
    return torch.randn(size, num_outputs, generator=generator, dtype=torch.float64)


def observation(
    task: Task,
    size: int = 40,
    num_features: int = 5,
    num_outputs: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Observation:
    """An evaluation pass that never took place: features of different energies, the last of them constant."""
    features = random_tensor(size, num_features, seed=seed) * torch.linspace(2, 0.3, num_features, dtype=torch.float64)
    features[:, -1] = 0.6
    outputs = features @ random_tensor(num_features, num_outputs, seed=seed % 7 + 100)
    outputs = outputs + 0.5 * random_tensor(size, num_outputs, seed=seed + 200)
    encoded = task.encode(random_targets(task, size, num_outputs, seed + 300), num_outputs).double()
    values = (features, outputs, encoded, task.loss(outputs, encoded))
    return Observation(*(value.to(dtype) for value in values), fingerprint={})


def rows_of(observed: Observation, order: Tensor) -> Observation:
    """The same pass over the examples in another order."""
    values = (observed.features, observed.outputs, observed.encoded, observed.losses)
    return Observation(*(value[order] for value in values), fingerprint={})


def examples_of(*tensors: Tensor) -> Examples:
    return Examples(TensorDataset(*tensors))


def read(examples: Examples, batch_size: int = 6) -> tuple[Tensor, dict[str, Any]]:
    """All inputs in order, and the fingerprint."""
    reading = Reading(examples, Classification(), batch_size=batch_size, device=CPU)
    all_rows = list(reading)
    return torch.cat([rows.batch[0] for rows in all_rows]), reading.fingerprint


def perceptron(num_inputs: int = 4, num_outputs: int = 3, seed: int = 0) -> nn.Sequential:
    """A two-layer network with seeded weights, in eval mode."""
    model = nn.Sequential(nn.Linear(num_inputs, 6), nn.ReLU(), nn.Linear(6, num_outputs))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.7 * random_tensor(*parameter.shape, seed=seed + i))
    return model.eval()
