"""Every metric class with its function and its data, for tests that are the same for all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stride_lightning import metrics
from stride_lightning.metrics.base import AttributionMetric
from tests.helpers.tiny import random_tensor

#: Uneven on two processes, in batches of any size.
NUM_ITEMS = 7
COLUMNS, SUBSETS = 30, 12

SCORES = random_tensor(NUM_ITEMS, COLUMNS, seed=0).round(decimals=1)  # with ties
OTHERS = (SCORES + random_tensor(NUM_ITEMS, COLUMNS, seed=1)).round(decimals=1)
MASKS = random_tensor(SUBSETS, COLUMNS, seed=2) > 0
LOSSES = (2 * random_tensor(SUBSETS, NUM_ITEMS, seed=3) - MASKS.double() @ SCORES.T).round()
RELEVANT = SCORES + 2 * random_tensor(NUM_ITEMS, COLUMNS, seed=4) > 2
MISLABELLED = torch.tensor([True, False, False, True, False, True, False])
KS = (1, 5, 20)
REMOVED = random_tensor(len(KS), NUM_ITEMS, seed=5) + torch.tensor([[0.0], [1.0], [2.0]])


@dataclass(frozen=True)
class Case:
    """A class and its twin."""

    make: Callable[[Tensor], AttributionMetric]  # given an order of the columns
    function: Callable[..., Tensor]
    data: tuple[Tensor, ...]  # arguments of `update`
    items: tuple[int, ...] = (0, 0)  # in each argument, the dimension that is cut into batches
    columns: tuple[int, ...] = (1, 1)  # in each, the dimension whose order changes nothing (-1 for none)
    per_item: bool = False  # whether there is a value for each item

    def metric(self, columns: Tensor | None = None) -> AttributionMetric:
        return self.make(torch.arange(COLUMNS) if columns is None else columns)

    def part(self, rows: slice | Sequence[int] | Tensor) -> tuple[Tensor, ...]:
        chosen = torch.arange(NUM_ITEMS)[rows]
        return tuple(value.index_select(dim, chosen) for value, dim in zip(self.data, self.items, strict=True))

    def permuted(self, columns: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(self.data, self.columns, strict=True)
        return tuple(value if dim < 0 else value.index_select(dim, columns) for value, dim in pairs)


def _both(make, function, data, **options) -> dict[str, Case]:
    return {
        reduction: Case(
            lambda columns, reduction=reduction: make(columns, reduction),
            lambda *data, reduction=reduction: function(*data, reduction=reduction),
            data,
            per_item=reduction == "none",
            **options,
        )
        for reduction in ("mean", "none")
    }


_FAMILIES = {
    "datamodeling": _both(
        lambda columns, reduction: metrics.LinearDatamodelingScore(MASKS[:, columns], reduction),
        lambda scores, losses, reduction: metrics.linear_datamodeling_score(scores, MASKS, losses, reduction),
        (SCORES, LOSSES),
        items=(0, 1),
        columns=(1, -1),
    ),
    "counterfactual": _both(
        lambda _, reduction: metrics.CounterfactualScore(KS, reduction),
        metrics.counterfactual_score,
        (REMOVED, OTHERS[:, 0]),
        items=(1, 0),
        columns=(-1, -1),
    ),
    **{
        f"{name} {kind}": _both(
            lambda _, reduction, make=make, kind=kind: make(kind, reduction),
            lambda *data, function=function, kind=kind, **options: function(*data, kind=kind, **options),
            (SCORES, OTHERS),
        )
        for name, make, function, other_kind in (
            ("further training", metrics.FurtherTrainingCosine, metrics.further_training_cosine, "cosine"),
            ("leave one out", metrics.LeaveOneOutCorrelation, metrics.leave_one_out_correlation, "spearman"),
        )
        for kind in (other_kind, "pearson")
    },
    "recall": _both(
        lambda _, reduction: metrics.RetrievalRecall(5, reduction),
        lambda *data, **options: metrics.retrieval_recall(*data, k=5, **options),
        (SCORES, RELEVANT),
    ),
    "reciprocal rank": _both(
        lambda _, reduction: metrics.MeanReciprocalRank(reduction),
        metrics.mean_reciprocal_rank,
        (SCORES, RELEVANT),
    ),
    "overlap": _both(
        lambda _, reduction: metrics.TopKOverlap(4, reduction),
        lambda *data, **options: metrics.top_k_overlap(*data, k=4, **options),
        (SCORES, OTHERS),
    ),
}

CASES = {f"{name}, {reduction}": case for name, pair in _FAMILIES.items() for reduction, case in pair.items()}
for _metric in ("auroc", "average_precision"):
    for _name, _suspicion, _items in (("suspicion", OTHERS[:, 0], (0, 0)), ("scores", OTHERS.T, (1, 0))):
        CASES[f"{_metric} of {_name}"] = Case(
            lambda _, metric=_metric: metrics.MislabelDetection(metric),
            lambda *data, metric=_metric: metrics.mislabel_detection(*data, metric=metric),
            (_suspicion, MISLABELLED),
            items=_items,
            columns=(0 if _name == "scores" else -1, -1),
        )
