"""What is built on disk survives kills; filters, approximate search, and whose index it is."""

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

# ------------------------------------------------------------------------------------------------------------ filters


@pytest.mark.parametrize(
    ("sql", "function"),
    [
        ("label = 3", lambda columns: columns["label"] == 3),
        ("label in (1, 2) and weight > 0.5", lambda c: np.isin(c["label"], [1, 2]) & (c["weight"] > 0.5)),
        ("text = 'it''s'", lambda columns: columns["text"] == "it's"),
        ("text like 'ü%'", lambda columns: columns["text"] == "ünï"),
        ("not clean", lambda columns: ~columns["clean"]),
        ("label = 99", lambda columns: columns["label"] == 99),
    ],
)
def test_filters(filled, sql, function):
    rows = example_rows()
    memory = MemoryIndex(16, columns=COLUMNS)
    memory.build(batches(rows, 64), show_progress=False)
    arrays = {n: np.array(v, object) if n == "text" else np.asarray(v) for n, v in rows[2].items()}
    positions, _ = brute_force(rows, queries(), 20, function(arrays))
    assert filled.search(queries(), 20, sql).positions.tolist() == positions.tolist()
    assert memory.search(queries(), 20, function).positions.tolist() == positions.tolist()


def test_filter_on_position_and_capital_letters(tmp_path):
    index = InformationIndex.create(tmp_path, 2, identity={}, columns={"Label": int})
    index.add([0, 1, 2], np.ones((3, 2)), {"Label": [5, 6, 6]})
    assert index.search([[1.0, 1.0]], where="position >= 1").positions.tolist() == [[1, 2]]
    assert index.search([[1.0, 1.0]], where="Label = 5").positions.tolist() == [[0]]


@pytest.mark.parametrize("where", ["label = = 3", "nothing = 3", "label", "label = 'x'", "", "text > 3"])
def test_condition_that_is_not_understood(filled, where):
    message = re.escape(f"where={where!r} is not understood: ") + r".*\{label: int, text: str, .*quote in it doubled"
    with pytest.raises(ValueError, match=message):
        filled.search(queries(), where=where)


def test_condition_that_fails_for_a_row(filled):
    with pytest.raises(ValueError, match=r"`where` cannot be computed for some row: .*[Dd]ivide by zero"):
        filled.search(queries(), where="label / 0 = 1")


def test_kinds_of_condition_are_not_mixed_up(filled):
    with pytest.raises(TypeError, match="`where` of an index on disk is SQL text"):
        filled.search(queries(), where=lambda columns: columns["label"] == 3)
    memory = MemoryIndex(16, columns={"label": int})
    with pytest.raises(TypeError, match=r"`where` of an index in memory is a function .* InformationIndex, which"):
        memory.search(queries(), where="label = 3")
    memory.add([0, 1], np.ones((2, 16)), {"label": [0, 1]})
    with pytest.raises(ValueError, match=r"must give a boolean for each of 2 rows, got int64 of shape \(2,\)"):
        memory.search(queries(), where=lambda columns: columns["label"])


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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"killed": [True] * 3, "lancedb imported": False}
    whole = kill_index.create(tmp_path / "whole")
    whole.build(kill_index.stream(), show_progress=False)
    expected = contents(whole)
    assert expected["position"] == list(range(kill_index.ROWS))
    by_position = list(zip(*expected.values(), strict=True))
    counts = []
    for trial in range(3):
        found = contents(InformationIndex.open(folder / f"after-{trial}", kill_index.IDENTITY))
        rows = list(zip(*found.values(), strict=True))
        assert rows == [by_position[p] for p in found["position"]]  # each as it should be
        assert len(set(found["position"])) == len(rows)
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
    with pytest.raises(ValueError, match=r"Already in the index, .*: position 1. Leave"):
        first.add([1], np.ones((1, 2)))

    def interrupted():
        yield [2], np.ones((1, 2))
        second.add([2], np.ones((1, 2)))

    with pytest.raises(VectorIndexError, match=r"Another process has written .*: when it is done, build again"):
        first.build(interrupted(), show_progress=False)
    assert contents(InformationIndex.open(tmp_path))["position"] == [0, 1, 2]
    first.add([3], np.ones((1, 2)))
    assert len(first) == 4


# -------------------------------------------------------------------------------------------------- approximate search


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """20,000 vectors of 64 dimensions in 200 clusters, with an approximate index made of the first 19,000."""
    rng = np.random.default_rng(0)
    middles = rng.standard_normal((200, 64)) * np.exp(rng.normal(0, 0.3, (200, 1)))
    vectors = middles[rng.integers(0, 200, 20_000)] + 0.5 * rng.standard_normal((20_000, 64))
    vectors = (vectors * rng.choice([-1, 1], (20_000, 1)) * 1e-6).astype(np.float32)  # as 1 - dot these are all alike
    asked = middles[rng.integers(0, 200, 100)] + 0.5 * rng.standard_normal((100, 64))
    positions = np.arange(20_000)
    index = InformationIndex.create(tmp_path_factory.mktemp("ann"), 64, identity={}, columns={"label": int})
    index.add(positions[:19_000], vectors[:19_000], {"label": positions[:19_000] % 100})
    assert not index.has_ann
    with pytest.raises(ValueError, match=r"no approximate index: call `create_ann\(\)` first"):
        index.search(asked, exact=False)
    index.create_ann(num_sub_vectors=8)  # made in a third of the time of the default
    assert index.has_ann
    index.add(positions[19_000:], vectors[19_000:], {"label": positions[19_000:] % 100})
    return index, asked


def recall(found, exact):
    pairs = zip(found.positions.tolist(), exact.positions.tolist(), strict=True)
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs])


