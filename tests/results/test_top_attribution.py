"""Only the top is held: it shows what all scores show, and what needs all scores says so."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import TensorDataset

from stride_lightning import Attribution, RecordError, TopAttribution, TopExamples, evaluate, retrain_without
from stride_lightning.data.examples import Examples
from stride_lightning.retraining.ground_truth import GroundTruth
from stride_lightning.views.loggers import example_table, markdown_table, summarize
from stride_lightning.views.ranking import rank_examples
from tests.helpers.loggers import read_events
from tests.helpers.models import Classifier, classification_data
from tests.results.test_top_examples import assert_same, collect, random

SCORES = random(3, 12)
DESCRIBED = {
    "train_indices": torch.arange(100, 112),
    "train_targets": torch.arange(12) % 3,
    "query_targets": torch.tensor([2, 0, 1]),
    "metadata": {"method": "tracin", "seconds": {"total": 1.25}, "step": 7},
    "train_info": {"source": [f"page {i}" for i in range(12)]},
    "query_info": {"name": ["a", "b", "c"]},
}


def both(k=4, **changes):
    described = DESCRIBED | changes
    return Attribution(SCORES, **described), TopAttribution(collect(SCORES, k).compute(), 12, **described)


def test_top():
    whole, top = both()
    assert repr(top) == "TopAttribution(tracin: 3 queries, top 4 of 12 training examples, 1.2 s)"
    for k in (1, 3, 4):
        assert_same(top.top(k), whole.top(k))
        assert_same(top.top_columns(k), whole.top_columns(k))
    assert_same(top.top(), whole.top(4))  # by default what is held
    assert (len(top), top.num_queries, top.num_train, top.num_ranked) == (3, 3, 12, 4)
    with pytest.raises(ValueError, match=r"`k` is 5, but the attribution holds only the 4 strongest.*`top_k=5`"):
        top.top(5)
    with pytest.raises(ValueError, match="`k` must be an integer of at least 1, got 0"):
        top.top(0)
    all_held = TopAttribution(collect(SCORES, 40).compute(), 12)
    assert_same(all_held.top(30), Attribution(SCORES).top(30))


def test_one_query():
    whole, top = both()
    assert_same(top[-1].top(2), whole[-1].top(2))
    assert (top[1].query_info, top[1].query_targets.tolist()) == ({"name": ["b"]}, [0])
    assert isinstance(top[1], TopAttribution)
    assert [len(one) for one in top] == [1, 1, 1]
    with pytest.raises(IndexError, match="There is no query 3: the 3 queries"):
        top[3]
    with pytest.raises(TypeError, match="one at a time, by an integer; got slice"):
        top[:2]


def test_tables_and_views_show_what_they_show_of_all_scores():
    whole, top = both()
    assert top.to_dataframe(3).equals(whole.to_dataframe(3))
    assert top.to_dataframe().equals(whole.to_dataframe(4))
    with pytest.raises(ValueError, match="only the 4 strongest"):
        top.to_dataframe(6)
    with pytest.raises(ValueError, match="`k` must be an integer of at least 1"):
        top.to_dataframe(0)
    assert rank_examples(top, 1, 3) == rank_examples(whole, 1, 3)
    assert rank_examples(top, 1, 50) == rank_examples(whole, 1, 4)  # at most what is held
    for table in (markdown_table, example_table):
        assert table(top, range(3), 2) == table(whole, range(3), 2)
    assert summarize(top, 2) == {"tracin/seconds/total": 1.25}


@pytest.mark.parametrize("scores", [torch.zeros(2, 12), SCORES[:2]], ids=["ties", "few"])
def test_each_pair_stands_once_in_the_table(scores):
    frame = TopAttribution(collect(scores, 8).compute(), 12).to_dataframe()
    assert not frame.duplicated(["query", "train_index"]).any()
    expected = 8 if scores.eq(0).all() else 12
    assert frame.groupby("query").size().tolist() == [expected] * 2
    for row in frame.itertuples():
        assert row.score == scores[row.query, row.train_index].item()


def test_figures():
    pytest.importorskip("matplotlib")
    whole, top = both()

    def texts(figure):
        return [text.get_text() for text in [*figure.texts, *figure.axes[0].texts, *figure.axes[0].get_yticklabels()]]

    assert texts(top.plot([0, 2], k=3)) == texts(whole.plot([0, 2], k=3))
    assert len(texts(top.plot())) > 3
    images = Examples(TensorDataset(torch.rand(12, 1, 8, 8)))
    whole, top = both(queries=images.subset([0, 1, 2]), train_data=images)
    shown = [
        [axes.images[0].get_array().tolist() for axes in attribution.plot(1, k=2).axes] for attribution in (whole, top)
    ]
    assert shown[0] == shown[1]


def test_loggers(tmp_path):
    top = both()[1]
    board, table = TensorBoardLogger(tmp_path), CSVLogger(tmp_path)
    top.log([board, table], k=9)
    tags = read_events(board).Tags()
    assert (tags["histograms"], tags["scalars"]) == ([], ["tracin/seconds/total"])
    assert tags["tensors"] == ["tracin/top_examples/text_summary"]
    assert table.experiment.metrics == [{"tracin/seconds/total": 1.25, "step": 7}]
    both(metadata={})[1].log([TensorBoardLogger(tmp_path), CSVLogger(tmp_path)])  # without any scalar


def test_standard_deviations_are_kept_where_there_are_any(tmp_path):
    whole = Attribution(SCORES, std=SCORES.abs() + 1, **DESCRIBED)
    top = TopAttribution(whole.top_columns(4), 12, **DESCRIBED)
    assert whole.top(4).proponent_stds.equal(whole.std.gather(1, whole.top_columns(4).proponents))
    for attribution in (top, Attribution.load(top.save(tmp_path / "top"))):
        assert attribution.has_std
        assert rank_examples(attribution, 2, 3) == rank_examples(whole, 2, 3)
        assert attribution.to_dataframe(3).equals(whole.to_dataframe(3))
        assert example_table(attribution, range(3), 2) == example_table(whole, range(3), 2)
    assert not both()[1].has_std


def test_save_and_load(tmp_path):
    whole, top = both()
    path = top.save(tmp_path / "top")
    for loaded in (Attribution.load(path), TopAttribution.load(path)):
        assert type(loaded) is TopAttribution
        assert_same(loaded.top(), top.top())
        assert loaded.num_train == 12
        for name in ("train_indices", "train_targets", "query_targets"):
            assert getattr(loaded, name).equal(getattr(top, name))
        for name in ("metadata", "train_info", "query_info"):
            assert getattr(loaded, name) == getattr(top, name)
    assert top.save(tmp_path / "top").name == "top-v1"
    assert type(Attribution.load(whole.save(tmp_path / "whole"))) is Attribution
    with pytest.raises(RecordError, match="'attribution' record, not a saved TopAttribution"):
        TopAttribution.load(tmp_path / "whole")
    data = TensorDataset(torch.arange(200))
    assert Attribution.load(path, train_data=data).train_data[3][0] == 103
    with pytest.raises(ValueError, match="2 examples, but the attribution has 3 queries"):
        Attribution.load(path, queries=TensorDataset(torch.arange(2)))


ALL_NEEDED = r"only the 4 strongest proponents and opponents of each query: see top\(\).*without `top_k=`"


@pytest.mark.parametrize("name", ["scores", "std", "sum_by"])
def test_what_needs_all_scores_says_so(name):
    top = both()[1]
    assert not hasattr(top, name)
    with pytest.raises(AttributeError, match=ALL_NEEDED):
        getattr(top, name)
    with pytest.raises(AttributeError, match=r"'TopAttribution' object has no attribute 'score'$"):
        _ = top.score


def test_retraining_and_evaluation_need_all_scores():
    (whole, top), data = both(), classification_data(12)
    with pytest.raises(ValueError, match=ALL_NEEDED):
        retrain_without(top, Classifier, data, train_data=data, max_epochs=1, ks=2)
    masks = random(30, 12, seed=1) > 0
    truth = GroundTruth(masks, -(masks.float() @ SCORES.T)[None], seeds=[0])
    plain = Attribution(SCORES, metadata=whole.metadata)
    with pytest.raises(ValueError, match=rf"The attribution 'tile by tile' cannot be evaluated\. .*{ALL_NEEDED}"):
        evaluate({"whole": plain, "tile by tile": top}, truth, show_progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_targets": torch.arange(5)}, "`train_targets` has 5 entries, expected 12"),
        ({"query_info": {"name": ["a"]}}, r"query_info\['name'\] has 1 values, expected 3"),
        ({"examples": collect(SCORES, 4).compute().renamed(torch.arange(100, 112))}, r"in 0\.\.11.*got 4 .* in 100"),
        ({"examples": TopExamples(*[torch.zeros(3, 0, dtype=torch.int64)] * 4)}, "from 1 to 12 columns"),
        ({"examples": TopExamples(*[torch.zeros(3, i, dtype=torch.int64) for i in (1, 1, 2, 2)])}, "of one shape"),
    ],
)
def test_shapes_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        TopAttribution(**({"examples": collect(SCORES, 4).compute(), "num_train": 12} | DESCRIBED | changes))
