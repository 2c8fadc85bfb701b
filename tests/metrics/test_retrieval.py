"""Recall and mean reciprocal rank against torchmetrics (which finds nothing that scores 0 or less), and with ties."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_recall as one_recall
from torchmetrics.functional.retrieval import retrieval_reciprocal_rank as one_reciprocal_rank

from stride_lightning.metrics import MeanReciprocalRank, RetrievalRecall, mean_reciprocal_rank, retrieval_recall
from tests.helpers.refusals import assert_refused
from tests.helpers.tiny import random_tensor


def planted() -> tuple[Tensor, Tensor]:
    """Scores without ties and relevant examples, both (6, 40)."""
    scores = random_tensor(6, 40, seed=0)
    return scores, scores + 4 * random_tensor(6, 40, seed=1) > 5


@pytest.mark.parametrize("k", [1, 3, 10, 40])
def test_recall_equals_torchmetrics(k: int) -> None:
    scores, relevant = planted()
    expected = torch.stack([one_recall(*row, top_k=k) for row in zip(scores.exp(), relevant, strict=True)])
    torch.testing.assert_close(retrieval_recall(scores, relevant, k, "none"), expected)
    torch.testing.assert_close(retrieval_recall(scores, relevant.long(), k), expected.mean())


def test_reciprocal_rank_equals_torchmetrics() -> None:
    scores, relevant = planted()
    expected = torch.stack([one_reciprocal_rank(*row) for row in zip(scores.exp(), relevant, strict=True)]).float()
    assert expected.min() < 0.5
    torch.testing.assert_close(mean_reciprocal_rank(scores, relevant, "none"), expected)
    torch.testing.assert_close(mean_reciprocal_rank(scores, relevant), expected.mean())


@pytest.mark.parametrize("ties", [False, True])
def test_reciprocal_rank_of_one_relevant_example_equals_scikit_learn(ties: bool) -> None:
    """Its label ranking average precision ranks ties as we do, last."""
    scores = random_tensor(6, 40, seed=0)
    scores = scores.round() if ties else scores
    relevant = torch.eye(40, dtype=torch.bool)[[0, 3, 9, 11, 20, 39]]
    expected = label_ranking_average_precision_score(relevant.numpy(), scores.numpy())
    assert mean_reciprocal_rank(scores, relevant).item() == pytest.approx(expected)


def test_ties_count_as_their_worst_order() -> None:
    """The least that any order of the tied examples gives."""
    scores = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    for places in ([1, 3], [3, 4], [2, 5], [0, 4], [5]):
        relevant = torch.zeros(6, dtype=torch.bool)
        relevant[places] = True
        orders = [[0, *middle, 5] for middle in permutations((1, 2, 3, 4))]
        for k in range(1, 7):
            worst = min(relevant[order[:k]].sum() / len(places) for order in orders)
            assert retrieval_recall(scores[None], relevant[None], k) == worst
        worst = min(1 / (1 + relevant[order].byte().argmax()) for order in orders)
        torch.testing.assert_close(mean_reciprocal_rank(scores[None], relevant[None]), worst)


def test_scores_that_are_all_zero_find_nothing() -> None:
    relevant = torch.zeros(1, 10, dtype=torch.bool)
    relevant[0, :2] = True
    assert retrieval_recall(torch.zeros(1, 10), relevant, k=8) == 0
    torch.testing.assert_close(mean_reciprocal_rank(torch.zeros(1, 10), relevant), torch.tensor(1 / 9))


def test_what_does_not_fit_is_refused() -> None:
    scores, relevant = planted()
    without, broken = relevant.clone(), scores.clone()
    without[[1, 4]] = False
    broken[5, 0] = torch.nan
    of_three = partial(retrieval_recall, k=3)
    for refused in (of_three, mean_reciprocal_rank, RetrievalRecall(3).update, MeanReciprocalRank().update):
        assert_refused(
            refused,
            ("a relevant example for every query, got none in rows 1, 4 of `relevant`", scores, without),
            (r"`relevant` of shape \(6, 40\), the shape of `scores`, got \(6, 39\)", scores, relevant[:, 1:]),
            (r"`scores` of shape \(num_queries, num_train\) .* got \(40,\)", scores[0], relevant[0]),
            (r"finite `scores`, got 1 of 240 values .* in queries 5", broken, relevant),
            (r"`relevant` to hold booleans .* got 240 other values", scores, torch.full((6, 40), 0.5)),
        )
    limits = "`k` must be an integer of at least 1 and at most 40, the number of .*, got"
    assert_refused(retrieval_recall, *((f"{limits} {k}", scores, relevant, k) for k in (0, 41, 2.0)))
    assert_refused(RetrievalRecall, ("`k` must be an integer of at least 1, got 0", 0))
