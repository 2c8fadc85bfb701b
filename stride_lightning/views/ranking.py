"""The rows of every view: the ranked training examples of one query, with targets and facts as texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stride_lightning.results.agreement import MARK, is_of_readout
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
    attribution: AttributionResult, query: int, k: int, *, with_std: bool = True
) -> tuple[list[RankedExample], list[RankedExample]]:
    """At most ``k`` proponents and opponents of one query, strongest first. A score of zero is neither.

    A view that shows no standard deviation sets ``with_std=False``, so that none is computed for it.

    Example:
        >>> import torch
        >>> from stride_lightning.results.attribution import Attribution
        >>> proponents, opponents = rank_examples(Attribution(torch.tensor([[0.0, -0.25, 0.5]])), query=0, k=2)
        >>> [example.position for example in proponents], [example.position for example in opponents]
        ([2], [1])
    """
    one = attribution[query]
    top = one.top_columns(min(k, one.num_ranked))
    stds = (top.proponent_stds, top.opponent_stds) if with_std else (None, None)

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

    proponents = examples(top.proponents, top.proponent_scores, stds[0], 1)
    return proponents, examples(top.opponents, top.opponent_scores, stds[1], -1)


def query_name(attribution: AttributionResult, query: int) -> str:
    """The number of a query, marked where the readout disagrees with the model.

    Example:
        >>> import torch
        >>> from stride_lightning.results.attribution import Attribution
        >>> attribution = Attribution(torch.ones(2, 2), query_info={"readout agrees": [True, False]})
        >>> query_name(attribution, 0), query_name(attribution, 1)
        ('0', '1 !')
    """
    return f"{query} {MARK}" if attribution.disagrees(query) else str(query)


def query_facts(attribution: AttributionResult, query: int, *, with_readout: bool = True) -> dict[str, str]:
    """A query's target, then its columns of ``query_info``, as texts by name.

    A view that shows values without their names leaves out those of the readout.

    Example:
        >>> import torch
        >>> from stride_lightning.results.attribution import Attribution
        >>> attribution = Attribution(torch.ones(1, 2), query_targets=torch.tensor([7]), query_info={"id": ["a"]})
        >>> query_facts(attribution, 0)
        {'target': '7', 'id': 'a'}
    """
    target = target_text(attribution.query_targets, query)
    facts = {} if target is None else {"target": target}
    info = attribution.query_info
    names = [name for name in info if with_readout or not is_of_readout(name, info)]
    return facts | {name: info_text(info, name, query) for name in names}


def info_text(info: Mapping[str, Sequence[Any]], name: str, index: int) -> str:
    """One value of a column as text: a user's value as it is, numbers of a readout with three digits.

    Example:
        >>> info = {"loss": [0.123456], "readout loss": [2.0], "id": [0.123456]}
        >>> [info_text(info, name, 0) for name in info]
        ['0.123', '2', '0.123456']
    """
    value = info[name][index]
    return _numbers_text(value) if is_of_readout(name, info) else str(value)


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
    return _numbers_text(values[0] if targets[index].numel() == 1 else values)


def _numbers_text(value: Any) -> str:
    """A number with three digits, or the first three of a list."""
    if isinstance(value, list | tuple):
        texts = [_numbers_text(part) for part in value[:3]] + ["..."] * (len(value) > 3)
        return f"({', '.join(texts)})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
