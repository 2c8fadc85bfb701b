"""Overlap of the top k against sets, and against lots drawn for ties."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import pytest
import torch
from torch import Tensor

from stride_lightning.metrics import TopKOverlap, top_k_overlap
from tests.helpers.refusals import assert_refused
from tests.helpers.tiny import random_tensor


def planted() -> tuple[Tensor, Tensor]:
    """Two sets of scores (6, 40) without ties."""
    one = random_tensor(6, 40, seed=0)
    return one, one + random_tensor(6, 40, seed=1)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_equals_sets(k: int) -> None:
    one, other = planted()
    tops = [[set(row.argsort(descending=True)[:k].tolist()) for row in scores] for scores in (one, other)]
    expected = torch.tensor([len(first & second) / k for first, second in zip(*tops, strict=True)])
    torch.testing.assert_close(top_k_overlap(one, other, k, "none"), expected)
    torch.testing.assert_close(top_k_overlap(one, other, k), expected.mean())
    torch.testing.assert_close(top_k_overlap(other, one, k), expected.mean())
    assert top_k_overlap(one, one.exp(), k) == 1
    assert top_k_overlap(one, -one, 5) == 0


def test_ties_count_as_the_mean_over_lots() -> None:
    one, other = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 2.0, 0.0, 2.0, 0.0])

    def tops(scores: Tensor, k: int) -> list[set[int]]:
        orders = [torch.tensor(order) for order in permutations(range(5))]
        return [set(order[scores[order].argsort(descending=True, stable=True)[:k]].tolist()) for order in orders]

    for k in range(1, 6):
        pairs = [len(first & second) / k for first in tops(one, k) for second in tops(other, k)]
        expected = torch.tensor(sum(pairs) / len(pairs))
        torch.testing.assert_close(top_k_overlap(one[None], other[None], k), expected)


def test_scores_that_are_all_zero_overlap_by_chance() -> None:
    one, _ = planted()
    torch.testing.assert_close(top_k_overlap(one, torch.zeros(6, 40), 10), torch.tensor(0.25))
    torch.testing.assert_close(top_k_overlap(torch.zeros(6, 40), torch.zeros(6, 40), 10), torch.tensor(0.25))


def test_what_does_not_fit_is_refused() -> None:
    one, other = planted()
    broken = other.clone()
    broken[2] = torch.inf
    for refused in (partial(top_k_overlap, k=3), TopKOverlap(3).update):
        assert_refused(
            refused,
            (r"`other` of shape \(6, 40\), the shape of `one`, got \(5, 40\)", one, other[1:]),
            (r"`one` of shape \(num_queries, num_train\) .* got \(0, 40\)", one[:0], other[:0]),
            (r"finite `other`, got 40 of 240 values .* in queries 2", one, broken),
            (r"finite `one`, got 40 of 240 values .* in queries 2", broken, other),
            (r"`k` must be .* at most 2, the number of training examples, got 3", one[:, :2], other[:, :2]),
        )
        assert_refused(refused, ("Expected `one` to be a torch.Tensor, got NoneType", None, other), error=TypeError)
    assert_refused(TopKOverlap, *((f"`k` must be an integer of at least 1, got {k}", k) for k in (0, 1.0)))
