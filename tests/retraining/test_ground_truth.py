"""What retraining gives, and how far it is from noise."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from stride_lightning.results.attribution import Attribution
from stride_lightning.retraining.ground_truth import Counterfactual, GroundTruth, split_half_correlation
from stride_lightning.retraining.retrain import retrain, retrain_without
from stride_lightning.storage.records import RecordError, write_record
from tests.retraining.cases import NUM_TRAIN, by_hand, plain_net, points, random

# ---- reliability ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_seeds", [2, 3, 6])
@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_the_ceiling_is_what_a_perfect_predictor_gets(num_seeds, noise):
    """Against planted effects: the correlation of the mean over seeds with the truth, which only a simulation knows."""
    truth = random(1500, 12, seed=1)
    losses = truth + noise * random(num_seeds, 1500, 12, seed=2)
    result = GroundTruth(torch.ones(1500, 3), losses, list(range(num_seeds)))
    reached = np.mean([spearmanr(result.losses[:, q], truth[:, q]).statistic for q in range(12)])
    # Spearman and Brown's formula is for Pearson correlations; ranks of normal variables are a percent off.
    assert result.ceiling == pytest.approx(reached, abs=0.02)
    assert result.ceiling == pytest.approx((1 + noise**2 / num_seeds) ** -0.5, abs=0.025)


@pytest.mark.parametrize(("num_seeds", "splits"), [(2, [(0, 1)]), (3, [(0, 1), (0, 2), (1, 2)])])
def test_split_halves(num_seeds, splits):
    losses = random(num_seeds, 40, 5) + random(1, 40, 5, seed=1)
    expected = [spearmanr(losses[a, :, q], losses[b, :, q]).statistic for a, b in splits for q in range(5)]
    assert split_half_correlation(losses) == pytest.approx(np.mean(expected), abs=1e-12)


def test_split_halves_of_four():
    losses = random(4, 40, 5) + random(1, 40, 5, seed=1)
    pairs = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    means = [[losses[list(half)].double().mean(0) for half in pair] for pair in pairs]
    expected = np.mean([spearmanr(a[:, q], b[:, q]).statistic for a, b in means for q in range(5)])
    assert split_half_correlation(losses) == pytest.approx(expected, abs=1e-12)
    truth = GroundTruth(torch.ones(40, 3), losses, [0, 1, 2, 3])
    single = expected / (2 - expected)  # of one seed, from that of two
    assert truth.ceiling == pytest.approx((4 * single / (1 + 3 * single)) ** 0.5, abs=1e-12)


def test_many_seeds_are_split_at_random_reproducibly():
    losses = random(9, 30, 3) + 3 * random(1, 30, 3, seed=1)
    one, many = split_half_correlation(losses, num_splits=1), split_half_correlation(losses)
    assert one != many == split_half_correlation(losses)
    assert one == pytest.approx(many, abs=0.05)


def test_ties_and_constant_losses():
    losses = random(2, 30, 2).mul(2).round()
    expected = np.mean([spearmanr(losses[0, :, q], losses[1, :, q]).statistic for q in range(2)])
    assert split_half_correlation(losses) == pytest.approx(expected, abs=1e-12)
    losses[:, :, 1] = 3.0  # says nothing
    expected = spearmanr(losses[0, :, 0], losses[1, :, 0]).statistic / 2
    assert split_half_correlation(losses) == pytest.approx(expected, abs=1e-12)


def test_one_seed_and_noise_alone():
    one = GroundTruth(torch.ones(4, 3), random(1, 4, 2), [0])
    assert (one.split_half, one.ceiling) == (None, None)
    assert "noise ceiling unknown" in repr(one)
    losses = torch.stack([torch.arange(5.0), -torch.arange(5.0)])[:, :, None]
    opposite = GroundTruth(torch.ones(5, 3), losses, [0, 1])
    assert opposite.split_half == pytest.approx(-1)
    assert opposite.ceiling == 0
    assert repr(opposite) == "GroundTruth(5 subsets of 3 examples x 2 seeds, 1 queries, noise ceiling 0.00)"


# ---- on disk ----------------------------------------------------------------------------------------------------


def some_truth(**metadata):
    return GroundTruth(random(5, 11) > 0, random(2, 5, 3), [4, 5], metadata)


@pytest.mark.parametrize("kind", [GroundTruth, Counterfactual])
def test_round_trip(kind, tmp_path):
    more = {"ks": [1, 3]} if kind is Counterfactual else {}
    truth = kind(random(7, 11) > 0, random(2, 7, 3), [4, 5], {"a": {"b": [1, None]}}, **more)
    path = truth.save(tmp_path / "deep" / "truth")
    again = kind.load(path)
    assert path == tmp_path / "deep" / "truth"
    assert again.masks.equal(truth.masks)
    assert again.masks.dtype == torch.bool
    assert again.losses_by_seed.equal(truth.losses_by_seed)
    assert (again.seeds, again.metadata) == (truth.seeds, truth.metadata)
    assert vars(again).get("ks") == more.get("ks")
    assert (again.num_train, again.num_queries) == (11, 3)
    assert truth.save(path).name == "truth-v1"


def test_damage_and_other_kinds_are_refused(tmp_path):
    path = some_truth().save(tmp_path / "truth")
    with pytest.raises(RecordError, match="holds a 'ground-truth' record, not a 'counterfactual' record"):
        Counterfactual.load(path)
    with pytest.raises(RecordError, match="holds a None record"):
        GroundTruth.load(write_record(tmp_path, "other", {}, {}))
    with pytest.raises(FileNotFoundError):
        GroundTruth.load(tmp_path / "nothing")
    file = path / "retrained.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(RecordError, match=r"retrained\.safetensors.*SHA-256"):
        GroundTruth.load(path)


# ---- checks -----------------------------------------------------------------------------------------------------


def test_losses_that_are_not_finite_are_named():
    losses = random(2, 5, 3)
    losses[1, 4, 2] = torch.nan
    with pytest.raises(
        ValueError, match=r"1 losses are not finite\. .* query 2 under the model of subset 4 and seed 9"
    ):
        GroundTruth(torch.ones(5, 3), losses, [8, 9])
    losses[0, 1, 0] = torch.inf
    with pytest.raises(
        ValueError, match=r"2 losses are not finite\. .* query 0 under the model of subset 1 and seed 8"
    ):
        GroundTruth(torch.ones(5, 3), losses, [8, 9])


@pytest.mark.parametrize(
    ("masks", "losses", "seeds"), [((5,), (2, 5, 3), 2), ((5, 4), (2, 6, 3), 2), ((5, 4), (3, 5, 3), 2)]
)
def test_wrong_shapes(masks, losses, seeds):
    with pytest.raises(ValueError, match=r"Expected masks \(K, n\) and losses \(seeds, K, q\) for 2 seeds"):
        GroundTruth(torch.ones(masks), torch.ones(losses), list(range(seeds)))


def test_the_data_of_scores_are_compared():
    one, other = {"num_examples": 3, "content": "a" * 64}, {"num_examples": 4, "content": "b" * 64}
    truth = some_truth(data=one, query_data=other)
    truth.check_data({"data": one, "query_data": other})
    truth.check_data({})
    some_truth().check_data({"data": one})
    with pytest.raises(
        ValueError, match=r"The attribution has other training data .*: 4 examples b{12} instead of 3 ex"
    ):
        truth.check_data({"data": other})
    with pytest.raises(ValueError, match="Mine has other queries"):
        truth.check_data({"data": one, "query_data": one}, "Mine")


# ---- without examples -------------------------------------------------------------------------------------------

HOW = {"max_epochs": 2, "batch_size": 9}
QUERIES = points(3, seed=1)


def some_scores(**metadata):
    scores = random(3, NUM_TRAIN, seed=4)
    scores[1] = scores[1].round()  # with ties
    return Attribution(scores, None, metadata=metadata)


def without(attribution=None, ks=(5, 2, 2), **more):
    how = {"train_data": points(), "num_seeds": 2, "show_progress": False} | HOW | more
    return retrain_without(attribution or some_scores(), how.pop("model", plain_net), QUERIES, ks=ks, **how)


def test_losses_without_the_top_are_those_of_retraining(tmp_path):
    data, scores = points(), some_scores().scores
    result = without(path=tmp_path / "result")
    assert result.ks == [2, 5]
    assert result.masks.shape == (1 + 2 * 3, NUM_TRAIN)
    everything = torch.ones(1, NUM_TRAIN, dtype=torch.bool)
    full = torch.stack([by_hand(plain_net, data, QUERIES, everything, seed, **HOW)[0] for seed in (0, 1)]).mean(0)
    torch.testing.assert_close(result.losses_full, full, rtol=1e-4, atol=1e-5)
    for row, k in enumerate([2, 5]):
        for query in range(3):
            order = sorted(range(NUM_TRAIN), key=lambda i: (-float(scores[query, i]), i))
            mask = everything.clone()
            mask[0, order[:k]] = False
            losses = torch.stack([by_hand(plain_net, data, QUERIES, mask, seed, **HOW)[0, query] for seed in (0, 1)])
            torch.testing.assert_close(result.losses_removed[row, query], losses.mean(), rtol=1e-4, atol=1e-5)
    again = Counterfactual.load(tmp_path / "result")
    assert again.losses_removed.equal(result.losses_removed)
    rises = (result.losses_removed - result.losses_full).mean(1).tolist()
    assert repr(again) == (
        f"Counterfactual(3 queries; mean rise of the loss without top 2: {rises[0]:+.3g}, top 5: {rises[1]:+.3g})"
    )


@pytest.mark.parametrize("ks", [(), (0,), (1, NUM_TRAIN), (-1, 2)])
def test_numbers_of_removed_examples(ks):
    with pytest.raises(ValueError, match=r"`ks` must be numbers from 1 to 24, got \["):
        without(ks=ks)
    assert without(ks=[24], max_epochs=1, num_seeds=1).masks.sum(1).tolist() == [25, 1, 1, 1]


def test_scores_of_other_data_are_refused():
    with pytest.raises(ValueError, match="has 2 queries and 25 training examples, but 3 queries and 25 training"):
        without(Attribution(random(2, NUM_TRAIN), None))
    with pytest.raises(ValueError, match="has 3 queries and 24 training examples"):
        without(Attribution(random(3, 24), None))
    made = retrain(plain_net, QUERIES, train_data=points(), num_subsets=2, num_seeds=1, **HOW).metadata
    assert without(some_scores(data=made["data"], query_data=made["query_data"]), num_seeds=1).num_queries == 3
    with pytest.raises(ValueError, match="has other training data"):
        without(some_scores(data=made["query_data"]))
    with pytest.raises(ValueError, match="has other queries"):
        without(some_scores(query_data=made["data"]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda scores: scores, TypeError, r"must be an Attribution, got Tensor\. Wrap scores in"),
        (lambda scores: Attribution(scores / scores.new_tensor([[1], [0], [1]])), ValueError, r"queries \[1\] are not"),
        (
            lambda scores: Attribution(scores, train_indices=torch.arange(NUM_TRAIN) + 1),
            ValueError,
            "are not the positions of",
        ),
    ],
    ids=["tensor", "infinite", "positions"],
)
def test_scores_that_cannot_be_checked(change, error, message):
    with pytest.raises(error, match=message):
        retrain_without(change(some_scores().scores), plain_net, QUERIES, train_data=points(), ks=2, **HOW)
