"""The formula in the docstring of StrideAttributor against the measured peak."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
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
#: Examples, features, outputs and queries, in closed form.
ATTRIBUTIONS = {
    "many examples": (40_000, 400, 2, 20),
    "many queries in closed form": (20_000, 20, 2, 1500),
    "many classes": (4_000, 100, 40, 60),
}
#: Examples, features and queries of a readout alone.
WIDE = (1500, 16_000, 60)


def formula(n: int, r: int, num_outputs: int, q: int) -> float:
    """Bytes, as the docstring says."""
    k, megabyte, columns = min(n, r), 10**6, min(64, q)
    fitting = max(130 * megabyte, 28 * k**2)
    solving = min(64 * megabyte, 32 * k * num_outputs * columns)
    blocks = 5 * min(32 * megabyte, 4 * n * num_outputs * columns)
    return 4 * (n * r + k**2) + max(fitting, 4 * q * n + solving + blocks)


def attributed(n: int, r: int, num_outputs: int, q: int) -> None:
    inputs = torch.randn(n, r - 1, generator=torch.Generator().manual_seed(0))
    targets = inputs[:, :num_outputs].argmax(1)
    model = nn.Sequential(nn.Linear(r - 1, num_outputs)).eval()
    data, queries = TensorDataset(inputs, targets), TensorDataset(inputs[:q], targets[:q])
    attributor = StrideAttributor(show_progress=False)
    scores = attributor.fit(model, data, task=Classification()).attribute(queries).scores
    assert scores.shape == (q, n)


def read_out(n: int, r: int, q: int) -> None:
    """A readout with more features than examples."""
    features = torch.randn(n, r, generator=torch.Generator().manual_seed(0))
    features /= r**0.5
    features[:, -1] = 1
    encoded = nn.functional.one_hot(torch.arange(n) % 2).float()
    readout = Readout.fit(Observation(features, encoded, encoded, encoded[:, 0], {}), Classification())
    assert readout.influence(readout.training_points.select(slice(q))).shape == (q, n)


def measure() -> dict[str, int | None]:
    """Peaks of all cases, in a process that has done nothing else."""
    libc, mmap_threshold = ctypes.CDLL("libc.so.6"), -3
    libc.mallopt(mmap_threshold, 2**23)  # large blocks go back to the system when they are freed
    attributed(9_000, 40, 2, 300)  # what the libraries take once is taken before
    peaks = {}
    for name, case in [*ATTRIBUTIONS.items(), ("wide", WIDE)]:
        gc.collect()
        libc.malloc_trim(0)
        with Meter() as meter:
            read_out(*case) if name == "wide" else attributed(*case)
        peaks[name] = meter.peak_memory
    return peaks


@pytest.fixture(scope="module")
def peaks() -> dict[str, int | None]:
    # One arena: memory that others hold free would count.
    settings = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-m", __name__], check=True, capture_output=True, text=True, env=settings)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ATTRIBUTIONS)
def test_peak_of_an_attribution(name: str, peaks: dict[str, int | None]) -> None:
    assert peaks[name] == pytest.approx(formula(*ATTRIBUTIONS[name]), rel=0.25)


def test_peak_with_more_features_than_examples(peaks: dict[str, int | None]) -> None:
    n, r, q = WIDE
    assert peaks["wide"] == pytest.approx(formula(n, r, 2, q), rel=0.25)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure()))
