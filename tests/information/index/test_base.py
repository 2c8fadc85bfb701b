"""What indexes in memory and on disk share: a search is brute force, filters are functions, bad input is refused."""

import tracemalloc

import numpy as np
import pytest
import torch

from stride_lightning.information.index import on_disk, ranking
from stride_lightning.information.index.checks import PositionSet
from stride_lightning.information.index.in_memory import MemoryIndex
from tests.information.index.cases import COLUMNS, as_columns, batches, brute_force, example_rows, queries


@pytest.mark.parametrize("k", [1, 10, 60, 299, 300, 1000])
def test_search_is_brute_force(make, k):
    index, rows = make(), example_rows()
    index.build(batches(rows, 64), show_progress=False)
    hits = index.search(queries(), k)
    positions, dots = brute_force(rows, queries(), k)
    assert hits.positions.tolist() == positions.tolist()
    assert np.array_equal(hits.dots.numpy(), dots)
    where = {position: i for i, position in enumerate(rows[0].tolist())}
    for name, values in rows[2].items():
        plain = values if isinstance(values, list) else values.tolist()
        assert hits.columns[name] == [[plain[where[p]] for p in row] for row in positions.tolist()]


def test_blocks_and_groups_of_queries_change_nothing(make, monkeypatch):
    index, rows = make(), example_rows()
    index.build(batches(rows, 64), show_progress=False)
    once = index.search(queries(), 5)
    monkeypatch.setattr(ranking, "BLOCK_ROWS", 7)
    monkeypatch.setattr(on_disk, "_SCAN_ROWS", 7)
    monkeypatch.setattr(ranking, "QUERIES", 5)
    for hits in (index.search(queries(), 5), index.search(torch.from_numpy(queries()), 5)):
        assert torch.equal(hits.positions, once.positions)
        assert torch.equal(hits.dots, once.dots)
        assert hits.columns == once.columns
    alone = [index.search(query[None], 5) for query in queries()]
    assert torch.equal(torch.cat([hits.positions for hits in alone]), once.positions)
    assert torch.equal(torch.cat([hits.dots for hits in alone]), once.dots)


@pytest.mark.parametrize("k", [1, 10, 40])
@pytest.mark.parametrize("kind", ["equal", "opposite", "zero", "near", "one long"])
def test_ties_and_near_ties_come_in_order_of_positions(make, kind, k, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_ROWS", 64)
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.standard_normal((1, 16)), 500, axis=0).astype(np.float32)
    if kind == "opposite":
        vectors *= rng.choice(np.array([-1, 1], np.float32), (500, 1))
    if kind == "zero":
        vectors[3:] = 0
    if kind in ("near", "one long"):  # float32 products do not tell these apart
        vectors[:, 0] += np.float32(2e-7) * rng.integers(0, 5, 500)
    if kind == "one long":
        vectors[250] = 1e12 * rng.standard_normal(16)
    rows = rng.permutation(500), vectors, {}
    index = make(columns={})
    index.build(batches(rows, 100), show_progress=False)
    hits = index.search(queries(3), k)
    positions, dots = brute_force(rows, queries(3), k)
    assert hits.positions.tolist() == positions.tolist()
    assert np.array_equal(hits.dots.numpy(), dots)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_both_signs_rank_alike(make, sign):
    index, rows = make(), example_rows()
    index.build(batches(rows, 64), show_progress=False)
    positions, dots = brute_force(rows, queries(), 10)
    hits = index.search(sign * queries(), 10)
    assert hits.positions.tolist() == positions.tolist()
    assert np.array_equal(hits.dots.numpy(), sign * dots)
    assert (dots < 0).any()
    assert (dots > 0).any()


def test_products_beyond_float32_are_ranked(make):
    index = make(dim=2, columns={})
    vectors = np.array([[3e38, 0], [3.1e38, 0], [0, 1e-30]] + [[1e30, 0]] * 60, np.float32)
    index.add(np.arange(63), vectors)
    assert index.search([[1e20, 0.0]], 2).positions.tolist() == [[1, 0]]
    assert index.search([[0.0, 1e-30]], 1).positions.tolist() == [[2]]
    hits = index.search([[1e200, 0.0], [0.0, 0.0]], 3)
    assert hits.positions.tolist() == [[1, 0, 3], [0, 1, 2]]
    assert hits.dots[0, 0] == 1e200 * float(vectors[1, 0])


