"""Agreement with leave-one-out retraining against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from stride_lightning.metrics import LeaveOneOutCorrelation, leave_one_out_correlation
from tests.helpers.refusals import assert_refused
from tests.helpers.tiny import random_tensor

both_kinds = pytest.mark.parametrize("kind", ["spearman", "pearson"])


def planted(ties: bool = False) -> tuple[Tensor, Tensor]:
    """Scores and effects (5, 20) that agree somewhat."""
    scores = random_tensor(5, 20, seed=0)
    effects = scores + random_tensor(5, 20, seed=1) + 2
    return (scores.round(), effects.round()) if ties else (scores, effects)


@both_kinds
@pytest.mark.parametrize("ties", [False, True])
def test_equals_scipy_for_each_query(kind: str, ties: bool) -> None:
    scores, effects = planted(ties)
    assert ties == (len(np.unique(effects[0])) < 20)
    compare = {"spearman": spearmanr, "pearson": pearsonr}[kind]
    pairs = zip(scores.numpy(), effects.numpy(), strict=True)
    expected = torch.tensor([compare(*pair).statistic for pair in pairs], dtype=torch.float32)
    assert expected.min() > 0.1
    torch.testing.assert_close(leave_one_out_correlation(scores, effects, kind, "none"), expected)
    torch.testing.assert_close(leave_one_out_correlation(scores, effects, kind), expected.mean())


def test_only_ranks_count_for_spearman() -> None:
    scores, _ = planted()
    torch.testing.assert_close(leave_one_out_correlation(scores, scores.exp()), torch.tensor(1.0))
    torch.testing.assert_close(leave_one_out_correlation(scores, -scores.exp()), torch.tensor(-1.0))
    assert leave_one_out_correlation(scores, scores.exp(), "pearson") < 0.97


@both_kinds
def test_constant_queries_count_zero(kind: str) -> None:
    scores, effects = planted()
    expected = leave_one_out_correlation(scores, effects, kind, "none")
    scores[0], effects[2] = 0.1, 0.1
    expected[0], expected[2] = 0, 0
    with pytest.warns(UserWarning, match="2 of 5 queries have constant scores or effects and count 0"):
        torch.testing.assert_close(leave_one_out_correlation(scores, effects, kind, "none"), expected)
    metric = LeaveOneOutCorrelation(kind)
    metric.update(scores, effects)
    with pytest.warns(UserWarning, match="2 of 5 queries have constant scores or effects and count 0"):
        torch.testing.assert_close(metric.compute(), expected.mean())


def test_what_does_not_fit_is_refused() -> None:
    scores, effects = planted()
    for refused in (leave_one_out_correlation, LeaveOneOutCorrelation().update):
        assert_refused(
            refused,
            (r"`effects` of shape \(5, 20\), the shape of `scores`, got \(20, 5\)", scores, effects.T),
            ("at least 2 left-out examples, got 1", scores[:, :1], effects[:, :1]),
            (r"finite `effects`, got 100 of 100 values .* in queries 0, 1, 2, 3, 4:", scores, effects / 0),
        )
    kinds = "`kind` must be 'spearman' or 'pearson', got 'cosine'"
    assert_refused(leave_one_out_correlation, (kinds, scores, effects, "cosine"))
    assert_refused(LeaveOneOutCorrelation, (kinds, "cosine"))
