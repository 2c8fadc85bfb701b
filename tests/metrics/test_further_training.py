"""Agreement with further training against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.stats import pearsonr
from torch import Tensor

from stride_lightning.metrics import FurtherTrainingCosine, further_training_cosine
from tests.helpers.refusals import assert_refused
from tests.helpers.tiny import random_tensor


def planted(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores and effects (5, 20), both with an offset."""
    scores = random_tensor(5, 20, seed=seed) + 1
    return scores, scores + random_tensor(5, 20, seed=seed + 1) - 3


def reference(scores: Tensor, effects: Tensor, kind: str) -> Tensor:
    values = []
    for one, other in zip(scores.numpy(), effects.numpy(), strict=True):
        values.append(pearsonr(one, other).statistic if kind == "pearson" else 1 - cosine(one, other - other.mean()))
    return torch.tensor(np.array(values), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["cosine", "pearson"])
@pytest.mark.parametrize("scale", [1.0, 1e200, 1e-200])
def test_equals_scipy_for_each_query(kind: str, scale: float) -> None:
    scores, effects = planted()
    expected = reference(scores, effects, kind)
    assert expected.min() > 0.1
    obtained = further_training_cosine(scores * scale, effects * scale, kind, reduction="none")
    torch.testing.assert_close(obtained, expected)
    torch.testing.assert_close(further_training_cosine(scores, effects, kind), expected.mean())


def test_the_cosine_is_pearson_times_deviation_over_root_mean_square() -> None:
    scores, effects = planted()
    ratio = scores.std(1, correction=0) / scores.square().mean(1).sqrt()
    expected = further_training_cosine(scores, effects, "pearson", "none") * ratio.float()
    torch.testing.assert_close(further_training_cosine(scores, effects, reduction="none"), expected)


def test_a_common_offset_of_scores_costs_and_one_of_effects_does_not() -> None:
    scores, effects = planted()
    scores = scores - scores.mean(1, keepdim=True)
    before = further_training_cosine(scores, effects)
    torch.testing.assert_close(further_training_cosine(scores, effects + 7), before)
    assert further_training_cosine(scores + 7, effects) < 0.3 * before
    torch.testing.assert_close(further_training_cosine(scores + 7, effects, "pearson"), before)


def test_agreement_is_one_and_its_opposite_minus_one() -> None:
    effects = planted()[1]
    aligned = effects - effects.mean(1, keepdim=True)
    torch.testing.assert_close(further_training_cosine(3 * aligned, effects), torch.tensor(1.0))
    torch.testing.assert_close(further_training_cosine(-aligned, effects), torch.tensor(-1.0))


@pytest.mark.parametrize("kind", ["cosine", "pearson"])
def test_queries_without_effects_or_scores_count_zero(kind: str) -> None:
    scores, effects = planted()
    expected = further_training_cosine(scores, effects, kind, "none")
    effects[1], scores[3] = 0.3, 0 if kind == "cosine" else 0.1
    effects[1, ::2] = 0.1 + 0.2  # equal but for rounding
    assert effects[1].unique().numel() == 2
    expected[1], expected[3] = 0, 0
    words = {"cosine": "scores of zero or constant effects", "pearson": "constant scores or effects"}[kind]
    with pytest.warns(UserWarning, match=f"2 of 5 queries have {words} and count 0") as caught:
        obtained = further_training_cosine(scores, effects, kind, "none")
    assert caught[0].filename == __file__
    torch.testing.assert_close(obtained, expected)
    metric = FurtherTrainingCosine(kind)
    metric.update(scores, effects)
    with pytest.warns(UserWarning, match=f"2 of 5 queries have {words}") as caught:
        torch.testing.assert_close(metric.compute(), expected.mean())
    assert caught[0].filename == __file__


def test_what_does_not_fit_is_refused() -> None:
    scores, effects = planted()
    broken = effects.clone()
    broken[4, :3] = torch.nan
    for refused in (further_training_cosine, FurtherTrainingCosine().update):
        assert_refused(
            refused,
            (r"`scores` of shape \(num_queries, num_left_out\) .* got \(20,\)", scores[0], effects),
            (r"`effects` of shape \(5, 20\), the shape of `scores`, got \(5, 19\)", scores, effects[:, 1:]),
            ("at least 2 left-out examples, got 1: leave out more", scores[:, :1], effects[:, :1]),
            (r"finite `effects`, got 3 of 100 values .* in queries 4", scores, broken),
            (r"finite `scores`, got 3 of 100 values .* in queries 4", broken, effects),
        )
    kinds = "`kind` must be 'cosine' or 'pearson', got 'spearman'"
    assert_refused(further_training_cosine, (kinds, scores, effects, "spearman"))
    assert_refused(FurtherTrainingCosine, (kinds, "spearman"))
