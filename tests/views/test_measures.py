"""What a positive score does to a measure stands in every view, by name and direction."""

import importlib.util

import pytest
import torch

from stride_lightning import Attribution
from stride_lightning.data.examples import Examples
from stride_lightning.evaluation.evaluate import evaluate
from stride_lightning.results.evaluation import caption
from stride_lightning.retraining.effects import FurtherTraining
from stride_lightning.retraining.ground_truth import Counterfactual, GroundTruth
from stride_lightning.views.evaluation import plot_evaluation
from stride_lightning.views.loggers import example_table, markdown_table, summarize, tag_of

MARGIN = {"name": "margin", "direction": "raises"}
LOSS = {"name": "loss", "direction": "lowers"}
GENERATOR = torch.Generator().manual_seed(0)
MASKS = torch.rand(30, 12, generator=GENERATOR) < 0.5
SCORES = torch.randn(3, 12, generator=GENERATOR)


def attribution(measure=MARGIN):
    return Attribution(SCORES, metadata={"method": "ekfac"} | ({} if measure is None else {"measure": measure}))


def truth(measure=MARGIN):
    values = -(MASKS.float() @ SCORES.T)[None]
    return GroundTruth(MASKS, values, [0], {} if measure is None else {"measure": measure})


def test_repr_and_top():
    assert "raises margin" in repr(attribution())
    assert str(attribution().top(2)).endswith("positive: raises margin")
    assert "raises" not in repr(attribution(LOSS)) + str(attribution(LOSS).top(2))
    assert "raises margin" in repr(truth())
    assert truth().values.equal(-truth().losses)
    assert truth(LOSS).values.equal(truth(LOSS).losses)


def test_tables_and_dashboards():
    assert "Positive scores: training on the example raises margin." in markdown_table(attribution(), [0], 1)
    assert "score (raises margin)" in example_table(attribution(), [0], 1)[0]
    assert tag_of(attribution()) == "ekfac-raises-margin"
    assert all(name.startswith("ekfac-raises-margin/") for name in summarize(attribution(), 1))
    assert tag_of(attribution(LOSS)) == "ekfac"
    assert example_table(attribution(LOSS), [0], 1) == example_table(attribution(None), [0], 1)


def test_a_table_of_pandas_has_a_column():
    pytest.importorskip("pandas")
    assert set(attribution().to_dataframe()["measure"]) == {"raises margin"}
    assert "measure" not in attribution(LOSS).to_dataframe()


def test_report(tmp_path):
    text = attribution().report(tmp_path / "report.html").read_text()
    assert "Positive scores are helpful: training on the example raises margin." in text
    assert "Training on them lowers margin." in text
    assert "loss" not in text.split("<script")[0].split("</style>")[1]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="figures need matplotlib")
def test_figures():
    (axes,) = (axes for axes in attribution().plot(0).axes if axes.get_xlabel())
    assert "raises margin" in axes.get_xlabel()
    images = [(torch.rand(8, 8, generator=GENERATOR), 0) for _ in range(12)]
    shown = attribution()
    shown.queries = shown.train_data = Examples(images)
    headings = [panel.get_suptitle() for panel in shown.plot(0).subfigs]
    assert headings == ["Query", "Proponents (raise margin)", "Opponents (lower margin)"]


def counterfactual():
    order = SCORES.argsort(1, descending=True)
    masks = torch.cat([torch.ones(1, 12), torch.ones(3, 12).scatter(1, order[:, :1], 0)]).bool()
    return Counterfactual(masks, torch.rand(1, 4, 3, generator=GENERATOR), [0], {"measure": MARGIN}, ks=[1])


def test_evaluation():
    evaluation = evaluate({"a": attribution()}, truth(), counterfactuals={"a": counterfactual()})
    assert evaluation["a"].lds > 0.99  # positive scores raise the measure, and the truth holds minus the measure
    assert caption(evaluation).startswith("LDS of 3 queries (raises margin) over")
    assert "mean fall of margin" in caption(evaluation)
    assert "fall of margin" in repr(counterfactual())
    if importlib.util.find_spec("matplotlib"):
        assert "mean fall of margin" in {axes.get_ylabel() for axes in plot_evaluation(evaluation).axes}


@pytest.mark.parametrize(("of_scores", "of_truth"), [(LOSS, MARGIN), (MARGIN, LOSS), (MARGIN, None)])
def test_a_pair_of_other_measures_is_refused(of_scores, of_truth):
    words = {"margin": "raises margin", "loss": "lowers loss"}
    given, measured = words[of_scores["name"]], words["loss" if of_truth is None else of_truth["name"]]
    message = f"'a' explains what {given}, but the ground truth measures what {measured}. Make both with"
    with pytest.raises(ValueError, match=message):
        evaluate({"a": attribution(of_scores)}, truth(of_truth))


def test_scores_that_do_not_say_what_they_explain_are_taken():
    assert evaluate({"a": attribution(None)}, truth())["a"].lds > 0.99


def test_a_counterfactual_of_another_measure_is_refused():
    with pytest.raises(ValueError, match="The counterfactual of 'a' explains what raises margin, but"):
        evaluate({"a": attribution(LOSS)}, truth(LOSS), counterfactuals={"a": counterfactual()})


def test_truths_of_earlier_versions():
    old = GroundTruth(MASKS, truth().losses_by_seed, [0], {"measure": "margin"})
    assert old.measure == MARGIN
    assert GroundTruth(MASKS, truth().losses_by_seed, [0], {"measure": "loss"}).measure == LOSS


def test_effects_of_further_training_carry_it():
    effects = FurtherTraining(torch.rand(1, 1, 2, 3), torch.tensor([0, 1]), [1], [0], {"measure": MARGIN})
    assert effects.attribution().measure == MARGIN
