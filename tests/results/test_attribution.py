"""Attribution: what can be done with scores."""

import json

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from stride_lightning import Attribution, RecordError, TopExamples, attribute
from stride_lightning.storage.records import find_records, write_record
from tests.helpers.models import Classifier, build, classification_data

SCORES = torch.tensor([[0.5, -0.25, 0.0, 1.0], [0.0, 0.0, -3.0, 0.0]])


def example(**changes):
    fields = {
        "scores": SCORES.clone(),
        "std": SCORES.abs() + 0.1,
        "train_indices": torch.tensor([10, 20, 30, 40]),
        "train_targets": torch.tensor([0, 1, 0, 2]),
        "query_targets": torch.tensor([1, 2]),
        "metadata": {"method": "stride", "seconds": {"total": 1.25}, "step": 7},
        "train_info": {"source": ["web", "book", "web", "news"]},
        "query_info": {"name": ["first", "second"]},
    }
    return Attribution(**(fields | changes))


def test_top_names_positions_in_the_data_set_with_standard_deviations():
    top, columns = example().top(2), example().top_columns(2)
    assert top.proponents.tolist() == [[40, 10], [10, 20]]
    assert top.proponent_scores.tolist() == [[1.0, 0.5], [0.0, 0.0]]
    assert top.opponents.tolist() == [[20, 30], [30, 10]]
    assert top.opponent_scores.tolist() == [[-0.25, 0.0], [-3.0, 0.0]]
    assert columns.proponents.tolist() == [[3, 0], [0, 1]]
    assert columns.renamed(example().train_indices).opponents.equal(top.opponents)
    assert top.proponent_stds.equal(example().std.gather(1, columns.proponents))
    assert top.opponent_stds.equal(example().std.gather(1, columns.opponents))
    assert example(std=None).top(2).proponent_stds is None
    assert (example().has_std, example(std=None).has_std) == (True, False)


def test_top_is_ten_by_default_and_no_more_than_there_are():
    assert Attribution(torch.randn(2, 30)).top().proponents.shape == (2, 10)
    assert example().top().proponents.shape == example().top(9).proponents.shape == (2, 4)
    with pytest.raises(ValueError, match="`k` must be an integer of at least 1, got 0"):
        example().top(0)


def test_scores_and_their_top_read_well():
    text = repr(example())
    assert "stride: 2 queries x 4 training examples" in text
    assert "with uncalibrated std of each score, 1.2 s" in text
    assert repr(Attribution(torch.ones(1, 1))) == "Attribution(scores: 1 queries x 1 training examples, sum 1)"
    assert "0 queries" in repr(Attribution(torch.empty(0, 3)))
    assert repr(example().top(2)) == (
        "query 0: helped by 40 (+1), 10 (+0.5)\n"
        "         harmed by 20 (-0.25)\n"
        "query 1: helped by nothing\n"
        "         harmed by 30 (-3)"
    )
    assert repr(Attribution(torch.randn(13, 4)).top(1)).endswith("... and 3 more queries")
    assert isinstance(example().top(1), TopExamples)


def test_one_query():
    one = example()[1]
    assert one.scores.tolist() == [SCORES[1].tolist()]
    assert one.std.shape == (1, 4)
    assert (one.query_targets.tolist(), one.query_info) == ([2], {"name": ["second"]})
    assert one.train_indices.tolist() == [10, 20, 30, 40]
    assert example()[-1].scores.equal(one.scores)
    assert len(example()) == 2
    assert [len(query) for query in example()] == [1, 1]
    for beyond in (2, -3):
        with pytest.raises(IndexError, match="There is no query"):
            example()[beyond]


def test_sum_by():
    names, sums = example().sum_by("source")
    assert names == ["web", "book", "news"]
    assert sums.tolist() == [[0.5, -0.25, 1.0], [-3.0, 0.0, 0.0]]
    names, sums = example().sum_by("target")
    assert (names, sums.shape) == ([0, 1, 2], (2, 3))
    assert example().sum_by(torch.tensor([1, 1, 1, 1]))[1].tolist() == [[1.25], [-3.0]]
    with pytest.raises(KeyError, match=r"'author'.*'target'.*source"):
        example().sum_by("author")
    with pytest.raises(ValueError, match="each of 4 training examples, got 2"):
        example().sum_by(["a", "b"])


def test_to_dataframe():
    frame = example().to_dataframe()
    assert list(frame) == ["query", "train_index", "score", "uncalibrated_std", "target", "source", "query_name"]
    assert len(frame) == 8
    row = frame[(frame["query"] == 1) & (frame["train_index"] == 30)].iloc[0]
    assert (row.score, row.target, row.source, row.query_name) == (-3.0, 0, "web", "second")
    assert row["uncalibrated_std"] == pytest.approx(3.1)
    ends = example().to_dataframe(k=1)
    assert ends[["query", "train_index"]].values.tolist()[:2] == [[0, 40], [0, 20]]
    assert len(ends) == 4
    assert isinstance(frame, pd.DataFrame)
    with pytest.raises(ValueError, match="`k` must be an integer of at least 1"):
        example().to_dataframe(k=0)


