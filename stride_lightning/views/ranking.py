"""The rows of every view: the ranked training examples of one query, with targets and facts as texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stride_lightning.results.scores import AttributionResult


@dataclass(frozen=True)
class RankedExample:
    """One proponent or opponent; target and values of ``train_info`` are texts."""

    column: int
    position: int
    score: float
    std: float | None
    target: str | None
    info: tuple[str, ...]


def rank_examples(
    attribution: AttributionResult, query: int, k: int
) -> tuple[list[RankedExample], list[RankedExample]]:
    """At most ``k`` proponents and opponents of one query, strongest first. A score of zero is neither.

    Example:
        >>> import torch
        >>> from stride_lightning.results.attribution import Attribution
        >>> proponents, opponents = rank_examples(Attribution(torch.tensor([[0.0, -0.25, 0.5]])), query=0, k=2)
        >>> [example.position for example in proponents], [example.position for example in opponents]
        ([2], [1])
    """
    one = attribution[query]
    top = one.top_columns(min(k, one.num_ranked))

    def examples(columns: Tensor, scores: Tensor, stds: Tensor | None, sign: int) -> list[RankedExample]:
        return [
            RankedExample(
                column,
                int(one.train_indices[column]),
                score,
                None if stds is None else stds[0, rank].item(),
                target_text(one.train_targets, column),
                tuple(str(values[column]) for values in one.train_info.values()),
            )
            for rank, (column, score) in enumerate(zip(columns[0].tolist(), scores[0].tolist(), strict=True))
            if score * sign > 0
        ]

    proponents = examples(top.proponents, top.proponent_scores, top.proponent_stds, 1)
    return proponents, examples(top.opponents, top.opponent_scores, top.opponent_stds, -1)


def query_facts(attribution: AttributionResult, query: int) -> dict[str, str]:
    """A query's target, then its columns of ``query_info``, as texts by name.

    Example:
        >>> import torch
        >>> from stride_lightning.results.attribution import Attribution
        >>> attribution = Attribution(torch.ones(1, 2), query_targets=torch.tensor([7]), query_info={"id": ["a"]})
        >>> query_facts(attribution, 0)
        {'target': '7', 'id': 'a'}
    """
    target = target_text(attribution.query_targets, query)
    facts = {} if target is None else {"target": target}
    return facts | {name: str(values[query]) for name, values in attribution.query_info.items()}


def target_text(targets: Tensor | None, index: int) -> str | None:
    """One target as text; the first three numbers of a vector.

    Example:
        >>> import torch
        >>> target_text(torch.tensor([3, 4]), 1), target_text(torch.tensor([[0.25, 1.0]]), 0)
        ('4', '(0.25, 1)')
    """
    if targets is None:
        return None
    values: list[Any] = targets[index].flatten()[:4].tolist()
    texts = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
    return texts[0] if targets[index].numel() == 1 else f"({', '.join(texts[:3] + ['...'] * (len(texts) > 3))})"
