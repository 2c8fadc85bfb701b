"""Several attributions against one planted ground truth."""

import csv
import io
import math
import sys
import types
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from scipy.stats import spearmanr

from stride_lightning.evaluation.evaluate import evaluate
from stride_lightning.results.attribution import Attribution
from stride_lightning.results.evaluation import Evaluation, EvaluationRow
from stride_lightning.results.texts import score_text
from stride_lightning.retraining.ground_truth import Counterfactual, GroundTruth
from stride_lightning.views.evaluation import markdown_evaluation, scalars_of
from tests.helpers.loggers import WandbLike, read_events
from tests.helpers.processes import run_two, start
from tests.helpers.refusals import assert_refused
from tests.helpers.tiny import permutation, random_tensor

NUM_TRAIN, NUM_QUERIES, NUM_SUBSETS, KS = 30, 12, 60, (1, 5)
WEIGHTS = random_tensor(NUM_QUERIES, NUM_TRAIN, seed=0, dtype=torch.float32)
MASKS = random_tensor(NUM_SUBSETS, NUM_TRAIN, seed=1) > 0
DATA = {"num_examples": NUM_TRAIN, "content": "a" * 64}
QUERY_DATA = {"num_examples": NUM_QUERIES, "content": "b" * 64}
OTHER_DATA = {**DATA, "content": "c"}
IN_ORDER = torch.arange(NUM_TRAIN)
COSTS = {"method": "stride", "seconds": {"fit": 1.0, "total": 2.5}, "peak_memory_bytes": 300 * 2**20}


def make_truth(num_seeds=4, noise=2.0, **metadata):
    """Losses fall with the sum of the weights of a subset; every seed adds noise of its own."""
    noises = noise * random_tensor(num_seeds, NUM_SUBSETS, NUM_QUERIES, seed=2, dtype=torch.float32)
    return GroundTruth(MASKS, noises - MASKS.float() @ WEIGHTS.T, list(range(num_seeds)), metadata)


def counterfactual_of(scores, ks=KS, **metadata):
    removed = [torch.ones(scores.shape, dtype=torch.bool).scatter_(1, scores.topk(k).indices, value=False) for k in ks]
    masks = torch.cat([torch.ones(1, NUM_TRAIN, dtype=torch.bool), *removed])
    return Counterfactual(masks, -(masks.float() @ WEIGHTS.T)[None], [0], metadata, ks=ks)


def run(attributions, truth=None, **options):
    options = {"num_resamples": 100, "show_progress": False} | options
    return evaluate(attributions, make_truth() if truth is None else truth, **options)


EXACT = Attribution(WEIGHTS, metadata=COSTS)
NOISY = Attribution(WEIGHTS + 2 * random_tensor(*WEIGHTS.shape, seed=3, dtype=torch.float32))
RANDOM = Attribution(random_tensor(*WEIGHTS.shape, seed=4, dtype=torch.float32))
THREE = {"random": RANDOM, "exact": EXACT, "noisy": NOISY}


@pytest.fixture(scope="module")
def evaluation():
    return run(THREE, counterfactuals={"exact": counterfactual_of(WEIGHTS), "noisy": counterfactual_of(NOISY.scores)})


def test_scores_are_the_mean_of_scipys_correlations(evaluation):
    losses = make_truth().losses.numpy()
    for name, attribution in THREE.items():
        predicted = -(attribution.scores.double().numpy() @ MASKS.numpy().T)
        expected = [spearmanr(predicted[query], losses[:, query]).statistic for query in range(NUM_QUERIES)]
        np.testing.assert_allclose(evaluation.per_query[name].numpy(), expected, atol=1e-6)
        assert evaluation[name].lds == pytest.approx(np.mean(expected), abs=1e-6)


def test_perfect_scores_reach_the_ceiling_and_random_ones_nothing(evaluation):
    assert evaluation.ceiling == pytest.approx(make_truth().ceiling)
    assert 0.9 < evaluation.ceiling < 0.99
    assert evaluation["exact"].lds == pytest.approx(evaluation.ceiling, abs=0.02)
    assert evaluation.share_of_ceiling("exact") == pytest.approx(evaluation["exact"].lds / evaluation.ceiling)
    assert abs(evaluation["random"].lds) < 0.15
    assert [row.name for row in evaluation.rows] == ["exact", "noisy", "random"]
    assert evaluation["random"].lds_upper < evaluation["noisy"].lds < evaluation["exact"].lds_lower


