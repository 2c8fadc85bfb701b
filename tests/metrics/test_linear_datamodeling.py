"""The linear datamodeling score against scipy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from stride_lightning.metrics.linear_datamodeling import linear_datamodeling_score
from tests.helpers.tiny import permutation, random_tensor


def planted(ties: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (4, 30), masks (25, 30) and losses (25, 4) that agree somewhat."""
    scores = random_tensor(4, 30, seed=seed)
    masks = (torch.rand(25, 30, generator=torch.Generator().manual_seed(seed)) < 0.5).long()
    losses = -(masks.double() @ scores.T) + 3 * random_tensor(25, 4, seed=seed + 1)
    return (scores.round(), masks, losses.round()) if ties else (scores, masks, losses)


def reference(scores: Tensor, masks: Tensor, losses: Tensor) -> Tensor:
    predicted = -(scores.numpy() @ masks.numpy().T)
    pairs = zip(predicted, losses.numpy().T, strict=True)
    return torch.tensor([spearmanr(one, other).statistic for one, other in pairs], dtype=torch.float32)


@pytest.mark.parametrize("ties", [False, True])
def test_equals_scipy_for_each_query(ties: bool) -> None:
    data = planted(ties)
    assert ties == (len(np.unique(data[2][:, 0])) < 25)
    expected = reference(*data)
    assert expected.min() > 0.1
    torch.testing.assert_close(linear_datamodeling_score(*data, reduction="none"), expected)
    torch.testing.assert_close(linear_datamodeling_score(*data), expected.mean())


def test_helpful_scores_are_positive_and_only_ranks_count() -> None:
    scores, masks, _ = planted(False)
    falling = -(masks.double() @ scores.T)
    torch.testing.assert_close(linear_datamodeling_score(scores, masks, falling.exp()), torch.tensor(1.0))
    torch.testing.assert_close(linear_datamodeling_score(-scores, masks.bool(), falling), torch.tensor(-1.0))


def test_order_of_subsets_and_examples_changes_nothing() -> None:
    scores, masks, losses = planted(True)
    rows, columns = permutation(25), permutation(30)
    moved = linear_datamodeling_score(scores[:, columns], masks[rows][:, columns], losses[rows], reduction="none")
    torch.testing.assert_close(moved, linear_datamodeling_score(scores, masks, losses, reduction="none"))


def test_constant_queries_count_zero_and_are_counted() -> None:
    scores, masks, losses = planted(False)
    expected = linear_datamodeling_score(scores, masks, losses, reduction="none")
    scores[1], losses[:, 2] = 0, 1.5
    expected[1], expected[2] = 0, 0
    with pytest.warns(UserWarning, match="2 of 4 queries have constant scores or losses and count 0"):
        obtained = linear_datamodeling_score(scores, masks, losses, reduction="none")
    torch.testing.assert_close(obtained, expected)
    with pytest.warns(UserWarning, match="2 of 4"):
        torch.testing.assert_close(linear_datamodeling_score(scores, masks, losses), expected.mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_datamodeling_score(scores[3:], masks, losses[:, 3:])


def test_equal_scores_on_subsets_of_one_size_are_constant() -> None:
    masks = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(i)) < 15 for i in range(8)])
    with pytest.warns(UserWarning, match="1 of 1"):
        score = linear_datamodeling_score(torch.full((1, 30), 0.1), masks, random_tensor(8, 1, seed=0))
    assert score == 0


def test_what_does_not_fit_is_refused() -> None:
    scores, masks, losses = planted(False)
    for wrong in ((masks[:, :-1], losses), (masks, losses.T), (masks[:-1], losses), (masks[0], losses)):
        with pytest.raises(ValueError, match=r"expected masks \(num_subsets, 30\) and losses \(num_subsets, 4\)"):
            linear_datamodeling_score(scores, *wrong)
    with pytest.raises(ValueError, match="`reduction` must be 'mean' or 'none', got 'sum'"):
        linear_datamodeling_score(scores, masks, losses, reduction="sum")
    losses[3, 2] = float("nan")
    with pytest.raises(ValueError, match="The losses hold 1 values that are not finite"):
        linear_datamodeling_score(scores, masks, losses)
    scores[0] = float("inf")
    with pytest.raises(ValueError, match="The scores hold 30 values that are not finite"):
        linear_datamodeling_score(scores, masks, losses)
