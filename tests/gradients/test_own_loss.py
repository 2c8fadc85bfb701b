"""Losses of modules' own, of every kind, against gradients that were taken one example after the other."""

import pytest
from torch.utils.data import Subset

from stride_lightning.gradients import planned
from tests.helpers.gradient_models import close_scores
from tests.helpers.own_losses import ask, brute_force, built
from tests.helpers.own_means import MEANS, Absolute, InEval, Mixed, MixedTargets, SkipsBad, TiedMixed
from tests.helpers.own_shapes import SHAPES, TiedFunction
from tests.helpers.own_weighted import WEIGHTED, ClassWeights, Dropping, Ignored, Texts, TiedIgnored, TiedWeights
from tests.helpers.tiny import permutation

every_kind = pytest.mark.parametrize("cls", [*MEANS, *SHAPES, *WEIGHTED], ids=lambda cls: cls.__name__)
some_kinds = pytest.mark.parametrize("cls", [Absolute, ClassWeights, Ignored, Texts], ids=lambda cls: cls.__name__)


@every_kind
def test_scores_are_those_of_brute_force(cls):
    model, train, queries = built(cls), cls.data(13, 0), cls.data(5, 1)
    expected = brute_force(model, train, queries)
    for batch_size in (1, 7, 64):
        close_scores(ask(model, train, queries, batch_size=batch_size).scores, expected)


@some_kinds
def test_more_examples_than_are_looked_at_first(cls):
    model, train, queries = built(cls), cls.data(70, 0), cls.data(5, 1)
    close_scores(ask(model, train, queries, batch_size=32).scores, brute_force(model, train, queries))


@some_kinds
def test_the_order_of_the_data_changes_nothing(cls):
    model, train, queries, order = built(cls), cls.data(13, 0), cls.data(5, 1), permutation(13)
    scores = ask(model, Subset(train, order.tolist()), queries, batch_size=5).scores
    close_scores(scores, brute_force(model, train, queries)[:, order])


@some_kinds
def test_some_positions_only(cls):
    """Weights are scaled to a mean of 1 over the training set alone."""
    model, train, queries, places = built(cls), cls.data(13, 0), cls.data(5, 1), [11, 2, 3, 7, 8]
    attribution = ask(model, train, queries, train_indices=places)
    assert attribution.train_indices.tolist() == places
    close_scores(attribution.scores, brute_force(model, Subset(train, places), queries))


@some_kinds
def test_the_top_is_that_of_all_scores_for_tiles_that_cut_batches(cls, monkeypatch):
    monkeypatch.setattr(planned, "TILE_BYTES", 4 * 5 * 4)  # four of 13 training examples at a time, in batches of 3
    model, train, queries = built(cls), cls.data(13, 0), cls.data(5, 1)
    expected = brute_force(model, train, queries)
    top = ask(model, train, queries, top_k=13, batch_size=3).top(13)
    close_scores(top.proponent_scores, expected.sort(descending=True).values)
    close_scores(top.proponent_scores, expected.gather(1, top.proponents))


@pytest.mark.parametrize("cls", [Mixed, MixedTargets, TiedMixed], ids=lambda cls: cls.__name__)
def test_eval_mode_where_training_mixes_examples(cls):
    model, data = built(cls), cls.data(13, 0)
    assert "taken in eval mode, because training mixes" in ask(model, data, data).metadata["loss"]


def test_terms_of_training_are_taken_where_nothing_mixes():
    model, data = built(InEval), InEval.data(13, 0)
    assert "eval mode" not in ask(model, data, data).metadata["loss"]


@pytest.mark.parametrize("method", ["grad-dot", "ekfac", "trak", "influence-cg", "influence-lissa", "information-loss"])
def test_examples_that_a_step_skips(method, capsys):
    """They have no loss alone, and take none from the others of their batch."""
    model, train, queries = built(SkipsBad), SkipsBad.data(34, 0), SkipsBad.data(4, 1)
    options = {"grad-dot": {}, "influence-lissa": {"damping": 50.0, "depth": 4}, "information-loss": {"ridge": 0.1}}
    options = options.get(method, {"damping": 0.3})
    attributions = [
        ask(model, train, queries, method, batch_size=size, show_progress=size == 64, **options) for size in (7, 64)
    ]
    assert "training_step skips 6 training examples and 1 queries" in "".join(capsys.readouterr())
    for attribution in attributions:
        assert attribution.metadata["skipped"] == {"train": 6, "queries": 1}
        assert not attribution.scores[:, 2::6].any()
        assert not attribution.scores[2].any()
        close_scores(attribution.scores, attributions[0].scores, 1e-3)


@every_kind
def test_rows_are_read_together_where_modules_see_how_weights_are_used(cls):
    model, data = built(cls), cls.data(13, 0)
    is_single = "read one example at a time" in ask(model, data, data).metadata["loss"]
    assert is_single is (cls in (TiedFunction, TiedMixed, TiedWeights, TiedIgnored, Dropping))


@pytest.mark.parametrize("method", ["grad-dot", "ekfac", "trak", "influence-cg", "information-loss"])
def test_an_example_without_weight_that_has_no_loss_alone(method):
    """Its loss alone is NaN; beside others it changes nothing."""
    model, train, queries = built(TiedIgnored), TiedIgnored.data(13, 0), TiedIgnored.data(5, 1)
    options = {"grad-dot": {}, "information-loss": {"ridge": 0.1}}.get(method, {"damping": 0.3})
    attribution = ask(model, train, queries, method, **options)
    without = [train.tensors[1] < 0, queries.tensors[1] < 0]
    assert [int(each.sum()) for each in without] == [4, 2]
    assert not attribution.scores[:, without[0]].any()
    assert not attribution.scores[without[1]].any()
    assert attribution.scores[~without[1]][:, ~without[0]].all()
    assert "skipped" not in attribution.metadata


@pytest.mark.parametrize("method", ["ekfac", "trak", "datainf"])
def test_padding_changes_no_curvature(method):
    model, train, queries = built(Texts), Texts.data(13, 0), Texts.data(5, 1)
    scores = [ask(model, train, queries, method, batch_size=size, damping=0.3).scores for size in (1, 7, 64)]
    for other in scores[1:]:
        close_scores(other, scores[0])