def test_intervals_hold_the_score_and_grow_with_confidence(evaluation):
    narrow = run(THREE, confidence=0.5)
    assert (narrow.confidence, evaluation.confidence) == (0.5, 0.95)
    sizes = evaluation.num_queries, evaluation.num_subsets, evaluation.num_seeds
    assert sizes == (NUM_QUERIES, NUM_SUBSETS, 4)
    for row in evaluation.rows:
        assert row.lds_lower < row.lds < row.lds_upper
        assert narrow[row.name].lds_upper - narrow[row.name].lds_lower < row.lds_upper - row.lds_lower
    assert run(THREE, num_resamples=101)["noisy"].lds_lower != evaluation["noisy"].lds_lower
    assert run(THREE, seed=1)["noisy"].lds_lower != evaluation["noisy"].lds_lower
    assert run(THREE)["noisy"] == EvaluationRow(**{**vars(evaluation["noisy"]), "counterfactual": None})


def test_counterfactuals_are_mean_rises_of_the_loss_and_costs_those_of_the_metadata(evaluation):
    rises = {k: WEIGHTS.topk(k).values.sum(1).mean().item() for k in KS}
    assert evaluation["exact"].counterfactual == pytest.approx(rises, rel=1e-5)
    assert evaluation["noisy"].counterfactual[5] < evaluation["exact"].counterfactual[5]
    assert evaluation["random"].counterfactual is None
    # Ties among the removed may be broken either way.
    scores = torch.zeros_like(WEIGHTS).scatter_(1, WEIGHTS.topk(3).indices, 1.0)
    tied = run({"ties": Attribution(scores)}, counterfactuals={"ties": counterfactual_of(scores)})
    assert set(tied["ties"].counterfactual) == set(KS)
    assert (evaluation["exact"].seconds, evaluation["exact"].memory_bytes) == (2.5, 300 * 2**20)
    assert (evaluation["noisy"].seconds, evaluation["noisy"].memory_bytes) == (None, None)


def test_constant_queries_are_counted_without_a_warning(recwarn):
    scores = WEIGHTS.index_fill(0, torch.tensor([3, 7]), 0.0)
    judged = run({"gaps": Attribution(scores), "whole": EXACT, "none": Attribution(torch.zeros_like(WEIGHTS))})
    assert [(row.name, row.num_constant) for row in judged.rows] == [("whole", 0), ("gaps", 2), ("none", NUM_QUERIES)]
    assert judged.per_query["gaps"][[3, 7]].tolist() == [0.0, 0.0]
    assert judged["none"].lds == 0
    assert not len(recwarn)
    header, row = str(judged).splitlines()[1:4:2]
    assert "constant queries" in header
    assert row[header.index("constant queries") :].split()[0] == "2"


def test_one_seed_has_no_ceiling_and_one_query_will_do():
    truth = make_truth(num_seeds=1)
    judged = run(EXACT, truth)
    assert (judged.ceiling, judged.share_of_ceiling("stride")) == (None, None)
    assert "of ceiling" not in str(judged)
    assert str(judged).splitlines()[-1].startswith("noise ceiling unknown")
    one = run(EXACT[0], GroundTruth(MASKS, truth.losses_by_seed[:, :, :1], [0]))
    assert one.per_query["stride"].shape == (1,)
    assert one["stride"].lds == pytest.approx(judged.per_query["stride"][0].item())


