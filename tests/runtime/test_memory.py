"""Free memory, as a container limits it."""

import sys

import pytest
import torch

from stride_lightning.runtime import memory
from stride_lightning.runtime.memory import free_bytes, free_in_container


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    files = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 500\nfile 150\nfile_mapped 20\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert free_in_container(tmp_path) == 450  # files that are cached give way
    if sys.platform.startswith("linux"):
        monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
        assert free_bytes(torch.device("cpu")) == 450


@pytest.mark.parametrize("limit", [None, "max\n"])
def test_no_limit(tmp_path, limit):
    if limit:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("700\n")
    assert free_in_container(tmp_path) == sys.maxsize
