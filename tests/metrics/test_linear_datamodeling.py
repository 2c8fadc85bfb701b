"""The linear datamodeling score against scipy."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from stride_lightning.metrics import LinearDatamodelingScore, linear_datamodeling_interval, linear_datamodeling_score
from stride_lightning.metrics.correlation import resampled_rank_correlations
from tests.helpers.refusals import assert_refused
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
def test_equals_scipy_for_each_query_in_any_order_of_subsets_and_examples(ties: bool) -> None:
    data = planted(ties)
    assert ties == (len(np.unique(data[2][:, 0])) < 25)
    expected = reference(*data)
    assert expected.min() > 0.1
    torch.testing.assert_close(linear_datamodeling_score(*data, reduction="none"), expected)
    torch.testing.assert_close(linear_datamodeling_score(*data), expected.mean())
    (scores, masks, losses), rows, columns = data, permutation(25), permutation(30)
    moved = linear_datamodeling_score(scores[:, columns], masks[rows][:, columns], losses[rows], reduction="none")
    torch.testing.assert_close(moved, expected)


def test_helpful_scores_are_positive_and_only_ranks_count() -> None:
    scores, masks, _ = planted(False)
    falling = -(masks.double() @ scores.T)
    torch.testing.assert_close(linear_datamodeling_score(scores, masks, falling.exp()), torch.tensor(1.0))
    torch.testing.assert_close(linear_datamodeling_score(-scores, masks.bool(), falling), torch.tensor(-1.0))


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
    linear_datamodeling_score(scores[3:], masks, losses[:, 3:])  # without a warning, which would be an error
    # Equal scores on subsets of one size are constant.
    masks = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(i)) < 15 for i in range(8)])
    with pytest.warns(UserWarning, match="1 of 1"):
        score = linear_datamodeling_score(torch.full((1, 30), 0.1), masks, random_tensor(8, 1, seed=0))
    assert score == 0


def test_what_does_not_fit_is_refused() -> None:
    scores, masks, losses = planted(False)
    shapes = r"expected masks \(num_subsets, 30\) and losses \(num_subsets, 4\)"
    for wrong in ((masks[:, :-1], losses), (masks, losses.T), (masks[:-1], losses), (masks[0], losses)):
        assert_refused(linear_datamodeling_score, (shapes, scores, *wrong))
    for few in (0, 1):
        message = rf"`masks` .* at least 2 subsets, got \({few}, 30\)"
        assert_refused(linear_datamodeling_score, (message, scores, masks[:few], losses[:few]))
        assert_refused(LinearDatamodelingScore, ("at least 2 subsets", masks[:few]))
    no_tensor = r"Expected `losses` to be a torch.Tensor, got list: use torch.as_tensor"
    assert_refused(linear_datamodeling_score, (no_tensor, scores, masks, losses.tolist()), error=TypeError)
    broken, holes, broken_losses = scores.clone(), masks.double(), losses.clone()
    broken[0], holes[2, 5], broken_losses[3, 1:3] = torch.inf, torch.inf, torch.nan
    assert_refused(
        linear_datamodeling_score,
        (r"`scores` of shape \(num_queries, num_train\) .* got \(30,\)", scores[0], masks, losses),
        ("finite `masks`, got 1 of 750 values that are not finite, in subsets 2", scores, holes, losses),
        ("finite `losses`, got 2 of 100 values .* not finite, in queries 1, 2:", scores, masks, broken_losses),
        ("finite `scores`, got 30 of 120 values that are not finite, in queries 0:", broken, masks, losses),
    )


def test_losses_that_never_vary_are_refused() -> None:
    scores, masks, losses = planted(False)
    losses[:] = losses[0]
    message = "No query's loss varies over the subsets: all 25 losses of each of the 4 queries are equal"
    for refused in (linear_datamodeling_score, linear_datamodeling_interval):
        with pytest.raises(ValueError, match=message):
            refused(scores, masks, losses)
    metric = LinearDatamodelingScore(masks)
    metric.update(scores, losses)
    assert metric.num_constant == 4
    for refused in (metric.compute, metric.interval):
        with pytest.raises(ValueError, match=message):
            refused()


def test_sums_that_differ_by_rounding_or_come_in_parts_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiples of a tenth have inexact sums; as whole numbers they are exact."""
    scores, masks, losses = planted(True)
    expected = reference(scores, masks, losses)
    for order in (slice(None), permutation(30)):
        moved = linear_datamodeling_score(scores[:, order] / 10, masks[:, order], losses, reduction="none")
        torch.testing.assert_close(moved, expected)
    monkeypatch.setattr("stride_lightning.metrics.linear_datamodeling._COLUMNS", 7)
    torch.testing.assert_close(linear_datamodeling_score(scores, masks, losses, reduction="none"), expected)


