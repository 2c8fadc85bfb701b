"""What an index refuses: another model's index, damage, and rows that do not fit; always by name."""

import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch

from stride_lightning.information.index import lance
from stride_lightning.information.index.checks import PositionSet, VectorIndexError
from stride_lightning.information.index.in_memory import MemoryIndex
from stride_lightning.information.index.on_disk import InformationIndex
from tests.information.index.cases import COLUMNS, IDENTITY, batches, contents, example_rows, queries

# ------------------------------------------------------------------------------------------------- whose index it is


def test_identity_of_another_model_is_refused_by_key(tmp_path):
    InformationIndex.create(tmp_path, 2, identity=IDENTITY)
    assert InformationIndex.open(tmp_path).identity == IDENTITY
    assert InformationIndex.open(tmp_path, IDENTITY).identity == IDENTITY
    other = {"weights": "0000", "projection": IDENTITY["projection"], "form": "gain"}
    message = (
        r"'form': expected \"gain\", came nothing; 'weights': expected \"0000\", came \"9f3c\"\. Open the index of this"
    )
    with pytest.raises(VectorIndexError, match=message):
        InformationIndex.open(tmp_path, other)
    with pytest.raises(VectorIndexError, match=r"'projection': expected nothing, came \{\"dim\": 16, \"seed\": 0\}\."):
        InformationIndex.open(tmp_path, {"weights": "9f3c"})


def test_create_again(tmp_path):
    index = InformationIndex.create(tmp_path, 2, identity=IDENTITY, columns={"label": int})
    index.add([0], np.ones((1, 2)), {"label": [1]})
    with pytest.raises(FileExistsError, match=r"There is an index at .*: open it, delete it, or pass exist_ok=True"):
        InformationIndex.create(tmp_path, 2, identity=IDENTITY)
    same = InformationIndex.create(tmp_path, 2, identity=IDENTITY, columns={"label": int}, exist_ok=True)
    assert len(same) == 1
    with pytest.raises(VectorIndexError, match=r"has dim=2 .*; expected dim=3"):
        InformationIndex.create(tmp_path, 3, identity=IDENTITY, columns={"label": int}, exist_ok=True)
    with pytest.raises(VectorIndexError, match="'weights': expected \"x\", came"):
        InformationIndex.create(tmp_path, 2, identity=IDENTITY | {"weights": "x"}, exist_ok=True)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file: give the folder"):
        InformationIndex.create(tmp_path / "file", 2, identity={})
    with pytest.raises(TypeError, match="`identity` must be plain JSON values"):
        InformationIndex.create(tmp_path / "x", 2, identity={"weights": torch.ones(1)})


def damage(path, pattern, how):
    files = sorted((path / "vectors.lance").glob(pattern))
    assert files
    for file in files:
        if how == "removed":
            file.unlink()
        elif how == "cut":
            os.truncate(file, file.stat().st_size // 2)
        else:
            file.write_bytes(b"x" * 4000)


@pytest.mark.parametrize("how", ["removed", "cut", "overwritten"])
@pytest.mark.parametrize("pattern", ["data/*", "_versions/*.manifest"])
def test_damaged_index_is_refused_by_name(filled, pattern, how):
    damage(filled.path, pattern, how)
    message = (
        re.escape(f"The index '{filled.path}' cannot be used: ") + ".*Restore the folder from a copy, or delete it"
    )
    with pytest.raises(VectorIndexError, match=message):
        InformationIndex.open(filled.path).search(queries())
    with pytest.raises(VectorIndexError, match=message):
        InformationIndex.open(filled.path).build(batches(example_rows(), 30), show_progress=False)


def test_data_without_a_version_are_not_overwritten(filled):
    damage(filled.path, "_versions/*.manifest", "removed")
    for exist_ok in (False, True):
        with pytest.raises(VectorIndexError, match="has data and no version that says what they are"):
            InformationIndex.create(filled.path, 16, identity=IDENTITY, columns=COLUMNS, exist_ok=exist_ok)


def test_other_folders_are_refused(tmp_path):
    import lancedb

    with pytest.raises(FileNotFoundError, match=r"No index at .*: make one with InformationIndex\.create"):
        InformationIndex.open(tmp_path)
    lancedb.connect(tmp_path).create_table("vectors", [{"position": 1, "vector": [1.0, 2.0]}])
    with pytest.raises(VectorIndexError, match="holds a table that is not an InformationIndex"):
        InformationIndex.open(tmp_path)


def test_later_layout_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lance, "FORMAT", 2)
    InformationIndex.create(tmp_path, 2, identity={})
    monkeypatch.undo()
    with pytest.raises(
        VectorIndexError, match=r"has layout 2 .*; expected layout 1 .*version of the library that wrote"
    ):
        InformationIndex.open(tmp_path)