def test_few_rows_are_ranked_in_float64(make, monkeypatch):
    index = make(columns={})
    rng = np.random.default_rng(0)
    index.add(np.arange(2000), rng.standard_normal((2000, 16)))
    counts, dots_of = [], ranking._dots
    monkeypatch.setattr(ranking, "_dots", lambda query, vectors: counts.append(len(vectors)) or dots_of(query, vectors))
    assert index.search(queries(100), 10).positions.shape == (100, 10)
    assert len(counts) == 100  # once for each query
    assert max(counts) <= 12


def test_empty_index_and_no_queries(make):
    index = make()
    assert len(index) == 0
    hits = index.search(queries(3), 5)
    assert hits.positions.shape == hits.dots.shape == (3, 0)
    assert hits.columns == {name: [[], [], []] for name in COLUMNS}
    index.build(batches(example_rows(), 100), show_progress=False)
    hits = index.search(np.empty((0, 16)), 5)
    assert len(hits.positions) == len(hits.dots) == 0
    assert hits.columns == {name: [] for name in COLUMNS}


# ---- filters


@pytest.mark.parametrize(
    "where",
    [
        lambda columns: columns["label"] == 3,
        lambda columns: np.isin(columns["label"], [1, 2]) & (columns["weight"] > 0.5),
        lambda columns: columns["text"] == "it's",
        lambda columns: np.array([text.startswith("ü") for text in columns["text"]], bool),
        lambda columns: ~columns["clean"],
        lambda columns: columns["position"] >= 100,
        lambda columns: columns["label"] == 99,
        lambda columns: torch.tensor(columns["label"]) < 4,
    ],
    ids=["equal", "and", "text", "prefix", "not", "position", "none", "tensor"],
)
def test_filters(make, where):
    index, rows = make(), example_rows()
    index.build(batches(rows, 64), show_progress=False)
    positions, dots = brute_force(rows, queries(), 20, np.asarray(where(as_columns(rows))))
    hits = index.search(queries(), 20, where)
    assert hits.positions.tolist() == positions.tolist()
    assert np.array_equal(hits.dots.numpy(), dots)
    assert [len(labels) for labels in hits.columns["label"]] == [positions.shape[1]] * 12


def test_conditions_that_are_no_functions_or_return_no_booleans_are_refused(make):
    index = make(columns={"label": int})
    with pytest.raises(TypeError, match=r"`where` must be a function of the columns .*, got 'label = 3'\. Pass for"):
        index.search(queries(), where="label = 3")
    index.add([0, 1], np.ones((2, 16)), {"label": [0, 1]})
    with pytest.raises(ValueError, match=r"must return a boolean for each of 2 rows, got int64 of shape \(2,\)"):
        index.search(queries(), where=lambda columns: columns["label"])
    with pytest.raises(ValueError, match=r"must return a boolean for each of 2 rows, got bool of shape \(\)"):
        index.search(queries(), where=lambda columns: True)
    with pytest.raises(ValueError, match=r"looks up the column 'lable'; there are \['position', 'label'\]"):
        index.search(queries(), where=lambda columns: columns["lable"] == 3)


# ---- memory


