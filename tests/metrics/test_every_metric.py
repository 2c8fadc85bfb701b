"""What holds for every metric: batches, orders, processes, collections, copies, figures."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings

import matplotlib as mpl
import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from stride_lightning import metrics
from stride_lightning.metrics.base import AttributionMetric
from tests.helpers.processes import run_two, start
from tests.helpers.tiny import permutation
from tests.metrics.cases import CASES, COLUMNS, LOSSES, MASKS, NUM_ITEMS, SCORES, Case

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
@pytest.mark.parametrize("order", [torch.arange(NUM_ITEMS), permutation(NUM_ITEMS)], ids=["in order", "permuted"])
def test_batches_are_all_at_once(case: Case, order: Tensor) -> None:
    metric = case.metric()
    for rows in order.split([1, 3, 3]):
        metric.update(*case.part(rows))
    value, expected = metric.compute(), case.function(*case.data)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected[..., order] if case.per_item else expected)


@every_case
def test_order_of_columns_changes_nothing(case: Case) -> None:
    columns = permutation(COLUMNS)
    metric = case.metric(columns)
    metric.update(*case.permuted(columns))
    torch.testing.assert_close(metric.compute(), case.function(*case.data))


@every_case
def test_forward_is_the_value_of_the_batch(case: Case) -> None:
    metric = case.metric()
    for rows in (slice(0, 3), slice(3, 7)):  # each with examples of both kinds
        expected = case.function(*case.part(rows))
        torch.testing.assert_close(metric(*case.part(rows)), expected)
    torch.testing.assert_close(metric.compute(), case.function(*case.data))


@every_case
def test_reset_copy_and_pickle(case: Case) -> None:
    metric = case.metric()
    metric.update(*case.part(slice(0, 3)))
    copies = [copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()]
    metric.reset()
    metric.update(*case.data)
    for twin in copies:
        twin.update(*case.part(slice(3, 7)))
        torch.testing.assert_close(twin.compute(), metric.compute())


@every_case
def test_low_precision_loses_nothing(case: Case) -> None:
    holder = torch.nn.Module()
    holder.metric = metric = case.metric()
    holder.to(torch.bfloat16)
    metric.update(*case.data)
    torch.testing.assert_close(metric.compute(), case.function(*case.data), rtol=0, atol=0)
    for dtype in (torch.float32, torch.bfloat16):  # computed in float64, whatever comes
        lowered = [value.to(dtype) if value.is_floating_point() else value for value in case.data]
        raised = [value.double() if value.is_floating_point() else value for value in lowered]
        torch.testing.assert_close(case.function(*lowered), case.function(*raised), rtol=0, atol=0)


@every_case
def test_no_update_is_refused(case: Case) -> None:
    metric = case.metric()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics' own
        with pytest.raises(ValueError, match=rf"{type(metric).__name__} has seen no data: call `update` first"):
            metric.compute()


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(", mean")])
@pytest.mark.parametrize("reduction", ["max", None, ["mean"]], ids=str)
def test_other_reductions_are_refused(name: str, reduction: object) -> None:
    case = CASES[name]
    with pytest.raises(ValueError, match="`reduction` must be 'mean' or 'none', got"):
        case.function(*case.data, reduction=reduction)
    with pytest.raises(ValueError, match="`reduction` must be 'mean' or 'none', got"):
        case.make(torch.arange(COLUMNS), reduction)


@every_case
def test_figures(case: Case) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot

    metric = case.metric()
    metric.update(*case.data)
    for values in (None, metric.compute(), [metric.compute(), metric.compute()]):
        figure, axes = metric.plot(values)
        assert isinstance(figure, pyplot.Figure)
        assert axes.figure is figure
        figure.canvas.draw()
        again, same = metric.plot(values, ax=axes)
        assert (again, same) == (figure, axes)
        pyplot.close(figure)
    assert not pyplot.get_fignums()


def test_figures_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for metric in (metrics.MeanReciprocalRank(), metrics.CounterfactualScore([1])):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'stride-lightning\[plot\]'"):
            metric.plot(torch.tensor(0.5))


def test_histogram_of_queries_and_curve_against_k() -> None:
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = metrics.MeanReciprocalRank("none").plot(torch.tensor([0.0, 0.5, 1.0]))
    assert sum(bar.get_height() for bar in axes.patches) == 3
    assert axes.lines[0].get_xdata()[0] == 0.5
    pyplot.close(figure)
    metric = metrics.CounterfactualScore([1, 10], "none")
    figure, axes = metric.plot(torch.tensor([[0.0, 1.0], [2.0, 4.0]]))
    assert axes.lines[0].get_xydata().tolist() == [[1, 0.5], [10, 3.0]]
    assert axes.collections[0].get_paths()[0].vertices[:, 1].max() == 4.0  # mean 3, standard error 1
    pyplot.close(figure)


def test_every_class_and_function_is_exported_and_tested() -> None:
    assert set(metrics.__all__) <= set(dir(metrics))
    classes = {getattr(metrics, name) for name in metrics.__all__ if name[0].isupper()}
    assert classes == {type(case.metric()) for case in CASES.values()}
    for kind in classes:
        assert issubclass(kind, AttributionMetric)
        assert (kind.higher_is_better, kind.is_differentiable, kind.full_state_update) == (True, False, False)


def test_import_does_without_lightning() -> None:
    code = (
        "import sys, stride_lightning.metrics; print('lightning' in sys.modules or 'pytorch_lightning' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_collections_keep_metrics_apart() -> None:
    """torchmetrics merges metrics whose states are equal after one batch; here all of these are 1."""
    collection = MetricCollection(
        {f"recall at {k}": metrics.RetrievalRecall(k) for k in (1, 2)} | {"rank": metrics.MeanReciprocalRank()}
    )
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    collection.update(scores, torch.tensor([[True, False, False]]))
    collection.update(scores, torch.tensor([[False, True, False]]))
    assert collection.compute() == {"rank": 0.75, "recall at 1": 0.5, "recall at 2": 1.0}


# ---- two processes ----------------------------------------------------------------------------------------------

#: What each of two ranks sees; an empty share is a rank that never calls `update`.
SHARES = {
    "uneven": ((slice(0, 1), slice(1, 5)), (slice(5, 7),)),
    "second without data": ((slice(0, 4), slice(4, 7)), ()),
    "first without data": ((), (slice(0, 7),)),
}


def compute_all(number, port, folder):
    """What each of the two processes does; rank r leaves its results in ``rank{r}.pt``."""
    start(number, port, group=True)
    warnings.simplefilter("ignore", UserWarning)  # torchmetrics', for a rank without data
    results = {}
    for share, rows_of_ranks in SHARES.items():
        for name, case in CASES.items():
            metric = case.metric()
            for rows in rows_of_ranks[number]:
                metric.update(*case.part(rows))
            results[share, name] = metric.compute()
            if isinstance(metric, metrics.LinearDatamodelingScore):
                results[share, name, "interval"] = torch.stack(metric.interval(num_resamples=20))
                results[share, name, "constant"] = metric.num_constant
            # Computing leaves the share of this rank as it was.
            for rows in rows_of_ranks[number]:
                metric.update(*case.part(rows))
    torch.save(results, folder / f"rank{number}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return run_two(compute_all, tmp_path_factory.mktemp("two"))


@pytest.mark.distributed
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(both, share, name):
    case = CASES[name]
    for results in both:
        torch.testing.assert_close(results[share, name], case.function(*case.data))
        if name.startswith("datamodeling"):
            expected = metrics.linear_datamodeling_interval(SCORES, MASKS, LOSSES, num_resamples=20)
            torch.testing.assert_close(results[share, name, "interval"], torch.stack(expected))
            assert results[share, name, "constant"] == 0