def test_without_lancedb_the_extra_is_named_and_memory_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    message = r"pip install 'stride-lightning\[index\]'\. Without it, MemoryIndex searches exactly"
    with pytest.raises(ModuleNotFoundError, match=message):
        InformationIndex.create(tmp_path, 2, identity={})
    with pytest.raises(ModuleNotFoundError, match=message):
        InformationIndex.open(tmp_path)
    memory = MemoryIndex(2)
    memory.add([3], np.ones((1, 2)))
    assert memory.search([[1.0, 1.0]], exact=False).positions.tolist() == [[3]]


def test_a_moved_index_opens(filled, tmp_path):
    before = contents(filled)
    shutil.move(filled.path, tmp_path / "moved")
    assert contents(InformationIndex.open(tmp_path / "moved", IDENTITY)) == before


# -------------------------------------------------------------------------------------------------------- bad input

GOOD = {"label": [1, 2], "text": ["a", "b"], "weight": [0.5, 1], "clean": [True, False]}
BAD_ROWS = [
    ([0, 1], np.ones((2, 15)), GOOD, ValueError, r"`vectors` of shape \(b, 16\), as the index has dim=16, got .*2, 15"),
    ([0, 1], np.ones(16), GOOD, ValueError, r"`vectors` of shape \(b, 16\)"),
    ([0, 1], np.ones((3, 16)), GOOD, ValueError, "a vector for each of 2 positions, got 3"),
    ([0, 1], [[1.0] * 16, [np.nan] * 16], GOOD, ValueError, "not finite as float32: those of position 1. Find"),
    ([0, 9], np.full((2, 16), 1e39), GOOD, ValueError, "not finite as float32: those of positions 0, 9. Find"),
    ([0, 0], np.ones((2, 16)), GOOD, ValueError, "Twice in a batch, .*: position 0"),
    ([0, -1], np.ones((2, 16)), GOOD, ValueError, "Positions in a dataset are not negative, got -1"),
    ([0.0, 1.0], np.ones((2, 16)), GOOD, ValueError, r"must be integers of shape \(b,\), got float64"),
    ([[0, 1]], np.ones((2, 16)), GOOD, ValueError, r"must be integers of shape \(b,\), got int64 of shape \(1, 2\)"),
    ([0, 1], np.ones((2, 16)), None, ValueError, r"Expected the metadata columns \['clean', 'label', .*, got \[\]"),
    ([0, 1], np.ones((2, 16)), GOOD | {"more": [1, 2]}, ValueError, "Expected the metadata columns .*'more'"),
    ([0, 1], np.ones((2, 16)), GOOD | {"label": [1]}, ValueError, "Expected 2 values of .*'label', got 1"),
    ([0, 1], np.ones((2, 16)), GOOD | {"label": [1, 2.0]}, TypeError, "'label' holds int, got 2.0: convert it"),
    ([0, 1], np.ones((2, 16)), GOOD | {"label": [1, True]}, TypeError, "'label' holds int, got True"),
    (
        [0, 1],
        np.ones((2, 16)),
        GOOD | {"label": [1, 2**63]},
        ValueError,
        "integers of 64 bits, got 9223372036854775808",
    ),
    ([0, 1], np.ones((2, 16)), GOOD | {"text": ["a", None]}, TypeError, "'text' holds str, got None: .* such as ''"),
    ([0, 1], np.ones((2, 16)), GOOD | {"text": ["a", "\ud800"]}, ValueError, "'text' holds Unicode text"),
    ([0, 1], np.ones((2, 16)), GOOD | {"clean": [1, 0]}, TypeError, "'clean' holds bool, got 1"),
]


