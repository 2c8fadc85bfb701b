"""Whose answer: queries on which a readout disagrees with the model are counted and marked."""

import torch

from stride_lightning import Attribution, TopAttribution
from stride_lightning.results.agreement import EXPLANATION
from stride_lightning.results.top_examples import joined

SCORES = torch.tensor([[0.5, -0.25], [1.0, -2.0], [-1.0, 0.0]])
INFO = {
    "id": [0.123456, 1.0, 2.0],
    "loss": [0.123456, 2.0, 3.0],
    "readout loss": [0.1, 2.5, 3.0],
    "prediction": [3, 4, 5],
    "readout prediction": [3, 5, 5],
    "readout agrees": [True, False, True],
}


def make_both(**changes):
    described = {"metadata": {"method": "stride"}, "query_info": INFO} | changes
    whole = Attribution(SCORES, **described)
    return whole, TopAttribution(whole.top_columns(1), 2, **described)


def test_repr_counts_agreement():
    for attribution in make_both():
        assert ", readout agrees with the model on 2 of 3 queries)" in repr(attribution)
    for attribution in make_both(query_info={}, metadata={"agreement": {"agree": 2, "queries": 3}}):
        assert "readout" not in repr(attribution)  # the metadata say what was, the columns what is


def test_parts_count_their_own_queries_also_when_loaded(tmp_path):
    for number, attribution in enumerate(make_both()):
        loaded = Attribution.load(attribution.save(tmp_path / str(number)))
        for same in (attribution, loaded):
            for one, agree in zip(same, (1, 0, 1), strict=True):
                assert f"readout agrees with the model on {agree} of 1 queries" in repr(one)
            assert same[1].query_info["readout prediction"] == [5]
            assert (same.disagreeing, same[0].disagreeing, same[1].disagreeing) == ((1,), (), (0,))
            assert [same.disagrees(row) for row in (0, 1, 2, -2)] == [False, True, False, True]


def test_top_marks_queries_and_explains_the_mark_once():
    for attribution in make_both():
        assert repr(attribution.top(1)) == (
            "query 0: helped by 0 (+0.5)\n"
            "         harmed by 1 (-0.25)\n"
            "query 1 !: helped by 0 (+1)\n"
            "           harmed by 1 (-2)\n"
            "query 2: helped by nothing\n"
            "         harmed by 0 (-1)\n"
            "! the readout disagrees with the model on this query: its scores explain another prediction"
        )
        assert EXPLANATION not in repr(attribution[0].top(1))
        assert EXPLANATION in repr(attribution[1].top(1).first(1))
    unsigned = make_both(metadata={"unit": "nats, unsigned"})[0]
    assert "query 1 !: most told by" in repr(unsigned.top(1))


def test_the_mark_is_explained_only_where_it_is_shown():
    info = {"readout agrees": [True] * 12 + [False]}
    assert "!" not in repr(Attribution(torch.randn(13, 4), query_info=info).top(1))
    assert repr(Attribution(torch.randn(13, 4), query_info={"readout agrees": [False] * 13}).top(1)).count("!") == 11


def test_queries_joined_keep_their_marks():
    whole = make_both()[0]
    parts = [attribution.top(1) for attribution in (whole, whole[0], whole[1])]
    assert joined(parts).disagreeing == (1, 4)


def test_without_a_readout_nothing_is_marked():
    for attribution in make_both(query_info={"loss": [0.5, 1.0, 2.0], "prediction": [3, 4, 5]}):
        assert (attribution.disagreeing, attribution.disagrees(1)) == ((), False)
        assert "readout" not in repr(attribution)
        assert "!" not in repr(attribution.top(1))


def test_the_table_has_a_column_of_it():
    frame = make_both()[0].to_dataframe()
    assert frame[~frame["query_readout agrees"]]["query"].tolist() == [1, 1]
    assert frame["query_loss"].tolist() == [value for value in INFO["loss"] for _ in range(2)]  # all digits