@pytest.mark.parametrize("num_batches", [20, 80])
def test_memory_of_building_is_what_the_docstring_says(tmp_path, num_batches):
    dim, batch, group = 512, 250, 1000
    index = on_disk.InformationIndex.create(tmp_path, dim, identity={})
    index.add([10**6], np.ones((1, dim)))  # once before measuring: imports

    def stream():
        for at in range(0, num_batches * batch, batch):
            yield np.arange(at, at + batch), np.ones((batch, dim), np.float32)

    tracemalloc.start()
    try:
        index.build(stream(), rows_per_commit=group, show_progress=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    formula = 4 * dim * (2 * group + 3 * batch)
    assert peak <= formula + 2**20
    assert peak >= formula / 2


# ---- bad input

GOOD = {"label": [1, 2], "text": ["a", "b"], "weight": [0.5, 1], "clean": [True, False]}
BAD_ROWS = [
    ([0, 1], np.ones((2, 15)), GOOD, ValueError, r"`vectors` of shape \(b, 16\), as the index has dim=16, got .*2, 15"),
    ([0, 1], np.ones(16), GOOD, ValueError, r"`vectors` of shape \(b, 16\)"),
    ([0, 1], np.ones((3, 16)), GOOD, ValueError, "a vector for each of 2 positions, got 3"),
    ([0, 1], [[1.0] * 16, [np.nan] * 16], GOOD, ValueError, "vectors of position 1 are not finite as float32. Find"),
    ([0, 9], np.full((2, 16), 1e39), GOOD, ValueError, "vectors of positions 0, 9 are not finite as float32. Find"),
    ([0, 0], np.ones((2, 16)), GOOD, ValueError, "The batch holds position 0 twice, and every"),
    ([0, -1], np.ones((2, 16)), GOOD, ValueError, "Positions in a dataset are not negative, got -1"),
    ([0.0, 1.0], np.ones((2, 16)), GOOD, ValueError, r"must be integers of shape \(b,\), got float64"),
    ([[0, 1]], np.ones((2, 16)), GOOD, ValueError, r"must be integers of shape \(b,\), got int64 of shape \(1, 2\)"),
    ([0, 1], np.ones((2, 16)), None, ValueError, r"Expected the metadata columns \['clean', 'label', .*, got \[\]"),
    ([0, 1], np.ones((2, 16)), GOOD | {"more": [1, 2]}, ValueError, "Expected the metadata columns .*'more'"),
    ([0, 1], np.ones((2, 16)), GOOD | {"label": [1]}, ValueError, "Expected 2 values of .*'label', got 1"),
    (
        [0, 1],
        np.ones((2, 16)),
        GOOD | {"label": [1, 2.0]},
        TypeError,
        "'label' holds int of 64 bits, got 2.0: convert it",
    ),
    ([0, 1], np.ones((2, 16)), GOOD | {"label": [1, True]}, TypeError, "'label' holds int of 64 bits, got True"),
    ([0, 1], np.ones((2, 16)), GOOD | {"label": [1, 2**63]}, TypeError, "int of 64 bits, got 92233720368547758"),
    ([0, 1], np.ones((2, 16)), GOOD | {"text": ["a", None]}, TypeError, "'text' holds str, got None: .* such as ''"),
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
    with pytest.raises(ValueError, match=r"already holds positions 2, 3, 4, 5, 6 and 3 more, .* Leave them"):
        index.add(np.arange(2, 12), np.ones((10, 16)))
    assert len(index) == 10
    with pytest.raises(
        ValueError, match=r"The stream holds position 3 twice, and every .* positions in the whole dataset"
    ):
        index.build([([3, 11], np.ones((2, 16))), ([3], np.ones((1, 16)))], show_progress=False)


@pytest.mark.parametrize("batch", [([0],), "ab" * 5, {"positions": [0]}])
def test_batches_of_another_form_are_refused(make, batch):
    with pytest.raises(ValueError, match=r"Expected batches of \(positions, vectors\) or"):
        make(columns={}).build([batch], show_progress=False)


def test_bad_queries_and_sizes_are_refused(make):
    index = make()
    with pytest.raises(ValueError, match=r"`queries` of shape \(b, 16\), .* another projection"):
        index.search(np.ones((2, 8)))
    with pytest.raises(ValueError, match=r"`queries` of shape \(b, 16\)"):
        index.search(np.ones(16))
    with pytest.raises(ValueError, match="Query 1 is not finite"):
        index.search([[1.0] * 16, [np.inf] * 16])
    for count in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"`k` must be an integer of at least 1, got {count!r}"):
            index.search(queries(), count)
        with pytest.raises(ValueError, match=f"`dim` must be an integer of at least 1, got {count!r}"):
            make(dim=count)
    with pytest.raises(ValueError, match="`rows_per_commit` must be an integer of at least 1, got 0"):
        index.build([], rows_per_commit=0)


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
    positions = PositionSet()
    rng = np.random.default_rng(0)
    members = rng.integers(0, 10**6, 500)
    positions.add(members)
    positions.add(np.empty(0, np.int64))
    candidates = np.concatenate([members, rng.integers(0, 10**6, 500), [2**62]])
    assert positions.holds(candidates).tolist() == np.isin(candidates, members).tolist()
    assert positions.holds(np.empty(0, np.int64)).tolist() == []
