"""The formula in the docstring of StrideAttributor against the measured peak."""

from __future__ import annotations

import ctypes
import gc
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_lightning.readout.features import Observation
from stride_lightning.readout.readout import Readout
from stride_lightning.runtime.metering import Meter
from stride_lightning.steering.attributor import StrideAttributor
from stride_lightning.tasks.likelihoods import Classification

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from procfs")


def formula(n: int, r: int, num_outputs: int, q: int, copies: int) -> float:
    """Bytes, as the docstring says; with so many copies of the scores while these are recovered."""
    k, columns = min(n, r), min(64, q)
    blocks = 5 * min(32e6, 4 * n * num_outputs * columns)
    answer = 4 * copies * q * n + blocks + min(64e6, 32 * k * num_outputs * columns)
    return 4 * (n * r + k**2) + max(90e6, 28 * k**2, answer)


def check(meter: Meter, expected: float) -> None:
    assert meter.peak_memory is not None
    assert meter.peak_memory == pytest.approx(expected, rel=0.25)


@pytest.fixture(autouse=True)
def tidy() -> None:
    """Large blocks go back to the system when they are freed, and so does what earlier tests have freed."""
    gc.collect()
    libc, mmap_threshold = ctypes.CDLL("libc.so.6"), -3
    libc.mallopt(mmap_threshold, 2**23)
    libc.malloc_trim(0)


def peak(n: int, r: int, num_outputs: int, q: int, recovery: str) -> Meter:
    inputs = torch.randn(n, r - 1, generator=torch.Generator().manual_seed(0))
    targets = inputs[:, :num_outputs].argmax(1)
    model = nn.Sequential(nn.Linear(r - 1, num_outputs)).eval()
    data, queries = TensorDataset(inputs, targets), TensorDataset(inputs[:q], targets[:q])
    with Meter() as meter:
        attributor = StrideAttributor(recovery=recovery, show_progress=False)
        attribution = attributor.fit(model, data, task=Classification()).attribute(queries)
    assert attribution.scores.shape == (q, n)
    return meter


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """What the libraries take once is taken before."""
    peak(9_000, 40, 2, 300, "prior")


@pytest.mark.parametrize(
    ("n", "r", "num_outputs", "q", "recovery", "copies"),
    [
        (40_000, 400, 2, 20, "closed-form", 1),
        (20_000, 20, 2, 800, "prior", 6),
        (20_000, 20, 2, 1500, "closed-form", 1),
        (4_000, 100, 40, 60, "closed-form", 1),
    ],
    ids=["many examples", "many queries", "many queries in closed form", "many classes"],
)
def test_peak_of_an_attribution(n: int, r: int, num_outputs: int, q: int, recovery: str, copies: int) -> None:
    check(peak(n, r, num_outputs, q, recovery), formula(n, r, num_outputs, q, copies))


def test_peak_with_more_features_than_examples() -> None:
    n, r, q = 1200, 16_000, 60
    with Meter() as meter:
        features = torch.randn(n, r, generator=torch.Generator().manual_seed(0))
        features /= r**0.5
        features[:, -1] = 1
        encoded = nn.functional.one_hot(torch.arange(n) % 2).float()
        readout = Readout.fit(Observation(features, encoded, encoded, encoded[:, 0], {}), Classification())
        scores = readout.influence(readout.training_points.select(slice(q)))
    assert scores.shape == (q, n)
    check(meter, formula(n, r, 2, q, 1))
