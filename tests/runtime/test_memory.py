"""Tests of the budgets of memory."""

import pytest
import torch

from stride_lightning.runtime.memory import memory_budget

CPU = torch.device("cpu")


def test_by_default_half_of_what_a_gpu_has_free_or_half_a_gigabyte(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6000, 80000))
    assert memory_budget(None, torch.device("cuda", 0)) == 3000
    assert memory_budget(None, CPU) == 2**29
    assert memory_budget(77, torch.device("cuda", 0)) == 77


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "1G"])
def test_wrong_budgets(wrong):
    with pytest.raises((TypeError, ValueError), match="memory_budget"):
        memory_budget(wrong, CPU)
