"""evaluate(): several attributions judged by the same retrained models, as one table."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from stride_lightning.metrics.counterfactual import counterfactual_score
from stride_lightning.metrics.linear_datamodeling import LinearDatamodelingScore
from stride_lightning.results.attribution import Attribution
from stride_lightning.results.evaluation import Evaluation, EvaluationRow
from stride_lightning.results.top_attribution import TopAttribution
from stride_lightning.retraining.ground_truth import Counterfactual, GroundTruth
from stride_lightning.runtime.progress import track

_Result: TypeAlias = Attribution | TopAttribution


def evaluate(
    attributions: Mapping[str, _Result] | Sequence[_Result] | _Result,
    truth: GroundTruth,
    *,
    counterfactuals: Mapping[str, Counterfactual] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    show_progress: bool = True,
) -> Evaluation:
    """Judge attributions by models retrained on random subsets: do their scores predict the losses?

    In a distributed run every process computes the same.

    Args:
        attributions: A dictionary of names and attributions. Or a sequence of attributions, or one; their methods name
            them ("stride", "stride-2").
        truth: The result of :func:`~stride_lightning.retrain` for the same training data and queries.
        counterfactuals: Results of :func:`~stride_lightning.retrain_without`, for some or all of the names.
        confidence: Confidence of the bootstrap intervals of the linear datamodeling score.
        num_resamples: Number of resamples of the bootstrap.
        seed: Seed of the bootstrap.
        show_progress: Show a progress bar.

    Returns:
        A table that can be printed, logged and drawn.

    Raises:
        TypeError: If something is no attribution, ground truth or counterfactual.
        ValueError: If an attribution does not fit the truth or has scores that are not finite, if a counterfactual
            belongs to no attribution or to other scores, or if no query's loss varies over the subsets.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> masks, weights = torch.rand(40, 20, generator=generator) < 0.5, torch.randn(20, 5, generator=generator)
        >>> losses = torch.randn(2, 40, 5, generator=generator) - masks.float() @ weights
        >>> truth = GroundTruth(masks, losses, seeds=[0, 1])
        >>> evaluate({"exact": Attribution(weights.T), "none": Attribution(torch.zeros(5, 20))}, truth)
        LDS of 5 queries over 40 subsets x 2 seeds, with 95 % intervals
        method  LDS                   of ceiling  constant queries  seconds  memory
        exact   0.953 [0.907, 0.968]  99 %        0                 -        -
        none    0.000 [0.000, 0.000]  0 %         5                 -        -
        noise ceiling 0.97: what a perfect predictor would get

    Reference: arXiv:2303.14186 (TRAK), definition 2.4; arXiv:2202.00622 (datamodels).
    """
    if not isinstance(truth, GroundTruth):
        raise TypeError(f"`truth` must be the GroundTruth that retrain() returns, got {type(truth).__name__}.")
    named = _named(attributions)
    counterfactuals = counterfactuals or {}
    if unknown := [name for name in counterfactuals if name not in named]:
        raise ValueError(
            f"`counterfactuals` holds {unknown}, but the attributions are named {list(named)}. Use the same names."
        )
    # All checks come first: a bootstrap takes a while.
    scores = {name: _checked(name, attribution, truth) for name, attribution in named.items()}
    rises = {name: _rises(name, removal, scores[name], truth) for name, removal in counterfactuals.items()}
    losses, per_query, rows = truth.losses, {}, []
    for name in track(named, "Evaluating attributions", show=show_progress):
        # Not synchronised: all ranks hold the same queries.
        metric = LinearDatamodelingScore(truth.masks, reduction="none", sync_on_compute=False)
        metric.update(scores[name], losses)
        with warnings.catch_warnings():  # a column of the table counts the constant queries
            warnings.filterwarnings("ignore", message=r"\d+ of \d+ queries have constant")
            per_query[name] = metric.compute().reshape(-1)
            lower, upper = metric.interval(confidence, num_resamples, seed)
        lds, memory = per_query[name].mean().item(), named[name].metadata.get("peak_memory_bytes")
        ends = lower.item(), upper.item()
        rows.append(EvaluationRow(name, lds, *ends, metric.num_constant, rises.get(name), named[name].seconds, memory))
    best_first = tuple(sorted(rows, key=lambda row: -row.lds))
    sizes = len(truth.masks), len(truth.seeds), truth.num_queries
    return Evaluation(best_first, truth.ceiling, *sizes, confidence, per_query, truth.measure)


def _named(attributions: Mapping[str, _Result] | Sequence[_Result] | _Result) -> dict[str, _Result]:
    if isinstance(attributions, Mapping):
        named = {str(name): attribution for name, attribution in attributions.items()}
    else:
        named = {}
        for attribution in [attributions] if isinstance(attributions, _Result) else attributions:
            label = str(getattr(attribution, "label", "scores"))
            names = itertools.chain([label], (f"{label}-{number}" for number in itertools.count(2)))
            named[next(name for name in names if name not in named)] = attribution
    if not named:
        raise ValueError("`attributions` is empty: give at least one attribution.")
    for name, attribution in named.items():
        if not isinstance(attribution, _Result):
            kind = type(attribution).__name__
            raise TypeError(
                f"Expected {name!r} to be an Attribution, got {kind}: wrap the scores in Attribution(scores)."
            )
    return named


def _checked(name: str, attribution: _Result, truth: GroundTruth) -> Tensor:
    """The scores, their columns in the order of the truth's."""
    what = f"The attribution {name!r}"
    truth.check_data(attribution.metadata, what)
    truth.check_measure(attribution.metadata, what)
    if attribution.num_queries != truth.num_queries:
        raise ValueError(
            f"{what} has {attribution.num_queries} queries, the ground truth has {truth.num_queries}. Make both with "
            "the same queries in the same order."
        )
    if attribution.num_train != truth.num_train:
        raise ValueError(
            f"{what} has scores of {attribution.num_train} training examples, the ground truth has "
            f"{truth.num_train}. The linear datamodeling score needs one score for each of them: attribute with the "
            "same training data."
        )
    if isinstance(attribution, TopAttribution):
        raise ValueError(f"{what} cannot be evaluated. {attribution.why_no_scores}")
    scores = attribution.scores.detach().cpu()
    if bad := (~torch.isfinite(scores)).nonzero().tolist():
        query, column = bad[0]
        raise ValueError(
            f"{what} has {len(bad)} scores that are not finite, the first that of query {query} for training example "
            f"{int(attribution.train_indices[column])}. Leave out such queries, or find the cause (did training "
            "diverge?)."
        )
    return _aligned(what, scores, attribution, truth)