def test_class_counts_constant_queries_and_warns() -> None:
    scores, masks, losses = planted(False)
    scores[1], losses[:, 2] = 0, 1.5
    metric = LinearDatamodelingScore(masks)
    assert metric.num_constant == 0
    for query, expected in enumerate((0, 1, 2, 2)):
        metric.update(scores[query : query + 1], losses[:, query : query + 1])
        assert metric.num_constant == expected
    values = []
    compute_all = (
        metric.compute,
        partial(linear_datamodeling_score, scores, masks, losses),
        partial(metric.interval, 0.9, 3),
    )
    for compute in compute_all:
        with pytest.warns(UserWarning, match="2 of 4 queries have constant scores or losses and count 0") as caught:
            values.append(compute())
        assert caught[0].filename == __file__
    torch.testing.assert_close(values[0], values[1])
    metric.reset()
    assert metric.num_constant == 0


def test_class_keeps_no_scores() -> None:
    scores, masks, losses = planted(False)
    metric = LinearDatamodelingScore(masks)
    metric.update(scores, losses)
    stored = [value for state in metric.metric_state.values() for value in state]
    assert [value.numel() for value in stored] == [4 * 25, 4 * 25]
    with pytest.raises(ValueError, match=r"expected masks \(num_subsets, 29\) and losses"):
        metric.update(scores[:, 1:], losses)
    with pytest.raises(ValueError, match="has seen no data"):
        LinearDatamodelingScore(masks).interval()


@pytest.mark.parametrize("ties", [False, True])
def test_resampled_correlations_equal_scipy_in_blocks_of_any_size(ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = random_tensor(5, 12, seed=0), random_tensor(5, 12, seed=1)
    if ties:
        one, other = one.round(), other.round()
        one[3] = 2.0
    counts = np.random.default_rng(0).multinomial(12, [1 / 12] * 12, size=20)
    counts[0], counts[1] = 1, 0
    counts[1, 4] = 12  # one subset only: nothing varies
    obtained = resampled_rank_correlations(one, other, counts)
    for resample, query in np.ndindex(20, 5):
        columns = np.repeat(np.arange(12), counts[resample])
        x, y = one[query].numpy()[columns], other[query].numpy()[columns]
        constant = len(set(x)) == 1 or len(set(y)) == 1
        expected = 0.0 if constant else spearmanr(x, y).statistic
        assert obtained[resample, query] == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr("stride_lightning.metrics.correlation._BLOCK", 30)
    np.testing.assert_array_equal(resampled_rank_correlations(one, other, counts), obtained)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.filterwarnings("ignore:.*count 0")
def test_interval_equals_scores_of_explicit_resamples(ties: bool) -> None:
    scores, masks, losses = planted(ties)
    scores[3] = 0
    generator = np.random.default_rng(7)
    subsets = generator.multinomial(25, np.full(25, 1 / 25), size=40)
    queries = generator.multinomial(4, np.full(4, 1 / 4), size=40)
    resampled = []
    for subset_counts, query_counts in zip(subsets, queries, strict=True):
        rows, columns = np.repeat(np.arange(25), subset_counts), np.repeat(np.arange(4), query_counts)
        resampled.append(linear_datamodeling_score(scores[columns], masks[rows], losses[rows][:, columns]).item())
    expected = torch.tensor(np.quantile(resampled, [0.05, 0.95]), dtype=torch.float32)
    obtained = linear_datamodeling_interval(scores, masks, losses, confidence=0.9, num_resamples=40, seed=7)
    torch.testing.assert_close(torch.stack(obtained), expected)


def test_interval_of_the_class_and_its_seed() -> None:
    scores, masks, losses = planted(True)
    metric = LinearDatamodelingScore(masks)
    for rows in (slice(0, 1), slice(1, 4)):
        metric.update(scores[rows], losses[:, rows])
    expected = linear_datamodeling_interval(scores, masks, losses, confidence=0.8, num_resamples=50, seed=1)
    assert metric.interval(0.8, num_resamples=50, seed=1) == expected
    assert metric.interval(0.8, num_resamples=50, seed=2) != expected
    low, high = linear_datamodeling_interval(scores, masks, losses)
    assert low < linear_datamodeling_score(scores, masks, losses) < high
    narrow = linear_datamodeling_interval(scores, masks, losses, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_interval_refuses_options_out_of_range() -> None:
    data = planted(False)
    for confidence in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match=f"`confidence` must be between 0 and 1, got {confidence}"):
            linear_datamodeling_interval(*data, confidence=confidence)
    with pytest.raises(ValueError, match="`num_resamples` must be an integer of at least 1, got 0"):
        linear_datamodeling_interval(*data, num_resamples=0)
