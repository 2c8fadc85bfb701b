"""Indexes of both kinds."""

import pytest

from stride_lightning.information.index.in_memory import MemoryIndex
from stride_lightning.information.index.on_disk import InformationIndex
from tests.information.index.cases import COLUMNS, IDENTITY, batches, example_rows


@pytest.fixture(params=["memory", "disk"])
def make(request, tmp_path):
    """Makes an empty index of either kind."""

    def make(dim=16, columns=COLUMNS, name="index"):
        if request.param == "memory":
            return MemoryIndex(dim, IDENTITY, columns)
        return InformationIndex.create(tmp_path / name, dim, identity=IDENTITY, columns=columns)

    return make


@pytest.fixture
def filled(tmp_path):
    index = InformationIndex.create(tmp_path / "index", 16, identity=IDENTITY, columns=COLUMNS)
    index.build(batches(example_rows(), 64), show_progress=False)
    return index
