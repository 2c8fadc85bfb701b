"""An index on disk survives kills, resumes, is compacted, and knows what it was made with."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import stride_lightning
from stride_lightning.information.index import lance
from stride_lightning.information.index.checks import VectorIndexError
from stride_lightning.information.index.in_memory import MemoryIndex
from stride_lightning.information.index.on_disk import InformationIndex
from tests.helpers import kill_index
from tests.information.index.cases import COLUMNS, IDENTITY, batches, brute_force, contents, example_rows, queries

# -------------------------------------------------------------------------------------------------- building, resuming


@pytest.mark.parametrize("rows_per_commit", [1000, 50])
def test_append_is_build_at_once(tmp_path, rows_per_commit):
    rows = example_rows()
    parts = [InformationIndex.create(tmp_path / n, 16, identity=IDENTITY, columns=COLUMNS) for n in ("a", "b", "c")]
    assert parts[0].build(batches(rows, 300), show_progress=False) == 300
    stream = list(batches(rows, 30))
    parts[1].build(stream[:4], show_progress=False)
    parts[1] = InformationIndex.open(tmp_path / "b", IDENTITY)
    grown = parts[1].build(stream, rows_per_commit=rows_per_commit, show_progress=False)
    assert grown == 180
    assert parts[1].build(stream, show_progress=False) == 0
    for batch in stream:
        parts[2].add(*batch)
    assert contents(parts[0]) == contents(parts[1]) == contents(parts[2])


def test_missing_positions(make):
    index = make(columns={})
    assert index.missing(3).tolist() == [0, 1, 2]
    index.add([1, 40_000], np.ones((2, 16)))
    assert index.missing(4).tolist() == [0, 2, 3]
    assert index.missing(40_002)[-1] == 40_001


def test_interrupted_stream_keeps_what_was_committed(make):
    index, rows = make(), example_rows()

    def broken():
        for number, batch in enumerate(batches(rows, 30)):
            if number == 7:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        index.build(broken(), rows_per_commit=60, show_progress=False)
    assert len(index) == 180
    assert index.build(batches(rows, 30), rows_per_commit=60, show_progress=False) == 120
    assert index.search(queries(), 10).positions.tolist() == brute_force(rows, queries(), 10)[0].tolist()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_killed_builds_lose_and_double_nothing(tmp_path):
    root, folder = Path(stride_lightning.__file__).parents[1], tmp_path / "kills"
    folder.mkdir()
    command = [sys.executable, str(root / "tests" / "helpers" / "kill_index.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == {"killed": [True] * 3, "lancedb imported": False}
    whole = kill_index.create(tmp_path / "whole")
    whole.build(kill_index.stream(), show_progress=False)
    expected = contents(whole)
    assert expected["position"] == list(range(kill_index.ROWS))
    by_position = list(zip(*expected.values(), strict=True))
    counts = []
    for trial in range(3):
        columns = contents(InformationIndex.open(folder / f"after-{trial}", kill_index.IDENTITY))
        rows = list(zip(*columns.values(), strict=True))
        assert rows == [by_position[p] for p in columns["position"]]  # each as it should be
        assert len(set(columns["position"])) == len(rows)
        counts.append(len(rows))
    assert counts == sorted(set(counts))  # every child went on
    assert counts[0] > 0
    assert counts[-1] < kill_index.ROWS
    assert all(count % kill_index.COMMIT == 0 for count in counts)
    index = InformationIndex.open(folder / "index")
    assert index.build(kill_index.stream(), show_progress=False) == kill_index.ROWS - counts[-1]
    assert contents(index) == expected
    index.compact()
    assert contents(index) == expected


def test_creation_that_was_killed_is_repeated(tmp_path):
    (tmp_path / "vectors.lance" / "_versions").mkdir(parents=True)
    index = InformationIndex.create(tmp_path, 2, identity={})
    index.add([0], np.ones((1, 2)))
    assert len(InformationIndex.open(tmp_path)) == 1


def test_two_writers_are_noticed(tmp_path):
    first = InformationIndex.create(tmp_path, 2, identity={})
    first.add([0], np.ones((1, 2)))
    second = InformationIndex.open(tmp_path)
    second.add([1], np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"already holds position 1, .* Leave"):
        first.add([1], np.ones((1, 2)))

    def interrupted():
        yield [2], np.ones((1, 2))
        second.add([2], np.ones((1, 2)))

    with pytest.raises(VectorIndexError, match=r"Another process has written .*Build again when it is done"):
        first.build(interrupted(), show_progress=False)
    assert contents(InformationIndex.open(tmp_path))["position"] == [0, 1, 2]
    first.add([3], np.ones((1, 2)))
    assert len(first) == 4


def test_compacting_changes_no_row_and_no_result(filled):
    before, hits = contents(filled), filled.search(queries(), 20)
    num_files = len(list(filled.path.glob("vectors.lance/data/*")))
    filled.add([10**6], np.zeros((1, 16)), {name: [kind()] for name, kind in COLUMNS.items()})
    filled.compact()
    assert len(list(filled.path.glob("vectors.lance/data/*"))) <= num_files
    index = InformationIndex.open(filled.path, IDENTITY)
    after = contents(index)
    assert {name: values[:-1] for name, values in after.items()} == before
    for compacted in (filled, index):
        assert torch.equal(compacted.search(queries(), 20).positions, hits.positions)
        assert compacted.search(queries(), 20).columns == hits.columns
        num_passing = sum(label == 3 for label in before["label"])
        assert compacted.search(queries(), 400, lambda columns: columns["label"] == 3).positions.shape[1] == num_passing


# ------------------------------------------------------------------------------------------------- whose index it is


def test_identity_of_another_model_is_refused_by_key(tmp_path):
    InformationIndex.create(tmp_path, 2, identity=IDENTITY)
    assert InformationIndex.open(tmp_path).identity == IDENTITY
    assert InformationIndex.open(tmp_path, IDENTITY).identity == IDENTITY
    message = r"'form': expected \"gain\", got nothing; 'weights': expected \"0000\", got \"9f3c\"\. Open the index of"
    with pytest.raises(VectorIndexError, match=message):
        InformationIndex.open(tmp_path, IDENTITY | {"weights": "0000", "form": "gain"})
    with pytest.raises(VectorIndexError, match=r"'projection': expected nothing, got \{\"dim\": 16, \"seed\": 0\}\."):
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
    with pytest.raises(VectorIndexError, match="'weights': expected \"x\", got"):
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
    message = re.escape(f"The index '{filled.path}' cannot be used: ") + ".*Restore the folder from a copy, or delete"
    with pytest.raises(VectorIndexError, match=message):
        InformationIndex.open(filled.path).search(queries())
    with pytest.raises(VectorIndexError, match=message):
        InformationIndex.open(filled.path).build(batches(example_rows(), 30), show_progress=False)


def test_data_without_a_version_are_not_overwritten(filled):
    damage(filled.path, "_versions/*.manifest", "removed")
    for exist_ok in (False, True):
        with pytest.raises(VectorIndexError, match="has data but no version that describes them"):
            InformationIndex.create(filled.path, 16, identity=IDENTITY, columns=COLUMNS, exist_ok=exist_ok)


def test_other_folders_and_layouts_are_refused(tmp_path, monkeypatch):
    import lancedb

    with pytest.raises(FileNotFoundError, match=r"No index at .*: make one with InformationIndex\.create"):
        InformationIndex.open(tmp_path)
    lancedb.connect(tmp_path).create_table("vectors", [{"position": 1, "vector": [1.0, 2.0]}])
    with pytest.raises(VectorIndexError, match="holds a table that is not an InformationIndex"):
        InformationIndex.open(tmp_path)
    monkeypatch.setattr(lance, "FORMAT", 2)
    InformationIndex.create(tmp_path / "later", 2, identity={})
    monkeypatch.undo()
    with pytest.raises(VectorIndexError, match=r"has layout 2 .*; expected layout 1 .*version of the library that"):
        InformationIndex.open(tmp_path / "later")


def test_without_lancedb_the_extra_is_named_and_memory_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    message = r"pip install 'stride-lightning\[index\]'\. Without it, MemoryIndex searches exactly"
    for call in (lambda: InformationIndex.create(tmp_path, 2, identity={}), lambda: InformationIndex.open(tmp_path)):
        with pytest.raises(ModuleNotFoundError, match=message):
            call()
    memory = MemoryIndex(2)
    memory.add([3], np.ones((1, 2)))
    assert memory.search([[1.0, 1.0]]).positions.tolist() == [[3]]


def test_a_moved_index_opens(filled, tmp_path):
    before = contents(filled)
    shutil.move(filled.path, tmp_path / "moved")
    assert contents(InformationIndex.open(tmp_path / "moved", IDENTITY)) == before


def test_text_that_cannot_be_stored_leaves_nothing(tmp_path):
    index = InformationIndex.create(tmp_path, 2, identity={}, columns={"text": str})
    with pytest.raises(UnicodeEncodeError):
        index.add([0, 1], np.ones((2, 2)), {"text": ["a", "\ud800"]})
    assert len(index) == 0
    assert index.missing(2).tolist() == [0, 1]
    index.add([0, 1], np.ones((2, 2)), {"text": ["a", "b"]})
    assert len(InformationIndex.open(tmp_path)) == 2