@pytest.mark.parametrize(("positions", "vectors", "columns", "error", "message"), BAD_ROWS)
def test_bad_rows_are_refused_and_leave_nothing(make, positions, vectors, columns, error, message):
    index = make()
    with pytest.raises(error, match=message):
        index.add(positions, vectors, columns)
    with pytest.raises(error, match=message):
        index.build([(positions, vectors, columns)], show_progress=False)
    assert len(index) == 0
    index.add([0, 1], np.ones((2, 16)), GOOD)
    assert len(index) == 2


def test_positions_that_are_there_are_refused_by_name(make):
    index = make(columns={})
    index.add(np.arange(10), np.ones((10, 16)))
    with pytest.raises(
        ValueError, match=r"Already in the index, .*: positions 2, 3, 4, 5, 6 and 3 more. Leave them out"
    ):
        index.add(np.arange(2, 12), np.ones((10, 16)))
    assert len(index) == 10
    with pytest.raises(ValueError, match=r"Twice in the stream, .*: position 3"):
        index.build([([3, 11], np.ones((2, 16))), ([3], np.ones((1, 16)))], show_progress=False)


@pytest.mark.parametrize("batch", [([0],), "ab" * 5, {"positions": [0]}])
def test_batches_of_another_form_are_refused(make, batch):
    with pytest.raises(ValueError, match=r"Expected batches of \(positions, vectors\) or"):
        make(columns={}).build([batch], show_progress=False)


@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_k_must_be_positive(make, k):
    with pytest.raises(ValueError, match=f"`k` must be an integer of at least 1, got {k!r}"):
        make().search(queries(), k)


def test_bad_queries_are_refused(make):
    index = make()
    with pytest.raises(ValueError, match=r"`queries` of shape \(b, 16\), .* another projection"):
        index.search(np.ones((2, 8)))
    with pytest.raises(ValueError, match=r"`queries` of shape \(b, 16\)"):
        index.search(np.ones(16))
    with pytest.raises(ValueError, match="Query 1 is not finite"):
        index.search([[1.0] * 16, [np.inf] * 16])


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"a b": int}, ValueError, "'a b' must be named by ASCII letters"),
        ({"_x": int}, ValueError, "'_x' must be named by ASCII letters"),
        ({"Vector": int}, ValueError, "'Vector' has the name of one that every index has"),
        ({"a": int, "A": int}, ValueError, "may not differ in case only"),
        ({"a": list}, TypeError, "'a' must be one of .*got <class 'list'>"),
    ],
)
def test_bad_columns_are_refused(make, columns, error, message):
    with pytest.raises(error, match=message):
        make(columns=columns)


def test_bad_sizes_are_refused(make):
    for dim in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"`dim` must be an integer of at least 1, got {dim!r}"):
            make(dim=dim)
    with pytest.raises(ValueError, match="`rows_per_commit` must be an integer of at least 1, got 0"):
        make().build([], rows_per_commit=0)


def test_tensors_of_lower_precision_and_with_gradients(make):
    index = make(dim=2, columns={})
    index.add(torch.tensor([0, 1]), torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True))
    index.add(np.array([2], np.uint8), torch.full((1, 2), 2.0, dtype=torch.float64))
    assert index.search(torch.ones(1, 2, requires_grad=True)).positions.tolist() == [[2, 0, 1]]


def test_what_was_passed_may_change_afterwards():
    index, vectors = MemoryIndex(2), np.ones((1, 2), np.float32)
    index.add([0], vectors)
    vectors[:] = 5
    assert index.search([[1.0, 0.0]]).dots.tolist() == [[1.0]]


def test_position_set():
    held = PositionSet()
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 10**6, 500)
    held.add(drawn)
    held.add(np.empty(0, np.int64))
    asked = np.concatenate([drawn, rng.integers(0, 10**6, 500), [2**62]])
    assert held.holds(asked).tolist() == np.isin(asked, drawn).tolist()
    assert held.holds(np.empty(0, np.int64)).tolist() == []
