"""Tests of the meter: its own peak, exactly where the system knows it, and nothing reset."""

import subprocess
import sys

import pytest
import torch

from stride_lightning.runtime import metering
from stride_lightning.runtime.metering import Meter

MIB = 2**20


def test_peak_is_that_of_the_block_not_of_the_life_of_the_process():
    freed = torch.ones(512 * MIB // 4)
    del freed
    with Meter() as meter:
        held = torch.ones(64 * MIB // 4)
        torch.sin(held, out=held)  # long enough to be seen
    assert meter.peak_memory is not None
    assert 48 * MIB < meter.peak_memory < 128 * MIB


def test_a_new_high_of_the_process_is_exact_however_short():
    code = """
import numpy as np
from stride_lightning.runtime import metering
metering.PERIOD = 60
with metering.Meter() as meter:
    np.ones(2**27, dtype=np.uint8).sum()
print(meter.peak_memory)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(2**27, rel=0.1)


def test_the_mark_of_the_process_is_not_reset():
    before = metering._status("VmHWM")
    with Meter():
        pass
    assert metering._status("VmHWM") >= before


def test_unknown_memory_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(metering, "_STATUS", tmp_path / "status")
    with Meter() as meter:
        pass
    assert meter.peak_memory is None
    assert meter.seconds > 0


def test_counters_of_cuda_are_read_only(monkeypatch):
    marks = iter([300, 900])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(marks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: pytest.fail("it is the caller's"))
    gauge = metering._Device()
    assert gauge.peak() == 700  # the mark rose to 900 inside


def test_an_earlier_mark_of_cuda_is_not_this_call_s(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 900)
    assert metering._Device().peak() == 0


def test_the_package_imports_where_there_is_no_resource_module():
    code = "import sys; sys.modules['resource'] = None; import stride_lightning.attribute"
    subprocess.run([sys.executable, "-c", code], check=True)