def test_sequences_are_named_by_method_and_numbered_and_names_are_escaped_in_markdown():
    text = markdown_evaluation(run({"a|b <i>": EXACT}))
    assert "| a&#124;b &#60;i&#62; | " in text
    assert [line.count("|") for line in text.splitlines() if line.startswith("|")] == [6, 6, 6]
    named = Attribution(WEIGHTS, metadata={"method": "stride-2"})
    judged = run([EXACT, named, EXACT, NOISY])
    assert sorted(judged.per_query) == ["scores", "stride", "stride-2", "stride-3"]
    assert [row.name for row in run(EXACT).rows] == ["stride"]
    with pytest.raises(KeyError, match=r"'other' was evaluated: choose one of \['stride'"):
        judged["other"]


def test_permuted_columns_are_aligned(evaluation):
    order = permutation(NUM_TRAIN)
    permuted = Attribution(NOISY.scores[:, order], train_indices=order)
    assert run({"noisy": permuted})["noisy"].lds == evaluation["noisy"].lds
    # A truth that says where its columns stand: here in a dataset of twice the size, in an order of its own.
    places = 2 * permutation(NUM_TRAIN + 1)[:NUM_TRAIN]
    truth = make_truth(data=DATA, train_indices=places.tolist())
    for columns in (IN_ORDER, order):
        moved = Attribution(NOISY.scores[:, columns], train_indices=places[columns], metadata={"data": DATA})
        assert run({"noisy": moved}, truth)["noisy"].lds == evaluation["noisy"].lds


def test_equal_fingerprints_mean_the_same_order(evaluation):
    truth = make_truth(data=DATA, query_data=QUERY_DATA)
    metadata = {"data": DATA, "query_data": QUERY_DATA}
    part = Attribution(NOISY.scores, train_indices=100 + IN_ORDER, metadata=metadata)
    assert run({"noisy": part}, truth)["noisy"].lds == evaluation["noisy"].lds
    # Were the columns permuted, or was the data read in this order by both?
    unclear = Attribution(NOISY.scores, train_indices=permutation(NUM_TRAIN), metadata=metadata)
    with pytest.raises(ValueError, match="'noisy' has its training examples in another order than the dataset"):
        run({"noisy": unclear}, truth)