def test_save_and_load(tmp_path):
    path = example().save(tmp_path / "scores")
    assert path == tmp_path / "scores"
    loaded = Attribution.load(path)
    for name in ("scores", "std", "train_indices", "train_targets", "query_targets"):
        assert getattr(loaded, name).equal(getattr(example(), name))
    for name in ("metadata", "train_info", "query_info"):
        assert getattr(loaded, name) == getattr(example(), name)
    assert sorted(p.suffix for p in path.iterdir()) == ["", ".json", ".safetensors"]


def test_saved_under_a_name_with_an_umlaut(tmp_path):
    attribution = Attribution(torch.eye(3))
    attribution.save(tmp_path / "ä")
    assert torch.equal(Attribution.load(tmp_path / "ä").scores, attribution.scores)


def test_save_without_the_optional_never_overwrites(tmp_path):
    loaded = Attribution.load(Attribution(SCORES).save(str(tmp_path / "deep" / "scores")))
    assert (loaded.std, loaded.train_targets, loaded.train_indices.tolist()) == (None, None, [0, 1, 2, 3])
    paths = [Attribution(SCORES * k).save(tmp_path / "scores") for k in range(3)]
    assert [path.name for path in paths] == ["scores", "scores-v1", "scores-v2"]
    assert [Attribution.load(path).scores[0, 3].item() for path in paths] == [0, 1, 2]
    assert find_records(tmp_path) == paths


def test_damage_other_records_and_values_that_cannot_be_saved_are_refused(tmp_path):
    path = example().save(tmp_path / "scores")
    (path / "attribution.safetensors").write_bytes(b"damaged")
    with pytest.raises(RecordError, match=r"attribution\.safetensors"):
        Attribution.load(path)
    with pytest.raises(FileNotFoundError):
        Attribution.load(tmp_path / "nowhere")
    with pytest.raises(RecordError, match="'stride' record, not a saved attribution"):
        Attribution.load(write_record(tmp_path, "step=1", {"kind": "stride"}, {}))
    with pytest.raises(TypeError, match="object, not plain JSON"):
        example(train_info={"source": [object()] * 4}).save(tmp_path / "odd" / "scores")
    assert not list(tmp_path.glob("odd/*"))


def test_what_attribute_gives_can_be_saved_and_shown_again(tmp_path):
    data, queries, model = classification_data(), classification_data(4, seed=1), build(Classifier)
    options = {"train_indices": range(0, 60, 3), "num_subsets": 8, "show_progress": False}
    attribution = attribute(model, queries, train_data=data, **options)
    attribution.train_info["id"] = [f"example {i}" for i in attribution.train_indices.tolist()]
    path = attribution.save(tmp_path / "scores")
    loaded = Attribution.load(path, train_data=data, queries=queries)
    assert loaded.scores.equal(attribution.scores)
    assert loaded.metadata == json.loads(json.dumps(attribution.metadata))
    assert loaded.train_data[1][0].equal(data[3][0])
    assert loaded[2].queries[0][0].equal(queries[2][0])
    assert set(loaded.to_dataframe(k=2)["id"]) <= set(attribution.train_info["id"])
    halves = [DataLoader(Subset(data, part)) for part in (range(30), range(30, 60))]  # several loaders, to look at
    assert Attribution.load(path, train_data=halves).train_data[1][0].equal(data[3][0])
    with pytest.raises(ValueError, match="3 examples, but the attribution has 4 queries"):
        Attribution.load(path, queries=Subset(queries, range(3)))
    with pytest.raises(ValueError, match=r"positions in 0\.\.9"):
        Attribution.load(path, train_data=Subset(data, range(10)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(4)}, r"\(num_queries, num_train\), got \(4,\)"),
        ({"std": torch.zeros(2, 3)}, r"`std` must have the shape of the scores, got \(2, 3\)"),
        ({"train_indices": torch.arange(3)}, "`train_indices` has 3 entries, expected 4"),
        ({"train_targets": torch.arange(5)}, "`train_targets` has 5 entries, expected 4"),
        ({"query_targets": torch.arange(4)}, "`query_targets` has 4 entries, expected 2"),
        ({"train_info": {"source": ["a"]}}, r"train_info\['source'\] has 1 values, expected 4"),
        ({"query_info": {"name": ["a"]}}, r"query_info\['name'\] has 1 values, expected 2"),
    ],
)
def test_shapes_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        example(**changes)


def test_the_spread_of_scores_is_not_called_a_standard_deviation():
    """That word stands with "uncalibrated", for the uncertainty of each score."""
    plain = Attribution(torch.tensor([[0.5, -0.25, 1.0]]))
    assert "std" not in repr(plain)
    assert repr(Attribution(plain.scores, plain.scores.abs())).count("std") == repr(plain).count("std") + 1
