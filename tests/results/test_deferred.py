"""Standard deviations that a function computes: nobody pays for what is not looked at, and nothing is lost."""

import copy
import gc
import pickle
import weakref
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import TensorDataset

from stride_lightning import Attribution, TopAttribution
from stride_lightning.data.examples import Examples
from stride_lightning.results.top_examples import joined
from stride_lightning.views.loggers import example_table, markdown_table, summarize
from stride_lightning.views.ranking import rank_examples
from tests.helpers.loggers import WandbLike

SCORES = torch.tensor([[0.5, -0.25, 0.0, 1.0], [0.0, 2.0, -3.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
CALLS: list[str] = []


@dataclass(frozen=True, eq=False)
class Tenths:
    """A tenth of every score, and a note of every call."""

    scores: Tensor

    def __call__(self) -> Tensor:
        CALLS.append("called")
        return self.scores.abs() / 10


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


def deferred(**changes):
    return Attribution(SCORES.clone(), Tenths(SCORES), train_indices=torch.arange(10, 14), **changes)


def known(**changes):
    return Attribution(SCORES.clone(), SCORES.abs() / 10, train_indices=torch.arange(10, 14), **changes)


def test_the_function_runs_once_on_first_use_and_is_dropped():
    function = Tenths(SCORES)
    attribution, gone = Attribution(SCORES, function), weakref.ref(function)
    del function
    assert (attribution.has_std, CALLS) == (True, [])
    assert gone() is not None
    assert attribution.std.equal(SCORES.abs() / 10)
    assert attribution.std is attribution.std
    assert CALLS == ["called"]
    gc.collect()
    assert gone() is None


def pictures(**changes):
    images = Examples(TensorDataset(torch.rand(4, 1, 8, 8)))
    return deferred(queries=images.subset([0, 1, 2]), train_data=images, **changes)


SHOWS_NONE = {
    "repr": repr,
    "length": len,
    "one query": lambda attribution: attribution[1],
    "all queries": list,
    "top": lambda attribution: repr(attribution.top(2)),
    "columns of the top": lambda attribution: attribution.top_columns(2).first(1).renamed(torch.arange(4)).proponents,
    "only the top": lambda attribution: TopAttribution(attribution.top_columns(2), 4)[0].top(1).opponent_scores,
    "sums": lambda attribution: attribution.sum_by(list("abab")),
    "ranking": lambda attribution: rank_examples(attribution, 1, 2, with_std=False),
    "copies": lambda attribution: (copy.copy(attribution), copy.deepcopy(attribution)),
    "pickling": lambda attribution: pickle.loads(pickle.dumps(attribution)),
    "presence": lambda attribution: attribution.has_std and TopAttribution(attribution.top_columns(2), 4).has_std,
}


@pytest.mark.parametrize("name", SHOWS_NONE)
def test_what_shows_no_standard_deviation_computes_none(name):
    SHOWS_NONE[name](deferred())
    assert CALLS == []


def test_pictures_show_none_and_bars_do():
    pytest.importorskip("matplotlib")
    pictures().plot([0, 1], k=2)
    assert CALLS == []
    deferred().plot([0, 1], k=2)
    assert CALLS == ["called"]


def read_report(attribution, folder):
    return attribution.report(folder / "page").read_text("utf-8")


SHOWS = {
    "std": lambda attribution, _: attribution.std.tolist(),
    "stds of the top": lambda attribution, _: attribution.top(2).first(1).opponent_stds.tolist(),
    "distributions": lambda attribution, _: attribution.distributions["std"].tolist(),
    "pairs": lambda attribution, _: [values.tolist() for values in attribution.pairs(1)],
    "table": lambda attribution, _: attribution.to_dataframe(2).values.tolist(),
    "ranking": lambda attribution, _: [rank_examples(attribution, query, 2) for query in range(3)],
    "Markdown": lambda attribution, _: markdown_table(attribution, range(3), 2),
    "rows": lambda attribution, _: example_table(attribution, range(3), 2),
    "scalars": lambda attribution, _: summarize(attribution, 1),
    "loggers": lambda attribution, folder: attribution.log([CSVLogger(folder), WandbLike()], step=1),
    "report": read_report,
}


@pytest.mark.parametrize("name", SHOWS)
def test_what_shows_some_computes_them_once_for_all_queries_and_shows_what_a_tensor_shows(name, tmp_path):
    expected = SHOWS[name](known(), tmp_path)
    assert CALLS == []
    assert SHOWS[name](deferred(), tmp_path) == expected
    assert CALLS == ["called"]


@pytest.mark.parametrize("first", ["whole", "part"])
def test_queries_share_the_computation_with_the_whole_in_either_order(first):
    attribution = deferred()
    last = attribution[2][0]
    if first == "whole":
        assert attribution.std.shape == (3, 4)
    for row, one in enumerate(attribution):
        assert one.has_std
        assert one.std.equal(SCORES[row : row + 1].abs() / 10)
    assert last.std.equal(SCORES[2:].abs() / 10)
    assert attribution.std.equal(SCORES.abs() / 10)
    assert CALLS == ["called"]


def test_copies_and_pickles_hold_the_function_or_the_tensor():
    attribution = deferred()
    unread = [copy.copy(attribution), copy.deepcopy(attribution), pickle.loads(pickle.dumps(attribution[0]))]
    assert [one.std[0].equal(SCORES[0].abs() / 10) for one in unread] == [True] * 3
    assert attribution.std.shape == SCORES.shape
    assert len(CALLS) == 3  # a shallow copy shares the computation
    read = [copy.copy(attribution), copy.deepcopy(attribution), pickle.loads(pickle.dumps(attribution[0]))]
    assert [one.std[0].equal(SCORES[0].abs() / 10) for one in read] == [True] * 3
    assert len(CALLS) == 3


def test_saving_computes_what_the_file_holds(tmp_path):
    attribution = deferred()
    path = attribution.save(tmp_path / "scores")
    assert Attribution.load(path).std.equal(SCORES.abs() / 10)
    assert attribution.std.equal(SCORES.abs() / 10)
    assert CALLS == ["called"]


def test_only_the_top_of_deferred_ones(tmp_path):
    expected, top = known().top_columns(3), TopAttribution(deferred().top_columns(3), 4)
    assert top.has_std
    assert CALLS == []
    assert top[1].top(2).proponent_stds.equal(expected.proponent_stds[1:2, :2])
    loaded = Attribution.load(top.save(tmp_path / "top"))
    assert loaded.examples.opponent_stds.equal(expected.opponent_stds)
    assert CALLS == ["called"]
    together = joined([deferred()[row].top_columns(3) for row in range(3)])
    assert together.proponent_stds.equal(expected.proponent_stds)


def test_it_can_be_set_afterwards():
    attribution = known()
    for value in (Tenths(SCORES), SCORES.abs() / 10):
        attribution.std = value
        assert attribution.std.equal(SCORES.abs() / 10)
    attribution.std = None
    assert not attribution.has_std
    assert attribution.std is None


@pytest.mark.parametrize(
    ("returned", "given"), [(torch.zeros(3, 3), r"\(3, 3\)"), (None, "NoneType")], ids=["shape", "nothing"]
)
def test_what_the_function_returns_is_checked(returned, given):
    attribution = Attribution(SCORES, lambda: returned)
    for read in (lambda: attribution.std, lambda: attribution[0].std, lambda: attribution.top(1).proponent_stds):
        with pytest.raises(ValueError, match=rf"given as `std` must return a tensor .*\(3, 4\); it returned {given}"):
            read()