def _aligned(what: str, scores: Tensor, attribution: Attribution, truth: GroundTruth) -> Tensor:
    columns, recorded = attribution.train_indices.cpu(), truth.metadata.get("train_indices")
    positions = torch.arange(truth.num_train) if recorded is None else torch.as_tensor(recorded)
    # Fingerprints were compared before. Where both have one, both read the same examples in the same order, whatever
    # positions these have in a larger dataset.
    read_alike = recorded is None and None not in (truth.metadata.get("data"), attribution.metadata.get("data"))
    if torch.equal(columns, positions):
        return scores
    if torch.equal(columns.sort().values, positions.sort().values):
        if read_alike:  # are the columns permuted, or was the data read in this order by both?
            raise ValueError(
                f"{what} has its training examples in another order than the dataset, and the ground truth holds no "
                "`train_indices`. Put the columns of the scores in the order of the ground truth's masks, and set "
                f"train_indices = torch.arange({len(columns)})."
            )
        return scores[:, columns.argsort()[positions.argsort().argsort()]]
    if read_alike:
        return scores
    raise ValueError(
        f"{what} has other training examples than the ground truth: its train_indices begin with "
        f"{columns[:5].tolist()}, those of the ground truth with {positions[:5].tolist()}. Make both with the same "
        "data."
    )


def _rises(name: str, removal: Counterfactual, scores: Tensor, truth: GroundTruth) -> dict[int, float]:
    what = f"The counterfactual of {name!r}"
    if not isinstance(removal, Counterfactual):
        raise TypeError(f"{what} must be what retrain_without() returns, got {type(removal).__name__}.")
    truth.check_data(removal.metadata, what)
    truth.check_measure(removal.metadata, what)
    if (removal.num_queries, removal.num_train) != (truth.num_queries, truth.num_train):
        raise ValueError(
            f"{what} has {removal.num_queries} queries and {removal.num_train} training examples, the ground truth has "
            f"{truth.num_queries} and {truth.num_train}. Make both with the same data and queries."
        )
    masks = removal.masks[1:].reshape(len(removal.ks), *scores.shape)
    for k, mask in zip(removal.ks, masks, strict=True):  # one k at a time, for memory
        # Ties may have been broken in any way, but no remaining example scores above a removed one.
        removed, rest = scores.masked_fill(mask, torch.inf).amin(1), scores.masked_fill(~mask, -torch.inf).amax(1)
        if ((~mask).sum(1) != k).any() or (removed < rest).any():
            raise ValueError(
                f"{what} was measured with other scores: the {k} removed examples are not those that score highest. "
                "Pass the attribution that retrain_without() was given, or measure again."
            )
    means = counterfactual_score(removal.losses_removed, removal.losses_full)
    return dict(zip(removal.ks, means.tolist(), strict=True))