BROKEN = WEIGHTS.index_put((torch.tensor([2, 4]), torch.tensor([5, 1])), torch.tensor([torch.nan, torch.inf]))
REFUSED = {
    "other data": (Attribution(WEIGHTS, metadata={"data": OTHER_DATA}), "'one' has other training data"),
    "other queries": (Attribution(WEIGHTS, metadata={"query_data": DATA}), "'one' has other queries than the ground"),
    "fewer columns": (
        Attribution(WEIGHTS[:, :5], train_indices=IN_ORDER[:5]),
        "'one' has scores of 5 training examples, the ground truth has 30.* one score for each of them",
    ),
    "more columns": (Attribution(WEIGHTS.repeat(1, 2)), "'one' has scores of 60 training examples, .* has 30"),
    "fewer queries": (Attribution(WEIGHTS[:5]), "'one' has 5 queries, the ground truth has 12"),
    "not finite": (
        Attribution(BROKEN, train_indices=IN_ORDER),
        "'one' has 2 scores that are not finite, the first that of query 2 .* example 5",
    ),
    "other positions": (
        Attribution(WEIGHTS, train_indices=IN_ORDER + 1),
        r"'one' has other training examples .* begin with \[1, 2, 3, 4, 5\], .* with \[0, 1, 2, 3, 4\]",
    ),
    "positions twice": (Attribution(WEIGHTS, train_indices=IN_ORDER // 2), "'one' has other training examples"),
}


@pytest.mark.parametrize(("attribution", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_attributions_that_do_not_fit_are_refused_by_name(attribution, message):
    with pytest.raises(ValueError, match=message):
        run({"good": EXACT, "one": attribution}, make_truth(data=DATA, query_data=QUERY_DATA))


def test_what_is_no_attribution_or_truth_is_refused():
    assert_refused(
        run,
        ("`attributions` is empty", {}),
        ("No query's loss varies", THREE, GroundTruth(MASKS, torch.ones(1, NUM_SUBSETS, NUM_QUERIES), [0])),
    )
    assert_refused(
        run,
        ("'one' to be an Attribution, got Tensor", {"one": WEIGHTS}),
        (r"GroundTruth that retrain\(\) returns, got Counterfactual", THREE, counterfactual_of(WEIGHTS)),
        error=TypeError,
    )
    with pytest.raises(ValueError, match="confidence"):
        run(THREE, confidence=1.5)


def test_counterfactuals_that_do_not_fit_are_refused():
    def run_with(name, counterfactual, truth=None):
        return run(THREE, truth, counterfactuals={name: counterfactual})

    right = counterfactual_of(WEIGHTS)
    other = counterfactual_of(WEIGHTS, data=OTHER_DATA)
    small = Counterfactual(torch.ones(3, NUM_TRAIN), torch.ones(1, 3, 2), [0], ks=[1])
    elsewhere = "was measured with other scores: the"
    assert_refused(
        run_with,
        (r"holds \['strid'\], .* are named \['random', 'exact', 'noisy'\]", "strid", right),
        (f"of 'noisy' {elsewhere} 1 removed examples", "noisy", right),
        (f"of 'exact' {elsewhere} 2 removed examples", "exact", replace(right, ks=(2, 5))),
        ("of 'exact' has other training data", "exact", other, make_truth(data=DATA)),
        ("of 'exact' has 2 queries and 30 training examples", "exact", small),
    )
    assert_refused(run_with, ("of 'noisy' must be what retrain_without", "noisy", make_truth()), error=TypeError)


def test_the_table_is_aligned_and_sorted_with_the_ceiling_last(evaluation):
    caption, header, *rows, last = str(evaluation).splitlines()
    assert repr(evaluation) == str(evaluation)
    assert caption.startswith("LDS of 12 queries over 60 subsets x 4 seeds, with 95 % intervals")
    assert [row.split()[0] for row in rows] == ["exact", "noisy", "random"]
    assert all(str(evaluation).count(name) == 1 for name in THREE)
    columns = ["method", "LDS", "of ceiling", "without top 1", "without top 5", "seconds", "memory"]
    starts = [header.index(column) for column in columns]
    assert header.split() == " ".join(columns).split()
    for line, row in zip(rows, evaluation.rows, strict=True):
        cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        assert cells[1] == f"{row.lds:.3f} [{row.lds_lower:.3f}, {row.lds_upper:.3f}]"
        assert cells[2] == f"{100 * row.lds / evaluation.ceiling:.0f} %"
        assert cells[3] == ("-" if row.counterfactual is None else score_text(row.counterfactual[1]))
        assert cells[5:] == (["2.5", "300 MiB"] if row.name == "exact" else ["-", "-"])
        assert all(line[start - 2 : start] == "  " for start in starts[1:])
    assert last == f"noise ceiling {evaluation.ceiling:.2f}: what a perfect predictor would get"
    assert "constant" not in header


def test_dataframe(evaluation, monkeypatch):
    frame = evaluation.to_dataframe().set_index("method")
    assert list(frame.index) == ["exact", "noisy", "random"]
    assert frame.loc["noisy", "lds"] == evaluation["noisy"].lds
    assert frame.loc["exact", "rise_without_top_5"] == evaluation["exact"].counterfactual[5]
    assert all(pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes)
    assert math.isnan(frame.loc["random", "seconds"])
    assert all(pd.api.types.is_numeric_dtype(kind) for kind in run(RANDOM).to_dataframe().dtypes[1:])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'stride-lightning\[pandas\]'"):
        evaluation.to_dataframe()


def test_scalars_are_the_numbers_there_are(evaluation):
    scalars = scalars_of(evaluation)
    assert scalars["evaluation/noisy/lds"] == evaluation["noisy"].lds
    assert scalars["evaluation/exact/seconds"] == 2.5
    assert scalars["evaluation/exact/rise_without_top_1"] == evaluation["exact"].counterfactual[1]
    assert scalars["evaluation/ceiling"] == evaluation.ceiling
    names = {tag.split("/")[2] for tag in scalars if tag.startswith("evaluation/random/")}
    assert names == {"lds", "lds_lower", "lds_upper", "lds_of_ceiling", "num_constant"}


def test_tensorboard_shows_scalars_table_and_figure(evaluation, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    evaluation.log(types.SimpleNamespace(loggers=[logger, None]), step=7)  # a trainer
    events = read_events(logger)
    for tag, value in scalars_of(evaluation).items():
        (event,) = events.Scalars(tag)
        assert (event.step, event.value) == (7, pytest.approx(value))
    (text,) = events.Tensors("evaluation/table/text_summary")
    assert text.tensor_proto.string_val[0].decode() == markdown_evaluation(evaluation)
    (picture,) = events.Images("evaluation/figure")
    assert (picture.step, text.step) == (7, 7)
    assert picture.width > 600


def test_csv_logger_gets_the_scalars(evaluation, tmp_path):
    logger = CSVLogger(tmp_path)
    evaluation.log(logger)
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row.pop("step") == "0"
    assert {tag: float(value) for tag, value in row.items()} == pytest.approx(scalars_of(evaluation))


def test_wandb_like_logger_gets_table_and_image_on_rank_zero(evaluation, monkeypatch):
    logger, bare, unused = WandbLike(), WandbLike(), WandbLike()
    evaluation.log([logger], step=3)
    metrics, (table, columns, data, step), (figure, (image,), _) = logger.calls
    assert (table, figure) == ("evaluation/table", "evaluation/figure")
    assert [row[0] for row in data] == ["exact", "noisy", "random"]
    assert all(len(row) == len(columns) for row in data)
    assert image.min() < 100 < image.max()  # drawn
    assert (step, metrics) == (3, ("metrics", scalars_of(evaluation), 3))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    evaluation.log(bare)
    assert [call[0] for call in bare.calls] == ["metrics", "evaluation/table"]
    monkeypatch.setattr("stride_lightning.results.evaluation.rank", lambda: 1)
    evaluation.log(unused)
    assert not unused.calls


def test_figure_has_bars_intervals_and_ceiling_and_a_panel_for_counterfactuals(evaluation):
    pytest.importorskip("matplotlib")
    scores, curves = evaluation.plot().axes
    assert [bar.get_width() for bar in scores.patches] == [row.lds for row in evaluation.rows]
    assert [label.get_text() for label in scores.get_yticklabels()] == ["exact", "noisy", "random"]
    (errors,) = scores.containers[1][2]
    ends = [sorted(x for x, _ in segment) for segment in errors.get_segments()]
    assert ends == [pytest.approx([row.lds_lower, row.lds_upper], abs=1e-6) for row in evaluation.rows]
    assert any(set(line.get_xdata()) == {evaluation.ceiling} for line in scores.lines)
    dots = [dots.get_offsets()[:, 0].tolist() for dots in scores.collections if dots is not errors]
    assert dots == [pytest.approx(evaluation.per_query[row.name].tolist()) for row in evaluation.rows]
    lines = {line.get_label(): line for line in curves.lines}
    assert list(lines["exact"].get_ydata()) == list(evaluation["exact"].counterfactual.values())
    assert "random" not in lines
    (alone,) = run({"$a": EXACT, "$b": NOISY}, make_truth(num_seeds=1)).plot().axes
    assert not any("ceiling" in text.get_text() for text in alone.texts)


def test_figure_of_hand_made_rows_and_wide_ks():
    # A score outside its interval, as percentiles allow, and ks on a log scale.
    row = EvaluationRow("$odd_{name$", 0.5, 0.6, 0.7, counterfactual={1: 0.1, 100: 0.2})
    figure = Evaluation((row,), 0.0, 10, 2, 3, 0.9, {"$odd_{name$": torch.tensor([-0.5, 0.4, 0.6])}).plot()
    assert figure.axes[1].get_xscale() == "log"
    assert figure.axes[0].get_xlim()[0] < -0.5
    figure.savefig(io.BytesIO())  # names are no formulas


def evaluate_on(number, port, folder):
    start(number, port, group=True)
    torch.save(vars(run({"noisy": NOISY})["noisy"]), folder / f"rank{number}.pt")


@pytest.mark.distributed
def test_two_processes_find_what_one_finds(tmp_path):
    assert run_two(evaluate_on, tmp_path) == [vars(run({"noisy": NOISY})["noisy"])] * 2