def test_recall_of_the_approximate_search(clustered):
    index, asked = clustered
    exact = index.search(asked)
    found = index.search(asked, exact=False)
    least = index.search(asked, exact=False, nprobes=1, refine_factor=1)
    print(f"recall@10 {recall(found, exact):.3f}; one list and no spare candidates {recall(least, exact):.3f}")
    assert recall(found, exact) > 0.95
    assert recall(least, exact) < recall(found, exact)
    later, found_later = (set(hits.positions[hits.positions >= 19_000].tolist()) for hits in (exact, found))
    assert later  # rows appended since are found too
    assert found_later >= later
    assert (found.dots < 0).any()  # both signs
    assert (found.dots > 0).any()
    for row, exact_row in zip(range(100), exact.positions.tolist(), strict=True):  # its products are the exact ones
        values = dict(zip(exact_row, exact.dots[row].tolist(), strict=True))
        pairs = zip(found.positions[row].tolist(), found.dots[row].tolist(), strict=True)
        assert all(values.get(position, dot) == dot for position, dot in pairs)
        assert len(set(found.positions[row].tolist())) == 10
    assert found.columns["label"] == [[position % 100 for position in row] for row in found.positions.tolist()]


def test_approximate_search_with_a_filter_finds_k(clustered):
    index, asked = clustered
    exact = index.search(asked[:20], 200, "label = 3")
    found = index.search(asked[:20], 200, "label = 3", exact=False, nprobes=1)
    assert found.positions.tolist() == exact.positions.tolist()  # all 200 of them
    assert index.search(asked[:3], 5, "label = 999", exact=False).positions.shape == (3, 0)
    assert recall(index.search(asked, 10, "label < 50", exact=False), index.search(asked, 10, "label < 50")) > 0.9
    alone = index.search(asked[:1], exact=False)
    assert torch.equal(alone.positions, index.search(asked[:2], exact=False).positions[:1])


def test_lists_that_hold_too_few_rows_are_made_up_for(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    index = InformationIndex.create(tmp_path, 16, identity={}, columns={"label": int})
    index.add(np.arange(3000), rng.standard_normal((3000, 16)), {"label": np.arange(3000) % 20})
    index.create_ann(num_partitions=10, num_sub_vectors=4)
    for k, where in ((1000, None), (5000, None), (600, "label < 10")):
        found = index.search(queries(), k, where, exact=False, nprobes=1)
        assert found.positions.tolist() == index.search(queries(), k, where).positions.tolist()
    monkeypatch.setattr(InformationIndex, "_screened", None)  # and only then
    assert index.search(queries(), 10, exact=False, nprobes=1).positions.shape == (12, 10)


def test_compacting_takes_appended_rows_into_the_approximate_index(clustered, tmp_path):
    index, asked = clustered
    shutil.copytree(index.path, tmp_path / "copy")
    exact, before = index.search(asked), contents(index)
    index = InformationIndex.open(tmp_path / "copy")
    assert index._table.index_stats("vector_idx").num_unindexed_rows == 1000
    index.compact()
    assert index._table.index_stats("vector_idx").num_unindexed_rows == 0
    assert contents(index) == before
    assert torch.equal(index.search(asked).positions, exact.positions)
    assert recall(index.search(asked, exact=False), exact) > 0.9
    index.add([20_000], np.ones((1, 64)), {"label": [0]})
    assert len(InformationIndex.open(tmp_path / "copy")) == 20_001


def test_options_of_the_approximate_search(clustered, tmp_path):
    index, asked = clustered
    for name in ("nprobes", "refine_factor"):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1, got 0"):
            index.search(asked, exact=False, **{name: 0})
    with pytest.raises(ValueError, match="`num_sub_vectors` must divide dim=64, got 7"):
        index.create_ann(num_sub_vectors=7)
    with pytest.raises(ValueError, match="`num_partitions` must be an integer of at least 1, got 0"):
        index.create_ann(num_partitions=0)
    small = InformationIndex.create(tmp_path, 2, identity={})
    small.add([0], np.ones((1, 2)))
    with pytest.raises(ValueError, match="trained on 256 rows or more, and there are 1: search with exact=True"):
        small.create_ann()


# ------------------------------------------------------------------------------------------------- whose index it is


def test_identity_of_another_model_is_refused_by_key(tmp_path):
    InformationIndex.create(tmp_path, 2, identity=IDENTITY)
    assert InformationIndex.open(tmp_path).identity == IDENTITY
    assert InformationIndex.open(tmp_path, IDENTITY).identity == IDENTITY
    message = (
        r"'form': expected \"gain\", came nothing; 'weights': expected \"0000\", came \"9f3c\"\. Open the index of"
    )
    with pytest.raises(VectorIndexError, match=message):
        InformationIndex.open(tmp_path, IDENTITY | {"weights": "0000", "form": "gain"})
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
    message = re.escape(f"The index '{filled.path}' cannot be used: ") + ".*Restore the folder from a copy, or delete"
    with pytest.raises(VectorIndexError, match=message):
        InformationIndex.open(filled.path).search(queries())
    with pytest.raises(VectorIndexError, match=message):
        InformationIndex.open(filled.path).build(batches(example_rows(), 30), show_progress=False)


def test_data_without_a_version_are_not_overwritten(filled):
    damage(filled.path, "_versions/*.manifest", "removed")
    for exist_ok in (False, True):
        with pytest.raises(VectorIndexError, match="has data and no version that says what they are"):
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
    assert memory.search([[1.0, 1.0]], exact=False).positions.tolist() == [[3]]


def test_a_moved_index_opens(filled, tmp_path):
    before = contents(filled)
    shutil.move(filled.path, tmp_path / "moved")
    assert contents(InformationIndex.open(tmp_path / "moved", IDENTITY)) == before
