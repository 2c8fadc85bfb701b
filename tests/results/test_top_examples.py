"""The top of scores that come tile by tile is the top of all scores."""

import math

import pytest
import torch

from stride_lightning import Attribution, TopExamples
from stride_lightning.results.top_examples import TopCollector, joined
from tests.helpers.processes import run_two, start


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_numbers(*shape, seed=0):
    """Scores with many ties."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def tiles(scores, seed, largest=7):
    """The columns in random order, cut at random places."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randperm(scores.shape[1], generator=generator)
    while len(columns):
        size = int(torch.randint(1, largest + 1, (1,), generator=generator))
        yield scores[:, columns[:size]], columns[:size]
        columns = columns[size:]


def collect(scores, k, seed=0, **options):
    collector = TopCollector(len(scores), k)
    for tile, columns in tiles(scores, seed, **options):
        collector.update(tile, columns)
    return collector


def assert_same(one, other):
    for name in ("proponents", "proponent_scores", "opponents", "opponent_scores"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)


@pytest.mark.parametrize("make", [whole_numbers, random], ids=["ties", "no ties"])
@pytest.mark.parametrize(("q", "n", "k"), [(4, 30, 5), (1, 30, 1), (3, 12, 12), (3, 5, 9), (2, 1, 3), (0, 8, 2)])
@pytest.mark.parametrize("seed", range(8))
def test_any_tiling_gives_the_top_of_all(make, q, n, k, seed):
    scores = make(q, n, seed=seed)
    assert_same(collect(scores, k, seed).compute(), Attribution(scores).top(k))


@pytest.mark.parametrize("seed", range(4))
def test_against_a_plain_sort(seed):
    scores = whole_numbers(3, 40, seed=seed)
    scores[0, 7], scores[0, 21], scores[1, 3] = math.inf, math.inf, -math.inf
    collector = collect(scores, 6, seed)
    collector.gather()  # in one process, where it changes nothing
    top = collector.compute()
    for query, row in enumerate(scores.tolist()):
        assert top.proponents[query].tolist() == sorted(range(40), key=lambda i: (-row[i], i))[:6]
        assert top.opponents[query].tolist() == sorted(range(40), key=lambda i: (row[i], i))[:6]
        assert top.proponent_scores[query].tolist() == [row[i] for i in top.proponents[query].tolist()]
        assert top.opponent_scores[query].tolist() == [row[i] for i in top.opponents[query].tolist()]


def test_everything_ties_and_so_does_what_is_equal_in_float32():
    zeros = torch.zeros(2, 50)
    zeros[:, ::2] *= -1  # minus zero is zero
    top = collect(zeros, 4, largest=20).compute()
    assert top.proponents.tolist() == top.opponents.tolist() == [[0, 1, 2, 3]] * 2
    assert "-0" not in str(top.opponent_scores.tolist())
    # Other precisions compare as float32.
    scores = random(2, 20).double()
    scores[:, 11] = scores[:, 4] + 1e-12  # the same in float32
    scores[:, [4, 11]] += 10
    assert collect(scores, 2).compute().proponents.tolist() == [[4, 11]] * 2
    half = random(2, 20).bfloat16()
    assert_same(collect(half, 3).compute(), Attribution(half.float()).top(3))


def test_queries_in_turn_are_queries_at_once():
    scores = whole_numbers(7, 20)
    parts = [collect(scores[rows], 4, seed).compute() for seed, rows in enumerate([range(3), range(3, 4), range(4, 7)])]
    assert_same(joined(parts), Attribution(scores).top(4))
    whole = Attribution(scores, std=scores.abs()).top_columns(3)
    assert joined([whole, whole]).opponent_stds.equal(torch.cat([whole.opponent_stds] * 2))


def gather_parts(number, port, folder):
    start(number, port, group=True)
    results = {}
    # Uneven shares; a rank that holds fewer than k; a rank without any.
    for share in (11, 2, 0):
        scores = whole_numbers(3, 20, seed=share)
        collector = TopCollector(3, 5)
        for tile, columns in tiles(scores, seed=1):
            mine = (columns < share) == (number == 0)
            collector.update(tile[:, mine], columns[mine])
        collector.gather()
        results[share] = {**collector.compute().tensors(), "count": collector.num_columns}
    torch.save(results, folder / f"rank{number}.pt")


@pytest.mark.distributed
def test_two_processes_gather_what_one_collects(tmp_path):
    for results in run_two(gather_parts, tmp_path):
        for share, top in results.items():
            assert top.pop("count") == 20
            assert_same(TopExamples(**top), Attribution(whole_numbers(3, 20, seed=share)).top(5))


def test_scores_and_collectors_that_do_not_fit():
    scores = random(2, 6)
    scores[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"query 1 for training example 12 .* is NaN"):
        TopCollector(2, 1).update(scores, torch.arange(15, 9, -1) - 1)
    with pytest.raises(ValueError, match=r"shape \(3, tile\).*got \(2, 6\) and \(6,\)"):
        TopCollector(3, 1).update(scores, torch.arange(6))
    with pytest.raises(ValueError, match=r"got \(2, 6\) and \(5,\)"):
        TopCollector(2, 1).update(scores, torch.arange(5))
    collector = collect(scores.nan_to_num(), 3)
    collector.update(scores.nan_to_num(), torch.arange(6))
    with pytest.raises(ValueError, match=r"example \d .* was added twice"):
        collector.compute()
    with pytest.raises(ValueError, match="seen no scores: call `update` first"):
        TopCollector(2, 1).compute()
    with pytest.raises(ValueError, match="`k` must be an integer of at least 1, got 0"):
        TopCollector(2, 0)
